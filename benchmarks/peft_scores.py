"""Scores beside PEFT's: the same runs by transformers' Trainer and PEFT, and whether they agree.

    spafit grid minilm --out runs/minilm
    python -m benchmarks.peft_scores runs/minilm/mrpc/Full-LoRA-II runs/minilm/cola/SPAFIT-0-2-II

Each folder holds the runs of one cell of a grid, by seed. For each of them the same method is
trained once more, with the settings of its record, by the tools that people would use without
spafit: transformers' tokenizer, model and Trainer, and PEFT, which draw initial values, order and
dropout themselves. So the scores of one seed are not equal; their distributions should be. The
table has for each metric both means, the difference with its 95 % confidence interval, Welch's
t-test, and what the test can see: the difference that it finds with a probability of 80 %.

Two cells are on record: LoRA-II on MRPC, and on CoLA the SPAFIT, whose seeds lie closest there of
the methods with five. They agree if neither's first metric differs at the 5 % level, by Holm's
correction; this was settled before the runs were compared.

What is done is kept in the CSV and not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats
import torch
import transformers

from benchmarks.contenders.baseline import peft_twin
from benchmarks.contenders.trainer_run import arguments_of_trainer
from benchmarks.glue_minilm import read_rows, write_rows
from benchmarks.harness.arguments import RESULTS, set_threads
from benchmarks.harness.report import place
from spafit.errors import CheckpointError
from spafit.experiments.report.statistics import LEVEL, POWER, t_power
from spafit.plans import Plan
from spafit.runs.record import RUN, read_run, status_of
from spafit.strata import adapt
from spafit.tasks import glue, scoring
from spafit.tasks.task import Dataset
from spafit.training.inference import decode
from spafit.weights.hub import local_folder
from spafit.weights.pretrained import load_pretrained

SPAFIT, PEFT = "spafit", "transformers + PEFT"
COLUMNS = (
    "task", "method", "metric", "side", "seed", "score", "best_epoch", "trainable",
    "learning_rate", "epochs", "batch_size", "warmup", "weight_decay", "max_grad_norm",
    "train_rows", "dev_rows", "processor", "threads", "torch", "transformers", "peft", "spafit",
    "commit",
)  # fmt: skip
_SETTINGS = COLUMNS[8:14]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the rows and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cells", nargs="+", type=Path, help="folders with runs, one a seed")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", type=Path, default=RESULTS / "peft_scores.csv")
    parsed = parser.parse_args(arguments)
    set_threads(parsed)
    try:
        records = finished_runs(parsed.cells)
    except CheckpointError as error:
        parser.exit(2, f"{error}\n")
    rows = read_rows(parsed.out)
    known = {(row["task"], row["method"]): _settings(row) for row in rows}
    for folder, record in records.items():
        [its, *_] = rows_of(record, SPAFIT)
        if known.setdefault((its["task"], its["method"]), _settings(its)) != _settings(its):
            parser.exit(
                2,
                f"{folder} has other settings than the runs of {its['method']} on {its['task']} in "
                f"{parsed.out}; give another --out\n",
            )
    for folder, record in records.items():
        ours = rows_of(record, SPAFIT)
        done = {(row["task"], row["method"], row["side"], row["seed"]) for row in rows}
        if (ours[0]["task"], ours[0]["method"], PEFT, ours[0]["seed"]) in done:
            continue
        print(f"{folder}, by {PEFT} ...", flush=True)
        rows += [*ours, *train(record)]
        write_rows(parsed.out, rows, COLUMNS)
    text = table(rows)
    parsed.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def _settings(row: Mapping[str, str]) -> list[str]:
    return [row[name] for name in _SETTINGS]


def finished_runs(cells: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Return the records of the runs of some cells, by their folders.

    Raises
    ------
    CheckpointError
        If a cell has no run, or a run is not finished or its record is damaged.
    """
    found = {}
    for cell in cells:
        paths = sorted(cell.glob(f"seed-*/{RUN}"))
        if not paths:
            raise CheckpointError(
                f"{cell} has no run (no seed-*/{RUN}); name the folder of a cell of a grid, which "
                "has its runs by seed"
            )
        for path in paths:
            found[path.parent] = record = read_run(path)
            if (status := record.get("status")) != "finished":
                is_now = "running, or was killed" if status == "running" else status_of(record)
                raise CheckpointError(
                    f"{path.parent} is not finished: it is {is_now}; the command that began it, "
                    "given again, finishes it (spafit grid FILE --out DIR)"
                )
    return found


def rows_of(record: Mapping[str, Any], side: str) -> list[dict[str, str]]:
    """Return the rows of a finished run of spafit's, from its record, which has no commit."""
    result, where, installed = record["result"], record["machine"], record["versions"]
    about = {
        "side": side,
        "best_epoch": str(result["best_epoch"]),
        "trainable": str(result["trainable"]),
        "processor": where["processor"],
        "threads": str(where["torch_threads"]),
        "torch": installed["torch"],
        "spafit": installed["spafit"],
        "commit": "",
    }
    return _rows(record, result["metrics"], about)


def _rows(
    record: Mapping[str, Any], scores: Mapping[str, float], about: Mapping[str, str]
) -> list[dict[str, str]]:
    settings, data = record["settings"], record["data"]
    return [
        {
            "task": record["task"],
            "method": record["method"],
            "metric": metric,
            "seed": str(settings["seed"]),
            "score": f"{score:.6f}",
            **{name: str(settings[name]) for name in _SETTINGS},
            "train_rows": str(data["train"]["rows"]),
            "dev_rows": str(data["dev"]["rows"]),
            **about,
        }
        for metric, score in scores.items()
    ]


def train(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Train as a run of spafit's was trained, by transformers and PEFT; return its rows."""
    settings = record["settings"]
    task = glue.get_task(record["task"])
    assert task.labels, "the loss of scores is spafit's own"
    root = Path(record["about"]["data"])
    sets = {split: glue.load(task, split, root) for split in ("train", "dev")}
    folder = local_folder(record["about"]["model"])
    transformers.set_seed(settings["seed"])
    model = load_pretrained(folder, num_labels=task.num_labels)
    adapt(model, Plan.from_json(json.dumps(record["plan"])))
    twin = peft_twin(model, own_draws=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as place_of_nothing:
        trainer = transformers.Trainer(
            model=twin,
            args=arguments_of_trainer(settings, place_of_nothing, len(sets["train"])),
            train_dataset=_encoded(tokenizer, sets["train"], settings["max_length"]),
            eval_dataset=_encoded(tokenizer, sets["dev"], settings["max_length"]),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: scoring.compute(
                task, decode(found.predictions, task.labels), sets["dev"].labels
            ),
        )
        trainer.train()
    first = task.metrics[0]
    evaluations = [each for each in trainer.state.log_history if f"eval_{first}" in each]
    best = max(evaluations, key=lambda each: each[f"eval_{first}"])
    where = place(torch.device("cpu"), "float32")
    about = {
        "side": PEFT,
        "best_epoch": str(round(best["epoch"])),
        "trainable": str(sum(p.numel() for p in twin.parameters() if p.requires_grad)),
        **{name: str(where[name]) for name in COLUMNS[16:]},
    }
    return _rows(record, {name: best[f"eval_{name}"] for name in task.metrics}, about)


def _encoded(tokenizer: Any, data: Dataset, max_length: int) -> list[dict[str, Any]]:
    """Return the rows as a list that a DataLoader takes, with the number of each label."""
    second = None if data.texts_b is None else list(data.texts_b)
    encoded = tokenizer(list(data.texts_a), second, truncation=True, max_length=max_length)
    columns = {**encoded, "labels": [data.task.labels.index(str(each)) for each in data.labels]}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Agreement:
    """Two samples of scores, and what is known of the difference of their means.

    Attributes
    ----------
    difference : float
        Mean of theirs minus mean of ours.
    low, high : float
        Its 95 % confidence interval, by Welch.
    p : float
        Of Welch's t-test, two-sided.
    seen : float
        The difference that the test sees with a power of 80 % at these numbers of seeds, if both
        have the standard deviation of the two samples together.
    """

    difference: float
    low: float
    high: float
    p: float
    seen: float


def compare(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> Agreement:
    """Compare two samples of at least two scores each; the level is that of what is seen."""
    with warnings.catch_warnings():  # of equal scores
        warnings.simplefilter("ignore", RuntimeWarning)
        test = scipy.stats.ttest_ind(theirs, ours, equal_var=False)
        interval = test.confidence_interval(1 - LEVEL)
    n, m = len(ours), len(theirs)
    squares = (n - 1) * statistics.variance(ours) + (m - 1) * statistics.variance(theirs)
    error = math.sqrt(squares / (n + m - 2) * (1 / n + 1 / m))
    difference = statistics.mean(theirs) - statistics.mean(ours)
    return Agreement(
        difference, interval.low, interval.high, test.pvalue, error * _effect(n + m - 2, level)
    )


def _effect(df: int, level: float) -> float:
    """Return the difference, in its standard errors, that a two-sided t-test sees at POWER."""
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_power(middle, df, level) < POWER else (low, middle)
    return high


def sides_of(
    rows: Sequence[Mapping[str, str]], names: tuple[str, str] = (SPAFIT, PEFT)
) -> dict[tuple[str, str, str], tuple[list[float], list[float]]]:
    """Return the scores of both sides of each task, method and metric."""
    found: dict[tuple[str, str, str], tuple[list[float], list[float]]] = {}
    for row in rows:
        key = (row["task"], row["method"], row["metric"])
        sides = found.setdefault(key, ([], []))
        sides[names.index(row["side"])].append(float(row["score"]))
    return {key: sides for key, sides in found.items() if min(map(len, sides)) > 1}


def table(rows: Sequence[Mapping[str, str]], names: tuple[str, str] = (SPAFIT, PEFT)) -> str:
    """Return the table, in Markdown."""
    lines = [
        f"| task | method | metric | seeds | {' | '.join(names)} | difference | 95 % interval | p "
        "| seen with 80 % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, sides in sides_of(rows, names).items():
        found = compare(*sides)
        each = [f"{statistics.mean(x):.4f} ± {statistics.stdev(x):.4f}" for x in sides]
        seeds = " + ".join(str(len(x)) for x in sides)
        cells = [*key, seeds, *each, f"{found.difference:+.4f}"]
        cells += [f"{found.low:+.4f} to {found.high:+.4f}", f"{found.p:.2f}", f"{found.seen:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    places = dict.fromkeys(
        f"{row['side']}, {row['processor']}, {row['threads']} threads, torch {row['torch']}"
        + (f", transformers {row['transformers']}, PEFT {row['peft']}" if row.get("peft") else "")
        + f", spafit {row['spafit']}"
        + (f", commit {row['commit']}" if row["commit"] else "")
        for row in rows
    )
    settings = dict.fromkeys(
        f"{row['task']}, {row['method']}: " + ", ".join(f"{name} {row[name]}" for name in _SETTINGS)
        for row in rows
    )
    return "\n".join([*lines, "", *(f"- {each}" for each in (*settings, *places)), ""])


if __name__ == "__main__":
    main()

"""Which layers of a frozen model know a task: the probes of several tasks in one table.

    python -m benchmarks.probes --data DATA --folder probes

Each task, one of GLUE or one that the package generates, is probed as ``spafit probe`` does it. A
row has, of a task, a state ([CLS] or the mean of the tokens) and a layer, the score of that layer
and of a learnt mix of all layers up to it, as mean and deviation over seeds, and the scores of
chance and of the commonest class. The figure has a panel for each task.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.arguments import RESULTS, set_threads
from benchmarks.harness.lengths import DATA
from benchmarks.harness.report import Row, place, write_results
from spafit.experiments.probe import linguistic
from spafit.experiments.probe.figure import draw_curve
from spafit.experiments.probe.report import run_probe
from spafit.machine.precision import resolve_device
from spafit.tasks import glue

TASKS = ("order", "pos", "number", "depth", "sts-b", "mrpc", "rte", "cola")


def main(arguments: Sequence[str] | None = None) -> None:
    """Probe, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--model", default="minilm", help="a folder, minilm, or a hub name")
    parser.add_argument("--data", type=Path, default=DATA, help="GLUE's root")
    parser.add_argument("--rows", type=int, default=2000, help="of train and of dev, at most")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--folder", type=Path, required=True, help="for what each probe writes")
    parser.add_argument("--out", type=Path, default=RESULTS / "probes", help="OUT.csv, .md, .png")
    parsed = parser.parse_args(arguments)
    set_threads(parsed)
    rows: list[dict[str, Any]] = []
    for task in parsed.tasks:
        if task in linguistic.TASKS:
            train, dev = linguistic.datasets(task)
        else:
            train, dev = (glue.load(task, split, parsed.data) for split in ("train", "dev"))
        out = parsed.folder / task
        run_probe(
            parsed.model, train, dev, seeds=parsed.seeds, rows=parsed.rows, out=out, quiet=True
        )
        rows += rows_of(json.loads((out / "probe.json").read_text(encoding="utf-8")))
    about = place(resolve_device("auto"), "float32")  # as run_probe
    write_results(parsed.out, [{**row, **about} for row in rows], "Probes", in_table=("task",))
    draw(rows, parsed.out.with_suffix(".png"))


def rows_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each state and layer of a probe, from its summary."""
    rows = []
    for states, its in summary["states"].items():
        metric, score = next(iter(its["scores"].items()))
        for layer, mean in enumerate(score["mean"]):
            rows.append(
                {
                    "task": summary["task"],
                    "states": states,
                    "layer": layer,
                    "metric": metric,
                    "score": mean,
                    "deviation": score["standard_deviation"][layer],
                    "mix": its["cumulative"]["mean"][layer],
                    "mix_deviation": its["cumulative"]["standard_deviation"][layer],
                    "center_of_gravity": its["center_of_gravity"]["mean"],
                    "chance": summary["chance"][metric],
                    "commonest_class": summary["majority"][metric],
                    "seeds": len(summary["seeds"]),
                    "model": summary["model"],
                    "train_rows": summary["rows"]["train"],
                    "dev_rows": summary["rows"]["dev"],
                }
            )
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each task: score by layer, with a band of one deviation over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(2.9 * columns, 0.5 + 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for axes, task in zip(panels, tasks, strict=False):
        of_task = [row for row in rows if row["task"] == task]
        for states in dict.fromkeys(str(row["states"]) for row in of_task):
            its = [row for row in of_task if row["states"] == states]
            scores, spreads = (
                np.array([float(row[column]) for row in its]) for column in ("score", "deviation")
            )
            draw_curve(axes, states, scores, spreads)
        for column, style in (("chance", ":"), ("commonest_class", "-.")):
            level, label = float(of_task[0][column]), column.replace("_", " ")
            axes.axhline(level, color="black", linestyle=style, lw=1, label=label)
        axes.set_title(f"{task} ({of_task[0]['metric']})", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel("layer (0: embeddings)", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

"""What methods forget of their base: run folders of several methods and seeds in one table.

    spafit grid forgetting.json --out runs/forgetting
    python -m benchmarks.forgetting runs/forgetting/rte/*/seed-* --tasks sst-2 cola

A row has, of one run and one probed task, the score of a linear probe on the frozen features of the
last layer, before (the base) and after (with what was trained), as the mean over the probes' seeds;
and whether the run with its adapter off is its base, bit for bit. With ``--texts``, where the
checkpoint has its head, the loss of masked tokens stands in rows of its own. Below the table are
mean and deviation over the runs' seeds, which the figure shows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import RESULTS
from benchmarks.harness.lengths import DATA
from benchmarks.harness.report import Row, place, write_results
from spafit.cli.inspecting import read_texts
from spafit.cli.trained import Run, Trained
from spafit.experiments.inspect.forgetting import adapter_off, probe_scores
from spafit.experiments.inspect.masked import load_masked_head, mask, masked_loss
from spafit.experiments.probe.layers import some_rows
from spafit.strata import fingerprint
from spafit.tasks import glue
from spafit.tasks.task import Dataset
from spafit.training.inference import encode
from spafit.weights.pretrained import load_pretrained

MASKED = "masked tokens"
SOME_TEXTS = 32


def main(arguments: Sequence[str] | None = None) -> None:
    """Inspect the runs, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, all of one base")
    parser.add_argument("--model", help="folder, or hub name (default: the first run's)")
    parser.add_argument("--tasks", nargs="+", default=["sst-2", "cola"])
    parser.add_argument("--data", type=Path, default=DATA, help="GLUE's root")
    parser.add_argument("--texts", type=Path, help="a text a line, whose tokens are masked")
    parser.add_argument("--rows", type=int, default=2000, help="of train and of dev, at most")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the probes")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "forgetting", help="writes OUT.csv, .md, .png"
    )
    parsed = parser.parse_args(arguments)
    tasks = {
        name: (
            some_rows(glue.load(name, "train", parsed.data), parsed.rows),
            some_rows(glue.load(name, "dev", parsed.data), parsed.rows),
        )
        for name in parsed.tasks
    }
    texts = None if parsed.texts is None else read_texts(parsed.texts)
    rows: list[dict[str, Any]] = []
    bases: dict[int, dict[tuple[str, str], list[float]]] = {}
    for folder in parsed.runs:
        trained = Trained(folder, parsed.model, None)
        run = trained.runs[0]
        name = parsed.model or trained.recorded("model", "--model")
        parsed.model = name
        C = run.model.num_labels
        base = Run(load_pretrained(name, num_labels=C).to(run.model.device), run.tokenizer, {})
        if C not in bases:
            bases[C] = scores_of(base, base, name, tasks, texts, parsed.seeds)
        before = bases[C]
        after = scores_of(run, base, name, tasks, texts, parsed.seeds)
        first = next(iter(tasks.values()))[1][:SOME_TEXTS]
        off = adapter_off(run.model, base.model, encode(base.model, run.tokenizer, first, None))
        about = {
            "method": method_of(run),
            "run_seed": run.record["settings"]["seed"],
            "trained_on": trained.task.display,
            "own_score": next(iter(run.record["result"]["metrics"].values())),
            "off": "not possible" if off is None else "the base" if off.is_identical else "not it",
        }
        print(f"{folder}: {about['method']}", flush=True)
        for (task, states), scores in after.items():
            metric = "loss" if task == MASKED else tasks[task][1].task.metrics[0]
            old, new = statistics.mean(before[task, states]), statistics.mean(scores)
            shown = {"metric": metric, "before": old, "after": new, "difference": new - old}
            rows.append({**about, "probed": task, "states": states, **shown})
    where = {
        "probe_rows": parsed.rows,
        "probe_seeds": " ".join(map(str, parsed.seeds)),
        "model": parsed.model,
        "base": fingerprint(base.model)[:12],
        **place(base.model.device, "float32"),
    }
    rows = [{**row, **where} for row in apart(rows)]
    write_results(parsed.out, rows, "forgetting", in_table=("method",), below=summary(rows))
    draw(rows, parsed.out.with_suffix(".png"))


def scores_of(
    run: Run,
    base: Run,
    name: str,
    tasks: dict[str, tuple[Dataset, Dataset]],
    texts: Dataset | None,
    seeds: Sequence[int],
) -> dict[tuple[str, str], list[float]]:
    """Return the scores for each seed, by task and states; of masked tokens the losses."""
    model, tokenizer = run.model, run.tokenizer
    every = probe_scores(model, tokenizer, tasks, seeds, quiet=False)
    found = {key: list(scores) for key, scores in every.items()}
    if texts is not None:
        head = load_masked_head(name, base.model)
        encodings = encode(model, tokenizer, texts, None)
        drawn = [mask(tokenizer, encodings, seed) for seed in seeds]
        found[MASKED, "all"] = [masked_loss(model, head, each) for each in drawn]
    return found


def method_of(run: Run) -> str:
    """Return the name of a run's plan, and whether it trains biases directly."""
    assert run.model.adaptation is not None
    plan = run.model.adaptation.plan
    names = {
        each.name for stratum in plan.strata for some in stratum.train.values() for each in some
    }
    return f"{plan.name}, direct" if "bias-direct" in names else plan.name


def apart(rows: Sequence[Row]) -> list[Row]:
    """Name with each method the task that it was trained on, if there are several."""
    if len({row["trained_on"] for row in rows}) < 2:
        return list(rows)
    return [{**row, "method": f"{row['method']} on {row['trained_on']}"} for row in rows]


def groups_of(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Return the differences of the runs, by probe and method."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        of_probe = groups.setdefault((str(row["probed"]), str(row["states"])), {})
        of_probe.setdefault(str(row["method"]), []).append(float(row["difference"]))
    return groups


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summary(rows: Sequence[Row]) -> str:
    """Return the mean difference of each method with its deviation over the runs, as Markdown."""
    groups = groups_of(rows)
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    heads = [f"{probed}, {states}" for probed, states in groups]
    lines = [
        "After less before, mean ± standard deviation over the runs:",
        "",
        f"| method | adapter off | runs | {' | '.join(heads)} |",
        "|---" * (3 + len(heads)) + "|",
    ]
    for method in methods:
        off = ", ".join(dict.fromkeys(str(row["off"]) for row in rows if row["method"] == method))
        every = [of_probe[method] for of_probe in groups.values()]
        cells = [f"{statistics.mean(each):+.3f} ± {deviation(each):.3f}" for each in every]
        lines.append(f"| {method} | {off} | {len(every[0])} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each probe: the difference of each method, and that of each of its runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = groups_of(rows)
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    metrics = {(str(row["probed"]), str(row["states"])): str(row["metric"]) for row in rows}
    figure = Figure(
        figsize=(2.2 + 2.6 * len(groups), 1.5 + 0.45 * len(methods)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (probe, of_probe) in zip(grid, groups.items(), strict=True):
        for y, method in enumerate(methods):
            values = of_probe[method]
            axes.plot(values, [y] * len(values), "o", color="#999999", markersize=5)
            axes.errorbar(
                statistics.mean(values),
                y,
                xerr=deviation(values),
                fmt="D",
                color="black",
                markersize=6,
                capsize=4,
            )
        axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(f"{probe[0]}, {probe[1]}", fontsize=11)
        axes.set_xlabel(f"{metrics[probe]}, after less before", fontsize=10)
        axes.margins(x=0.2, y=0.15)
        axes.locator_params(axis="x", nbins=4)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_yticks(range(len(methods)), methods, fontsize=11)
    grid[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

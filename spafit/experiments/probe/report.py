"""``spafit probe``: probe the layers, and show and write what was found."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spafit.errors import ConfigError
from spafit.experiments.figure import can_draw
from spafit.experiments.probe.figure import draw
from spafit.experiments.probe.layers import (
    Probed,
    center_of_gravity,
    chance,
    deviation,
    expected_layer,
    probe,
    some_rows,
)
from spafit.experiments.probe.states import FILE, SHOWN, STATES, kept_states
from spafit.files.replacing import refuse_place, replacing
from spafit.machine.precision import resolve_device
from spafit.machine.terminal import fitted
from spafit.tasks import scoring
from spafit.tasks.metrics import METRICS
from spafit.tasks.task import Dataset
from spafit.text.tokenization import load_tokenizer
from spafit.version import __version__
from spafit.weights.pretrained import load_pretrained


def run_probe(
    model: str,
    train: Dataset,
    dev: Dataset,
    *,
    seeds: Sequence[int],
    rows: int,
    out: Path,
    revision: str | None = None,
    mapped: bool | None = None,
    quiet: bool = False,
) -> dict[str, Probed]:
    """Probe every layer of a model, print a table, and write it into a folder.

    The folder gets ``probe.csv`` (a row for each state, layer and seed), ``probe.json`` (the
    summary), ``probe.png`` where there is matplotlib, and the states of the layers.

    Parameters
    ----------
    model, revision, mapped
        As for :func:`spafit.load_pretrained`.
    train, dev : Dataset
        Labelled rows; the probes are fitted on train and scored on dev.
    seeds : sequence of int
        Different ones, at least one.
    rows : int
        The most rows of each that are used; see :func:`~spafit.experiments.probe.layers.some_rows`.
    out : Path
        The folder; it is made.
    quiet : bool
        Whether to show no progress, as without a terminal.

    Returns
    -------
    dict of str to Probed
        By the kind of state.
    """
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds has a duplicate: {' '.join(map(str, seeds))}")
    refuse_place(out, is_folder=True)
    train, dev = some_rows(train, rows), some_rows(dev, rows)
    tokenizer = load_tokenizer(model, revision=revision)
    network = load_pretrained(
        model, num_labels=train.task.num_labels, revision=revision, mapped=mapped
    ).to(resolve_device("auto"))
    out.mkdir(parents=True, exist_ok=True)
    data = {"train": train, "dev": dev}
    states = kept_states(network, tokenizer, data, out, say=print, quiet=quiet)
    found = probe(states, train, dev, seeds, quiet=quiet)
    about = {
        "task": train.task.name,
        "display": train.task.display,
        "model": model,
        "rows": {"train": len(train), "dev": len(dev)},
        "data": {"train": train.sha256, "dev": dev.sha256},
        "seeds": list(seeds),
        "spafit": __version__,
    }
    baselines = {
        "chance": chance(train.task, train, dev),
        "majority": scoring.majority(dev.task, dev.labels),
    }
    summary = {**about, **baselines, "states": {name: _summary(found[name]) for name in STATES}}
    summary["says"] = what_it_says(found)
    print(f"\n{screen(found, summary)}\n")
    files = {"probe.csv": _table(found, seeds), "probe.json": json.dumps(summary, indent=2) + "\n"}
    for name, text in files.items():
        with replacing(out / name, ConfigError) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    names = [*files, FILE]
    if can_draw():
        draw(found, summary, out / "probe.png")
        names.append("probe.png")
    print(f"written: {', '.join(names)} in {out}")
    return found


def screen(found: dict[str, Probed], summary: dict[str, Any]) -> str:
    """Return the table by layer, at most 80 columns wide, and what it says."""
    metric = found[STATES[0]].metric
    rows, seeds = summary["rows"], len(summary["seeds"])
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"
    lines = textwrap.wrap(
        f"{summary['display']}, {summary['model']}: {metric} on {rows['dev']:,} rows of dev of a "
        f"linear probe fitted on {rows['train']:,} ({spread})",
        80,
    )
    width = 17
    lines += [
        "",
        f"{'':<8}{SHOWN['cls']:<{2 * width}}{SHOWN['mean']}",
        f"{'layer':<8}" + f"{'that layer':<{width}}{'mix of 0 to it':<{width}}" * 2,
        "─" * (8 + 4 * width),
    ]
    for layer in range(len(found[STATES[0]].cumulative)):
        cells = []
        for name in STATES:
            one = found[name]
            mark = " *" if one.best_layer == layer else ""
            cells += [_spread(one.scores[metric][layer]) + mark, _spread(one.cumulative[layer])]
        lines.append(f"{layer:>5}   " + "".join(f"{each:<{width}}" for each in cells))
    lines.append("─" * (8 + 4 * width))
    gravity, expected = {}, {}
    for name in STATES:
        state = summary["states"][name]
        layer, center = state["expected_layer"], state["center_of_gravity"]
        expected[name] = gravity[name] = "no gain over 0"  # the mix tells nothing
        if layer is not None:
            gravity[name] = f"{center['mean']:.2f} ± {center['standard_deviation']:.2f}"
            expected[name] = f"{layer:.2f}"
    for label, values in (("centre of gravity", gravity), ("expected layer", expected)):
        lines.append(f"{label:<24}{values['cls']:<{2 * width}}{values['mean']}")
    error = max(one.error for one in found.values())
    lines += [
        f"{'chance':<24}{summary['chance'][metric]:.3f}",
        f"{METRICS[metric].constant:<24}{summary['majority'][metric]:.3f}",
        "",
        "* the best layer. Layer 0 is the embeddings.",
        *textwrap.wrap(
            f"Other rows of dev would move a score by ± {error:.3f} besides. {summary['says']}",
            80,
        ),
    ]
    return fitted("\n".join(map(str.rstrip, lines)), {})


def what_it_says(found: dict[str, Probed]) -> str:
    """Return what the probes say of N1, in a sentence or two."""
    sign = METRICS[found[STATES[0]].metric].sign
    kind = max(
        STATES,
        key=lambda name: (
            sign * found[name].scores[found[name].metric].mean(axis=1)[found[name].best_layer]
        ),
    )
    if found[kind].cumulative.shape[1] == 1:
        return (
            "One seed does not tell a gain from chance, and so the probe says nothing of N1; give "
            "more (--seeds)."
        )
    first = found[kind].first_gain()
    if first is None:
        gaining = any(one.first_gain() is not None for one in found.values())
        of = f"Of the states that score highest ({SHOWN[kind]}) no" if gaining else "No"
        return (
            f"{of} mix of layers does better than the embeddings alone by more than chance may: "
            "the probe says nothing of N1."
        )
    if first == 1:
        return (
            "The first layer already adds to the embeddings what a linear probe can read: the "
            "probe names no layer that is idle here, and so no N1."
        )
    below = "layer 0 adds" if first == 2 else f"layers 0 to {first - 2} add"
    found_said = (
        f"In spafit's numbers {below} nothing to the embeddings that these probes could tell "
        f"from chance, and layer {first - 1} does: "
    )
    largest = len(found[kind].cumulative) - 4  # of L + 1 states; N1 < N2 < L - 1
    if largest < 0:
        return f"{found_said}but the model has too few layers for three groups, and so no N1."
    most = ", the largest with which three groups are left" if largest < first - 2 else ""
    return (
        f"{found_said}a reason to try N1 = {min(first - 2, largest)}{most}. It is a "
        "suggestion and no more: what those layers prepare may matter all the same, and nothing "
        "was trained."
    )


def _summary(one: Probed) -> dict[str, Any]:
    gravity = center_of_gravity(one.weights)
    return {
        "best_layer": one.best_layer,
        "scores": {
            name: {"mean": _list(each.mean(axis=1)), "standard_deviation": _list(deviation(each))}
            for name, each in one.scores.items()
        },
        "cumulative": {
            "mean": _list(one.cumulative.mean(axis=1)),
            "standard_deviation": _list(deviation(one.cumulative)),
        },
        "weights": _list(one.weights.mean(axis=1)),
        "center_of_gravity": {
            "mean": float(gravity.mean()),
            "standard_deviation": float(deviation(gravity)),
        },
        "expected_layer": None
        if one.first_gain() is None
        else expected_layer(one.cumulative.mean(axis=1)),
        "first_gain": one.first_gain(),
        "error_of_dev": one.error,
    }


def _table(found: dict[str, Probed], seeds: Sequence[int]) -> str:
    """Return probe.csv: a row for each state, layer and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metrics = list(found[STATES[0]].scores)
    mix = (f"mix_{metrics[0]}", "mix_weight")
    writer.writerow(["state", "layer", "seed", *metrics, "strength", *mix])
    for name, one in found.items():
        for layer in range(len(one.weights)):
            for column, seed in enumerate(seeds):
                scores = [float(one.scores[metric][layer, column]) for metric in metrics]
                others = (one.strengths, one.cumulative, one.weights)
                row = [*scores, *(float(each[layer, column]) for each in others)]
                writer.writerow([name, layer, seed, *row])
    return text.getvalue()


def _list(values: Any) -> list[float]:
    return [float(each) for each in np.asarray(values)]


def _spread(values: Any) -> str:
    return f"{values.mean():.3f} ± {float(deviation(values)):.3f}"

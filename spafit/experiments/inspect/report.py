"""``spafit inspect``: what is shown and written of a run."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spafit.experiments.inspect.forgetting import Off
from spafit.experiments.inspect.merging import Merging
from spafit.experiments.inspect.norms import Addition
from spafit.experiments.report.statistics import paired_t_test, spread
from spafit.experiments.report.text import number
from spafit.machine.terminal import fitted
from spafit.tasks import scoring
from spafit.tasks.task import Dataset

COLUMNS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attn out",
    "attention.output.LayerNorm": "attn LN",
    "attention.output": "attn",
    "intermediate.dense": "ffn in",
    "output.dense": "ffn out",
    "output.LayerNorm": "ffn LN",
    "output": "ffn",
}
"""The places in a layer, in its order, and how they are called in tables and figures."""

#: What the norms of a kind are of, and what they are held against.
_MEANS = {
    "LoRA": "s BA, of W",
    "bias": "what was added to b, of b",
    "gain": "what was added to γ, of γ",
    "weight": "W' - W, of W",
    "(IA)³": "l - 1, of 1",
}
_STATES = {"cls": "[CLS]", "mean": "mean"}


def kinds_of(found: Iterable[Addition]) -> list[str]:
    """Return the kinds that there are, in the order of their first."""
    return list(dict.fromkeys(each.kind for each in found))


def places_of(found: Iterable[Addition], kind: str) -> list[str]:
    """Return the places within a layer that have additions of a kind, in the layer's order."""
    places = {each.place for each in found if each.kind == kind and each.layer is not None}
    order = list(COLUMNS)
    return sorted(places, key=lambda place: (order.index(place) if place in order else 99, place))


def percent(share: float) -> str:
    """Return a share as a number of percent, with one digit or two."""
    value = 100 * share
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.1g}"


def norms_screen(found: Sequence[Addition], title: str) -> str:
    """Return the tables of the norms, one for each kind, relative and absolute."""
    lines = [title]
    for kind in kinds_of(found):
        some = [each for each in found if each.kind == kind]
        is_relative = any(each.relative is not None for each in some)
        lines += ["", *textwrap.wrap(f"{kind}: {_meaning(kind)}", 80)]
        places = places_of(some, kind)
        layers = sorted({each.layer for each in some if each.layer is not None})
        cells = {(each.layer, each.place): each for each in some}
        tables = [("%", _percent_of)] * is_relative + [("norm", _norm_of)]
        for label, text in tables if layers else []:
            heads = "".join(f"{COLUMNS.get(each, each):>9}" for each in places)
            lines += [f"{label:>6}{heads}", "─" * (6 + 9 * len(places))]
            for layer in layers:
                row = "".join(f"{text(cells.get((layer, each))):>9}" for each in places)
                lines.append(f"{layer:>6}{row}")
        for each in some:
            if each.layer is None:
                shown = _percent_of(each)
                lines.append(f"  {each.place:<40}{_norm_of(each):>10}{shown + ' %':>12}")
    lines += ["", "Layers are numbered from 0. A point: nothing was added there."]
    if any(each.relative is None for each in found):
        lines.append("-: there is nothing beside it, or zeros.")
    return fitted("\n".join(map(str.rstrip, lines)), {})


def _meaning(kind: str) -> str:
    if kind in _MEANS:
        return f"‖·‖ of {_MEANS[kind]}"
    if kind in ("series", "pfeiffer", "parallel"):
        return "‖·‖ of s UD, without its activation, of the identity beside it"
    if kind.endswith(" bias"):
        return "‖·‖ of s b_u, of the bias b of the map before it"
    return "‖·‖ of the parameter itself, which a technique of your own trains"


def _percent_of(addition: Addition | None) -> str:
    if addition is None:
        return "."
    return "-" if addition.relative is None else f"{100 * addition.relative:.3g}"


def _norm_of(addition: Addition | None) -> str:
    return "." if addition is None else f"{addition.norm:.3g}"


def merging_screen(found: Sequence[Merging], title: str) -> str:
    """Return the table of the error by layer, that of what is lost, and the warnings."""
    lines = textwrap.wrap(title, 80)
    if not found[0].lost:
        return "\n".join([*lines, "", "Nothing was added beside the base, so merging is exact."])
    width = 8
    heads = "".join(f"{each.dtype:<{3 * width}}" for each in found)
    lines += [
        "",
        " " * width + heads,
        f"{'after':<{width}}"
        + "".join(f"{name:<{width}}" for name in _OF_MERGING.values()) * len(found),
        "─" * (width + 3 * width * len(found)),
    ]
    last = len(found[0].apart) - 1
    for place in range(last + 1):
        name = {0: "emb.", last: "logits"}.get(place, str(place - 1))
        row = "".join(
            f"{_small(getattr(each, which)[place]):<{width}}"
            for each in found
            for which in _OF_MERGING
        )
        lines.append(f"{name:<{width}}{row}")
    lines += [
        "",
        *textwrap.wrap(
            "apart: merged against unmerged; unmerg. and merged: each against the unmerged model "
            "in float64. Each is the norm of the difference over that of the float64 states of all "
            "tokens.",
            80,
        ),
        "",
        f"{'additions that rounding loses, %':<34}" + "".join(f"{x.dtype:>10}" for x in found),
        "─" * (34 + 10 * len(found)),
    ]
    for name, group in _by_layer(found[0].lost).items():
        shares = [_share(each, group) for each in found]
        lines.append(f"{name:<34}" + "".join(f"{100 * share:>10.2f}" for share in shares))
    lines.append(f"{'all':<34}" + "".join(f"{100 * each.share:>10.2f}" for each in found))
    lines.append(
        f"{'largest difference of a logit':<34}" + "".join(f"{x.largest:>10.1e}" for x in found)
    )
    warnings = [each.warning for each in found if each.warning]
    for warning in warnings:
        lines += ["", *textwrap.wrap(f"Warning: {warning}.", 80)]
    return fitted("\n".join(map(str.rstrip, lines)), {})


#: The errors of a merged model, and how they are called.
_OF_MERGING = {"apart": "apart", "unmerged": "unmerg.", "merged": "merged"}


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}" if value >= 1e100 else f"{value:.1e}"


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of tensors by layer."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        group = f"layer {parts[3]}" if name.startswith("bert.encoder.layer.") else parts[1]
        groups.setdefault(group, []).append(name)
    return groups


def _share(merging: Merging, names: Sequence[str]) -> float:
    some = [merging.lost[name] for name in names]
    return sum(each.lost for each in some) / sum(each.added for each in some)


@dataclasses.dataclass(frozen=True)
class Forgetting:
    """What was found of a run's forgetting.

    Attributes
    ----------
    off : Off or None
        With the adapter off; None where it cannot be switched off.
    tasks : mapping of str to (Dataset, Dataset)
        What was probed: train and dev.
    before, after : mapping of (str, str) to sequence of float
        The probes' scores by task and state, for each seed: of the base, and with the adapter on.
    masked_before, masked_after : sequence of float
        The masked-token losses for each seed; empty where no texts were given.
    texts : int
        Of so many texts.
    """

    off: Off | None
    tasks: Mapping[str, tuple[Dataset, Dataset]]
    before: Mapping[tuple[str, str], Sequence[float]]
    after: Mapping[tuple[str, str], Sequence[float]]
    masked_before: Sequence[float] = ()
    masked_after: Sequence[float] = ()
    texts: int = 0

    def metric(self, task: str) -> str:
        """Return the metric of a task's probe, the task's first."""
        return self.tasks[task][1].task.metrics[0]

    def majority(self, task: str) -> float:
        """Return its value for the commonest class of dev, or for the mean score."""
        dev = self.tasks[task][1]
        return scoring.majority(dev.task, dev.labels)[self.metric(task)]

    def to_json_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it, with means and deviations."""
        off = None if self.off is None else dataclasses.asdict(self.off)
        probes = [
            {
                "task": task,
                "states": state,
                "metric": self.metric(task),
                "rows": {data.split: len(data) for data in self.tasks[task]},
                "majority": self.majority(task),
                **_pair(self.before[task, state], self.after[task, state]),
            }
            for task, state in self.before
        ]
        found: dict[str, Any] = {"adapter_off": off, "probes": probes}
        if self.masked_before:
            losses = _pair(self.masked_before, self.masked_after)
            found["masked_tokens"] = {"texts": self.texts, **losses}
        return found


def _pair(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    differences = [new - old for old, new in zip(before, after, strict=True)]
    every = {"before": list(before), "after": list(after), "difference": differences}
    return {
        name: {
            "scores": values,
            "mean": spread(values).mean,
            "standard_deviation": spread(values).deviation,
        }
        for name, values in every.items()
    }


def forgetting_screen(found: Forgetting, title: str) -> str:
    """Return what the adapter off and on was found to be, in words and a table."""
    lines = [*textwrap.wrap(title, 80), "", *_off_lines(found.off)]
    seeds = len(next(iter(found.before.values())))
    deviation = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"
    lines += [
        "",
        *textwrap.wrap(
            "Adapter on: a linear probe on the frozen states of the last layer, of the same rows "
            f"before (the base) and after ({deviation}).",
            80,
        ),
        "",
        f"{'task':<9}{'metric':<10}{'states':<8}{'before':<16}{'after':<16}difference",
        "─" * 80,
    ]
    for (task, state), before in found.before.items():
        after = found.after[task, state]
        cells = [
            f"{task:<9.8}{found.metric(task):<10.9}{_STATES[state]:<8}",
            f"{_spread(before):<16}{_spread(after):<16}{_difference(before, after)}",
        ]
        lines.append("".join(cells))
    lines.append("─" * 80)
    for task, (train, dev) in found.tasks.items():
        lines.append(
            f"{task}: {len(train):,} rows of train, {len(dev):,} of dev; a constant answer has "
            f"{found.metric(task)} {number(found.majority(task))}"
        )
    if found.masked_before:
        lines += [
            "",
            *textwrap.wrap(
                f"Masked tokens: mean loss in nats, of {found.texts:,} texts. A seed draws which "
                "tokens are masked, the same before and after.",
                80,
            ),
            f"{'':<27}{'before':<16}{'after':<16}difference",
            f"{'':<27}{_spread(found.masked_before):<16}{_spread(found.masked_after):<16}"
            f"{_difference(found.masked_before, found.masked_after)}",
        ]
    if seeds > 1:
        lines += ["", "In brackets the 95 % interval of the difference, by a paired t-test."]
    return fitted("\n".join(map(str.rstrip, lines)), {})


def _off_lines(off: Off | None) -> list[str]:
    if off is None:
        return textwrap.wrap(
            "Adapter off: it cannot be, because the plan trains whole pre-trained modules. The "
            "base was loaded beside it.",
            80,
        )
    same = {True: "the base's, bit for bit", False: "NOT the base's"}
    return [
        "Adapter off:",
        f"  {'fingerprint':<30}{off.off[:12]}..., {same[off.base == off.off]}",
        f"  {f'hidden states of {off.texts} texts':<30}{same[off.states]}",
        f"  {'logits':<30}{same[off.logits]}",
    ]


def _spread(values: Sequence[float]) -> str:
    of = spread(values)
    mean = number(of.mean)
    return mean if of.deviation is None else f"{mean} ± {of.deviation:.3f}"


def _difference(before: Sequence[float], after: Sequence[float]) -> str:
    tested = paired_t_test(after, before)
    if tested is None:
        return f"{after[0] - before[0]:+.3f}"
    return f"{tested.difference:+.3f} [{tested.low:+.2f}, {tested.high:+.2f}]"

"""Count what trains in a model, and draw it as the paper's Figure 2 does."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import textwrap
from dataclasses import dataclass

from torch import nn

from spafit.bert import BertForSequenceClassification
from spafit.errors import one_line
from spafit.plans import MODULES, Plan, Stratum, Trained
from spafit.techniques import Technique

# Of a terminal, in columns.
_WIDTH = 80

# Of a bar in the drawing of the training's time.
_COLUMNS = 20

# The sub-layers of an encoder layer in the paper's Figure 1.
_SUBLAYERS = ("attention.self", "attention.output", "intermediate", "output")


@dataclass(frozen=True)
class GroupSummary:
    """What trains in one part of a model.

    Attributes
    ----------
    name : str
        ``"embeddings"``, the stratum's name, ``"pooler"`` or ``"classifier"``.
    layers : str
        Such as ``"5-9"``; empty if the part has no layers.
    trains : tuple of str
        What trains in each of attention.self, attention.output, intermediate and output, in words;
        one word for a part without layers.
    trainable : int
        The number of trainable parameters, counted from the model's ``requires_grad``.
    """

    name: str
    layers: str
    trains: tuple[str, ...]
    trainable: int


@dataclass(frozen=True)
class Summary:
    """What trains in a model; ``print(summary)`` draws it as the paper's Figure 2 does.

    The drawing takes at most 80 columns. Under it stand the rates, weight decays and dropout that a
    plan changes.

    Attributes
    ----------
    plan : Plan
        The plan.
    groups : tuple of GroupSummary
        Embeddings, strata, pooler, classifier.
    trainable : int
        The number of trainable parameters.
    pretrained : int
        The number of parameters before anything was added, the head's included.
    """

    plan: Plan
    groups: tuple[GroupSummary, ...]
    trainable: int
    pretrained: int

    @property
    def percent(self) -> float:
        """``trainable`` in percent of ``pretrained``."""
        return 100.0 * self.trainable / self.pretrained

    def __str__(self) -> str:
        return self.drawn()

    def drawn(self, epochs: int | None = None) -> str:
        """Return the drawing; when strata train is drawn for so many epochs.

        None is ten, or more if the plan's times take more.
        """
        rows = [
            ("", "layers", ("what trains",), "trainable", "%"),
            *(
                (
                    one_line(group.name),
                    group.layers,
                    group.trains,
                    f"{group.trainable:,}",
                    f"{100 * group.trainable / self.pretrained:.2f}",
                )
                for group in self.groups
            ),
            (
                "total",
                f"{self.plan.num_layers}",
                ("",),
                f"{self.trainable:,}",
                f"{self.percent:.2f}",
            ),
        ]
        # A name, or what trains, takes more lines where it would not fit.
        taken = sum(max(len(row[column]) for row in rows) for column in (1, 3, 4))
        names = min(max(len(row[0]) for row in rows), 12)
        trains = _WIDTH - taken - names - len("│  │  │  │  │  │")
        cells = [
            (textwrap.wrap(name, names), [layers], _in_lines(words, trains), [count], [share])
            for name, layers, words, count, share in rows
        ]
        widths = [max(len(line) for row in cells for line in row[column]) for column in range(5)]

        def drawn(row: tuple[list[str], ...]) -> str:
            lines = []
            for line in itertools.zip_longest(*row, fillvalue=""):
                aligned = [
                    cell.rjust(width) if column >= 3 else cell.ljust(width)
                    for column, (cell, width) in enumerate(zip(line, widths, strict=True))
                ]
                lines.append(f"│ {' │ '.join(aligned)} │")
            return "\n".join(lines)

        def rule(left: str, middle: str, right: str) -> str:
            return left + middle.join("─" * (width + 2) for width in widths) + right

        title = (
            f"{one_line(self.plan.name)}: {self.trainable:,} of {self.pretrained:,} numbers train "
            f"({percent_of(self.percent)} %)"
        )
        return "\n".join(
            [
                *textwrap.wrap(title, _WIDTH),
                rule("┌", "┬", "┐"),
                drawn(cells[0]),
                rule("├", "┼", "┤"),
                *map(drawn, cells[1:-1]),
                rule("├", "┼", "┤"),
                drawn(cells[-1]),
                rule("└", "┴", "┘"),
                *(
                    line
                    for note in _notes(self.plan)
                    for line in textwrap.wrap(note, _WIDTH, subsequent_indent="  ")
                ),
                *_timeline(self.plan, epochs),
            ]
        )


def summarise_plan(model: BertForSequenceClassification, plan: Plan, pretrained: int) -> Summary:
    """Return the summary of a model to which a plan was applied."""
    groups = [GroupSummary("embeddings", "", (plan.embeddings,), _count(model.bert.embeddings))]
    for stratum in plan.strata:
        layers = model.bert.encoder.layer[stratum.first : stratum.last + 1]
        groups.append(
            GroupSummary(
                stratum.name,
                stratum.layers,
                tuple(_in_words(stratum, sublayer) for sublayer in _SUBLAYERS),
                _count(layers),
            )
        )
    if model.bert.pooler is not None:
        groups.append(GroupSummary("pooler", "", (plan.pooler,), _count(model.bert.pooler)))
    groups.append(GroupSummary("classifier", "", ("full",), _count(model.classifier)))
    return Summary(plan, tuple(groups), _count(model), pretrained)


def percent_of(share: float) -> str:
    """Return a percentage with two decimals, or one digit that is not 0."""
    return f"{share:.2f}" if share >= 0.01 or share == 0 else f"{share:.1g}"


def _in_lines(trains: tuple[str, ...], width: int) -> list[str]:
    """Return a line for each sub-layer, or more if one is too wide; one line if all are equal."""
    if len(set(trains)) == 1:
        return textwrap.wrap(trains[0], width) or [""]
    lines = []
    for sublayer, words in zip(_SUBLAYERS, trains, strict=True):
        line = f"{sublayer:<{max(map(len, _SUBLAYERS))}} {words}"
        if len(line) <= width:
            lines.append(line)
            continue
        lines.append(sublayer)
        for each in re.split("(?<=,) ", words):
            if lines[-1] != sublayer and len(f"{lines[-1]} {each}") <= width:
                lines[-1] += f" {each}"
                continue
            lines += textwrap.wrap(each, width, initial_indent="  ", subsequent_indent="  ")
    return lines


# A setting that has not its default, in words.
_SAID = {
    "rate": "learning rate × {:g}",
    "b_rate": "B at {:g} times A's rate",
    "weight_decay": "weight decay {:g}",
    "dropout": "dropout {:g}",
    "alpha": "alpha {:g}",
    "activation": "activation {}",
    "scaling": "scaled by {:g}",
}


def _said(thing: Stratum | Technique) -> str:
    """Return the settings in _SAID that have not their defaults."""
    default = {each.name: each.default for each in dataclasses.fields(thing)}
    return ", ".join(
        words.format(getattr(thing, name))
        for name, words in _SAID.items()
        if name in default and getattr(thing, name) != default[name]
    )


def _notes(plan: Plan) -> list[str]:
    """Return what a plan changes of rates, weight decay and dropout, a line for each place."""
    notes = []
    if plan.rate_decay != 1:
        notes.append(f"each layer learns at {plan.rate_decay:g} of the rate of the one above it")
    for stratum in plan.strata:
        name, said = one_line(stratum.name), _said(stratum)
        if said:
            notes.append(f"{name}: {said}")
        modules: dict[Technique, list[str]] = {}
        for module, techniques in stratum.train.items():
            for each in techniques:
                modules.setdefault(each, []).append(module.removeprefix("layer."))
        captions = [each.caption for each in modules]
        for each in modules:
            where = f" ({' '.join(modules[each])})" if captions.count(each.caption) > 1 else ""
            if said := _said(each):
                notes.append(f"{name}, {each.caption}{where}: {said}")
    return notes


def _timeline(plan: Plan, epochs: int | None) -> list[str]:
    """Draw when each stratum trains, if the plan says so; a bar stands for the whole training."""
    if not any(stratum.is_timed for stratum in plan.strata):
        return []
    times = [when for stratum in plan.strata for when in (stratum.thaw, stratum.freeze)]
    in_epochs = [when for when in times if isinstance(when, (int, float))]
    if epochs is None:
        epochs = math.ceil(max([9, *in_epochs])) + 1  # the paper's ten, or more if it takes more
    length = f", drawn for {epochs} epochs" if any(in_epochs) else ""
    names = [textwrap.shorten(one_line(each.name), 12, placeholder="...") for each in plan.strata]
    width = max(len("in time"), *map(len, names))
    lines = [f"{'in time':<{width}}  █ trains ░ frozen{length}"]
    for name, stratum in zip(names, plan.strata, strict=True):
        how = Trained(thaw=stratum.thaw, freeze=stratum.freeze)
        trains = [how.trains_at(each, _COLUMNS / epochs, _COLUMNS) for each in range(_COLUMNS)]
        bar = "".join("█" if each and stratum.train else "░" for each in trains)
        words = stratum.times.replace(" and ", ", ") or "trains throughout"
        lines.append(f"{name:<{width}}  {bar}  {words if stratum.train else 'frozen'}")
    return lines


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _in_words(stratum: Stratum, sublayer: str) -> str:
    """Return what trains in a sub-layer: ``"bias"``, ``"LoRA r=64 (dense)"`` or ``"frozen"``."""
    prefix = f"layer.{sublayer}."
    modules = [path for path in MODULES if path.startswith(prefix)]
    by_words: dict[str, list[str]] = {}
    for module in modules:
        techniques = stratum.train.get(module, ())
        words = " + ".join(technique.caption for technique in techniques)
        by_words.setdefault(words, []).append(module.removeprefix(prefix))
    said = [
        words if len(names) == len(modules) else f"{words} ({' '.join(names)})"
        for words, names in by_words.items()
        if words
    ]
    said += [each.caption for each in stratum.train.get(f"layer.{sublayer}", ())]  # adapters
    return ", ".join(said) or "frozen"

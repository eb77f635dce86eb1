"""What trains in a model, counted and drawn as the paper's Figure 2."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from spafit.bert import BertForSequenceClassification
from spafit.errors import one_line
from spafit.plans import MODULES, Plan, Stratum

# The four sub-layers of the paper's Figure 2, and the modules of each.
_SUBLAYERS = ("attention.self", "attention.output", "intermediate", "output")


@dataclass(frozen=True)
class GroupSummary:
    """What trains in one part of a model.

    Attributes
    ----------
    name : str
        ``"embeddings"``, the stratum's name, ``"pooler"`` or ``"classifier"``.
    layers : str
        Such as ``"5-9"``; empty where the part has no layers.
    trains : tuple of str
        In words, for each of attention.self, attention.output, intermediate and output; one word
        for a part without layers.
    trainable : int
        Numbers that train, counted from the model's ``requires_grad``.
    """

    name: str
    layers: str
    trains: tuple[str, ...]
    trainable: int


@dataclass(frozen=True)
class Summary:
    """What trains in a model; ``print(summary)`` draws the paper's Figure 2 for it.

    Attributes
    ----------
    plan : Plan
        The plan.
    groups : tuple of GroupSummary
        Embeddings, strata, pooler, classifier.
    trainable : int
        Numbers that train.
    pretrained : int
        Numbers of the model before anything was added, its head included.
    """

    plan: Plan
    groups: tuple[GroupSummary, ...]
    trainable: int
    pretrained: int

    @property
    def percent(self) -> float:
        """Trainable numbers in percent of the model's own."""
        return 100.0 * self.trainable / self.pretrained

    def __str__(self) -> str:
        header = ("", "layers", *_SUBLAYERS, "trainable", "share")
        blank = ("",) * len(_SUBLAYERS)
        rows = [
            (
                one_line(group.name),
                group.layers,
                *(blank if len(group.trains) == 1 else group.trains),
                f"{group.trainable:,}",
                f"{100 * group.trainable / self.pretrained:.2f} %",
            )
            for group in self.groups
        ]
        share = f"{self.percent:.2f} %"
        total = ("total", f"{self.plan.num_layers}", *blank, f"{self.trainable:,}", share)
        widths = [max(map(len, column)) for column in zip(header, *rows, total, strict=True)]

        def line(cells: tuple[str, ...], across: str = "") -> str:
            aligned = [
                cell.rjust(width) if column >= 6 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            if across:  # one word for the part, across the columns of the four sub-layers
                aligned[2:6] = [f" {across} ".center(len(" │ ".join(aligned[2:6])), "·")]
            return "│ " + " │ ".join(aligned) + " │"

        def rule(left: str, middle: str, right: str) -> str:
            return left + middle.join("─" * (width + 2) for width in widths) + right

        return "\n".join(
            [
                f"{one_line(self.plan.name)}: {self.trainable:,} of {self.pretrained:,} numbers "
                f"train ({share})",
                rule("┌", "┬", "┐"),
                line(header),
                rule("├", "┼", "┤"),
                *(
                    line(row, group.trains[0] if len(group.trains) == 1 else "")
                    for group, row in zip(self.groups, rows, strict=True)
                ),
                rule("├", "┼", "┤"),
                line(total),
                rule("└", "┴", "┘"),
            ]
        )


def summarise_plan(model: BertForSequenceClassification, plan: Plan, pretrained: int) -> Summary:
    """Count what trains in a model to which a plan was applied."""
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


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _in_words(stratum: Stratum, sublayer: str) -> str:
    """Say what trains in one sub-layer: ``"bias"``, ``"LoRA r=64 (dense)"``, ``"frozen"``."""
    prefix = f"layer.{sublayer}."
    modules = [path for path in MODULES if path.startswith(prefix)]
    by_words: dict[str, list[str]] = {}
    for module in modules:
        techniques = stratum.train.get(module, ())
        words = " + ".join(technique.drawn for technique in techniques)
        by_words.setdefault(words, []).append(module.removeprefix(prefix))
    if list(by_words) == [""]:
        return "frozen"
    return ", ".join(
        words if len(names) == len(modules) else f"{words} ({' '.join(names)})"
        for words, names in by_words.items()
        if words
    )

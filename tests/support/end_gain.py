"""A technique of a user's own that trains a tensor of a module inside the one it is attached to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from spafit.adaptable import Adaptable, SublayerEnd
from spafit.plans import Plan, Stratum
from spafit.techniques import TECHNIQUES, Technique


@dataclass(frozen=True, repr=False)
class EndGain(Technique):
    """Trains the LayerNorm's weight, attached to the end of a sub-layer."""

    name: ClassVar[str] = "end-gain"
    short: ClassVar[str] = "end gain"
    trains: ClassVar[tuple[str, ...]] = ("LayerNorm.weight",)
    attaches_to: ClassVar[tuple[type[Adaptable], ...]] = (SublayerEnd,)

    def attach(self, module: Adaptable, generator: torch.Generator | None) -> Adaptable:
        return module


def end_gains(layers: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Return a plan of it for all layers; the technique is known until the test ends."""
    monkeypatch.setitem(TECHNIQUES, EndGain.name, EndGain)
    return Plan("ends", layers, [Stratum("all", 0, layers - 1, {"layer.output": [EndGain()]})])

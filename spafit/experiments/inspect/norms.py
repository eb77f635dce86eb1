"""How much was added to each place of a base: norms by layer and sub-layer.

Each is the Frobenius norm of what was added, beside that of what it was added to:

===================  =============================================  ===================
kind                 norm                                           beside
===================  =============================================  ===================
LoRA                 ‖s BA‖                                         ‖W‖
bias                 ‖δ‖, or of a bias that trained ‖b' - b‖        ‖b‖, of a LayerNorm ‖β‖
gain                 ‖δγ‖, or of a gain that trained ‖γ' - γ‖       ‖γ‖
weight               ‖W' - W‖, of a matrix that trained             ‖W‖
(IA)³                ‖l - 1‖                                        ‖1‖ = √n
series, parallel ..  ‖s UD‖, as if σ were not there                 ‖I‖ = √D
.. bias              ‖s b_u‖                                        ‖b‖ of the map before it
===================  =============================================  ===================

BA and UD are never formed. With the Gram matrices BᵀB and AAᵀ, which are only (r, r),

    ‖BA‖² = tr(AᵀBᵀBA) = tr((BᵀB)(AAᵀ)) = Σ_ij (BᵀB)_ij (AAᵀ)_ij

An adapter's map U σ(D z + b_d) + b_u is added to its sub-layer's H, whose own map is the identity
I; b_d stands inside of σ, and is added to nothing. What σ does to UD depends on the text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from spafit.adaptable import Adaptable
from spafit.adapters import Bottleneck, LoRALinear
from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError
from spafit.strata import pretrained_names

_LAYER = re.compile(r"bert\.encoder\.layer\.([0-9]+)\.(.+)")


@dataclass(frozen=True)
class Addition:
    """What was added to one tensor or map of the base.

    Attributes
    ----------
    layer : int or None
        The layer, from 0; None outside of the layers.
    place : str
        The module: within its layer, such as ``attention.self.query``, or ``embeddings.LayerNorm``.
    kind : str
        One of the table above; of a technique of your own "own" and the parameter's name.
    norm : float
        Of what was added.
    beside : float or None
        The norm of what it was added to; None for a technique of your own.
    """

    layer: int | None
    place: str
    kind: str
    norm: float
    beside: float | None

    @property
    def relative(self) -> float | None:
        """The norm over that beside it; None where nothing is, or zeros alone."""
        return self.norm / self.beside if self.beside else None


def norms(
    model: BertForSequenceClassification, base: BertForSequenceClassification
) -> list[Addition]:
    """Return the norms of all that a plan added to a base, in float64.

    The head is left out: it is new, and added to nothing.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model, trained.
    base : BertForSequenceClassification
        Its base, loaded beside it, for what was trained directly.

    Returns
    -------
    list of Addition
        In the order of the plan.

    Raises
    ------
    PlanError
        If the model was not adapted.
    """
    if model.adaptation is None:
        raise PlanError("the model was not adapted, so nothing was added to it")
    model.adaptation.require_enabled()
    pretrained = set(pretrained_names(model))
    found = []
    for name in model.adaptation.trainable:
        if name.startswith("classifier."):
            continue
        for owner, kind, norm, beside in _of(model, base, name, name in pretrained):
            within = _LAYER.fullmatch(owner)
            layer = None if within is None else int(within[1])
            place = owner.removeprefix("bert.") if within is None else within[2]
            found.append(Addition(layer, place, kind, norm, beside))
    return found


def product_norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """Return ‖BA‖, of B (out, r) and A (r, in), from BᵀB and AAᵀ (r, r), in float64."""
    B, A = B.detach().double(), A.detach().double()
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


def _of(
    model: BertForSequenceClassification,
    base: BertForSequenceClassification,
    name: str,
    is_pretrained: bool,
) -> list[tuple[str, str, float, float | None]]:
    """Return module, kind, norm and what it stands beside, of a parameter that trained."""

    def get(name: str) -> torch.Tensor:
        return model.get_parameter(name).detach().double()

    owner, _, last = name.rpartition(".")
    value = get(name)
    if is_pretrained:
        before = base.get_parameter(name).detach().double().to(value.device)
        kind = "gain" if owner.endswith("LayerNorm") and last == "weight" else last
        return [(owner, kind, _norm(value - before), _norm(before))]
    if last == "lora_A":
        lora = model.get_submodule(owner)
        assert isinstance(lora, LoRALinear)
        size = lora.scaling * product_norm(get(f"{owner}.lora_B"), value)
        return [(owner, "LoRA", size, _norm(get(f"{owner}.weight")))]
    if name.endswith((".bias_delta.delta", ".gain_delta.delta")):
        owner, child, _ = name.rsplit(".", 2)
        kind, of = ("bias", "bias") if child == "bias_delta" else ("gain", "weight")
        return [(owner, kind, _norm(value), _norm(get(f"{owner}.{of}")))]
    if name.endswith(".ia3.l"):
        owner = owner.removesuffix(".ia3")
        return [(owner, "(IA)³", _norm(value - 1), math.sqrt(len(value)))]
    adapter = re.fullmatch(r"(.+)\.adapters\.(.+)\.(down|up)\.(weight|bias)", name)
    if adapter is not None:
        end, kind, which, last = adapter.groups()
        bottleneck = model.get_submodule(f"{end}.adapters.{kind}")
        assert isinstance(bottleneck, Bottleneck)
        s = bottleneck.technique.scaling
        if which == "up" and last == "weight":
            down = get(name.replace(".up.", ".down."))
            return [(end, kind, s * product_norm(value, down), math.sqrt(len(value)))]
        if which == "up":
            return [(end, f"{kind} bias", s * _norm(value), _norm(get(f"{end}.dense.bias")))]
        return []
    if last == "lora_B":
        return []
    while owner and not isinstance(model.get_submodule(owner), Adaptable):
        owner = owner.rpartition(".")[0]
    return [(owner, f"own {name.removeprefix(f'{owner}.')}", _norm(value), None)]


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))

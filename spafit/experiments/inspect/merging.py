"""What merging loses: the merged model against the unmerged one, layer by layer, by type.

With W_d = round_d(W) the base in the type d, and Δ what was added to it (s BA, δ ...):

    unmerged_d:  the base and what was added, each in d      y = x W_dᵀ + s (x A_dᵀ) B_dᵀ + b_d
    merged_d:    W_d and Δ as one tensor in d                y = x round_d(W_d + Δ_d)ᵀ + b_d
    exact:       unmerged, in float64

Every state is computed in its own type by the plain form, which never adds BA to W by itself. An
addition is lost where it is below half a unit in the last place of what it is added to: its Δ is
not 0, and the merged value is the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from spafit.bert import BertForSequenceClassification, set_impl
from spafit.errors import PlanError
from spafit.text.tokenization import Encodings
from spafit.trunk.merging import merged_state_dict

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "float32": torch.float32}
"""The types by name."""

WARN_ABOVE = 0.01
"""The share of a tensor's additions that rounding may lose without a warning."""

_BATCH = 8


@dataclass(frozen=True)
class Lost:
    """How many elements of one tensor were added to, and how many of these rounding loses."""

    added: int
    lost: int

    @property
    def share(self) -> float:
        """Of the elements that were added to."""
        return self.lost / self.added if self.added else 0.0


@dataclass(frozen=True)
class Merging:
    """The error of a merged model in one type.

    Attributes
    ----------
    dtype : str
        A key of :data:`DTYPES`.
    apart, unmerged, merged : tuple of float, (L + 2,)
        ‖merged_d - unmerged_d‖, ‖unmerged_d - exact‖ and ‖merged_d - exact‖, each over the norm of
        the exact ones: of the hidden states of all tokens after the embeddings and after each
        layer, and last of the logits.
    largest : float
        The largest difference of a logit, merged_d - unmerged_d.
    lost : dict of str to Lost
        By the name of each tensor that something is added to.
    """

    dtype: str
    apart: tuple[float, ...]
    unmerged: tuple[float, ...]
    merged: tuple[float, ...]
    largest: float
    lost: Mapping[str, Lost]

    @property
    def share(self) -> float:
        """The share of all additions that rounding loses."""
        every = self.lost.values()
        return Lost(sum(each.added for each in every), sum(each.lost for each in every)).share

    @property
    def warning(self) -> str:
        """What rounding loses, and what to do, where it is more than :data:`WARN_ABOVE`, or ""."""
        over = {name: each for name, each in self.lost.items() if each.share > WARN_ABOVE}
        if not over:
            return ""
        worst = max(over, key=lambda name: over[name].share)
        return (
            f"in {self.dtype} merging loses {self.share:.1%} of all additions to rounding, of "
            f"{worst} {over[worst].share:.1%}: merge in a wider type, or keep the adapter beside "
            "the base"
        )


def merging_errors(
    model: BertForSequenceClassification,
    encodings: Encodings,
    dtypes: Sequence[str] = tuple(DTYPES),
) -> list[Merging]:
    """Compare a model with its merged form, in each type.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model, which is not changed. It is copied, in float64 too.
    encodings : Encodings
        The texts that states and logits are of; all their float64 states are held at once.
    dtypes : sequence of str
        Keys of :data:`DTYPES`.

    Returns
    -------
    list of Merging

    Raises
    ------
    PlanError
        If the model was not adapted, or something was added that has no merged form.
    """
    if model.adaptation is None:
        raise PlanError("the model was not adapted, so there is nothing to merge")
    exact = _plain(copy.deepcopy(model).double())
    # What has no merged form is refused here, before anything takes time.
    added = {
        name: value != exact.get_parameter(name).detach()
        for name, value in merged_state_dict(exact).items()
    }
    added = {name: where for name, where in added.items() if bool(where.any())}
    rows = encodings.by_length(range(len(encodings)))
    batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    states = [_states(exact, encodings, some) for some in batches]
    del exact
    found = []
    for dtype in dtypes:
        unmerged = _plain(copy.deepcopy(model).to(DTYPES[dtype]))
        merged = _merged(unmerged)
        lost = {
            name: Lost(int(where.sum()), int((where & _same(merged, unmerged, name)).sum()))
            for name, where in added.items()
        }
        squares = torch.zeros(4, len(states[0]), dtype=torch.float64)
        largest = torch.zeros((), dtype=torch.float64)
        for some, E in zip(batches, states, strict=True):
            U, M = _states(unmerged, encodings, some), _states(merged, encodings, some)
            for place, (e, u, m) in enumerate(zip(E, U, M, strict=True)):
                for row, each in enumerate((m - u, u - e, m - e, e)):
                    squares[row, place] += float(each.square().sum())
            largest = largest.maximum((M[-1] - U[-1]).abs().max())  # NaN stays
        apart, error, merged_error = (squares[:3] / squares[3]).sqrt().tolist()
        errors = tuple(apart), tuple(error), tuple(merged_error)
        found.append(Merging(dtype, *errors, float(largest), lost))
    return found


def _plain(model: BertForSequenceClassification) -> BertForSequenceClassification:
    set_impl(model, "reference")
    return model.eval()


def _merged(model: BertForSequenceClassification) -> BertForSequenceClassification:
    """Return a model without techniques that has the merged tensors, in their type."""
    with torch.device("meta"):
        merged = BertForSequenceClassification(model.config, model.num_labels)
    merged.load_state_dict(merged_state_dict(model), assign=True)
    return _plain(merged)


def _same(
    merged: BertForSequenceClassification, unmerged: BertForSequenceClassification, name: str
) -> torch.Tensor:
    return merged.get_parameter(name).detach() == unmerged.get_parameter(name).detach()


def _states(
    model: BertForSequenceClassification, encodings: Encodings, rows: Sequence[int]
) -> list[torch.Tensor]:
    """Return the states of the real tokens (N, D) after each layer, and the logits, in float64."""
    batch = encodings.batch(rows).to(model.device)
    with torch.inference_mode():
        logits, states, _ = model(*batch, output_hidden_states=True)
    keep = batch.attention_mask.bool()
    return [*(each[keep].double() for each in states), logits.double()]

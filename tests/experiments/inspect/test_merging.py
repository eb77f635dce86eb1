"""The error of merging. Oracle: float64, and deltas planted to be too small for a type."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.tiny_bert import CONFIG, C, L, short, tiny_bert

from spafit.bert import BertForSequenceClassification, set_impl
from spafit.errors import PlanError
from spafit.experiments.inspect.merging import Merging, merging_errors
from spafit.methods import plan
from spafit.plans import Plan
from spafit.strata import adapt
from spafit.text.tokenization import Encodings
from spafit.trunk.merging import merged_state_dict

TEXTS = [[7, 3, 9, 11, 2], [5, 8], [1, 2, 3, 4, 5, 6, 7]]
ENCODINGS = Encodings(TEXTS, [[0] * len(each) for each in TEXTS], 0)
SPAFIT = short("SPAFIT-0-2-II")
DELTA = "bert.encoder.layer.4.intermediate.dense.bias"


def adapted(plan: Plan = SPAFIT, size: float = 0.05) -> BertForSequenceClassification:
    """Return a float32 model with what was added drawn at random."""
    model = tiny_bert(torch.float32)
    adapt(model, plan)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", ".delta")):
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def hidden(model: BertForSequenceClassification) -> list[torch.Tensor]:
    """Return the states of each text by itself, and its logits, in float64."""
    set_impl(model, "reference")
    found: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for text in TEXTS:
            logits, states, _ = model.eval()(torch.tensor([text]), output_hidden_states=True)
            found.append([each.double().flatten() for each in (*states, logits)])
    return [torch.cat(each) for each in zip(*found, strict=True)]


def by_dtype(found: list[Merging]) -> dict[str, Merging]:
    return {each.dtype: each for each in found}


def test_errors_are_those_of_float64() -> None:
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    found = by_dtype(merging_errors(model, ENCODINGS, ["bf16"]))["bf16"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    exact = hidden(copy.deepcopy(model).double())
    unmerged = copy.deepcopy(model).bfloat16()
    merged = BertForSequenceClassification(CONFIG, C).bfloat16()
    merged.load_state_dict(merged_state_dict(unmerged))
    E, U, M = exact, hidden(unmerged), hidden(merged)
    for place in range(L + 2):
        norm = E[place].norm()
        for name, difference in (
            ("apart", M[place] - U[place]),
            ("unmerged", U[place] - E[place]),
            ("merged", M[place] - E[place]),
        ):
            expected = float(difference.norm() / norm)
            # Products of a padded batch may be summed in another order, which bf16 shows.
            assert getattr(found, name)[place] == pytest.approx(expected, rel=0.2, abs=1e-3), name
    assert found.apart[:4] == (0.0, 0.0, 0.0, 0.0)  # deltas are summed in bf16 on both sides
    assert found.apart[4] > 1e-4
    assert found.largest > 0


def test_wider_types_err_less() -> None:
    found = by_dtype(merging_errors(adapted(), ENCODINGS))
    assert list(found) == ["fp16", "bf16", "float32"]
    logits = {name: each.merged[-1] for name, each in found.items()}
    assert logits["float32"] < 1e-5 < logits["fp16"] < logits["bf16"] < 0.1
    assert found["float32"].share < 1e-3 < found["fp16"].share < found["bf16"].share
    assert not found["float32"].warning


def test_a_planted_delta_is_lost_where_it_is_below_half_a_unit() -> None:
    """Half a unit in the last place of 1 is 2⁻⁸ in bf16, 2⁻¹¹ in fp16 and 2⁻²⁴ in float32."""
    model = adapted(size=0.0)
    module = model.get_submodule(DELTA.removesuffix(".bias"))
    planted = torch.tensor([0.0, 2.0**-10, 2.0**-7, 2.0**-13])
    with torch.no_grad():
        module.bias[:4] = 1.0
        module.bias_delta.delta[:4] = planted
    found = by_dtype(merging_errors(model, ENCODINGS))
    assert {name: each.lost.keys() for name, each in found.items()} == {
        name: {DELTA} for name in found
    }
    lost = {name: each.lost[DELTA] for name, each in found.items()}
    assert {name: (each.added, each.lost) for name, each in lost.items()} == {
        "fp16": (3, 1),
        "bf16": (3, 2),
        "float32": (3, 0),
    }
    assert found["bf16"].share == pytest.approx(2 / 3)
    assert f"in bf16 merging loses 66.7% of all additions to rounding, of {DELTA} 66.7%" in (
        found["bf16"].warning
    )
    assert not found["float32"].warning


def test_what_is_no_number_is_not_zero() -> None:
    """A logit that overflows in fp16, merged and unmerged, makes a difference of NaN."""
    model = adapted()
    with torch.no_grad():
        model.classifier.weight.mul_(1e9)
    found = by_dtype(merging_errors(model, ENCODINGS, ["fp16", "float32"]))
    assert math.isnan(found["fp16"].largest) and math.isfinite(found["float32"].largest)


def test_direct_training_leaves_nothing_to_merge() -> None:
    model = tiny_bert(torch.float32)
    adapt(model, short("bitfit", bias="direct"))
    [found] = merging_errors(model, ENCODINGS, ["bf16"])
    assert found.lost == {} and found.share == 0.0 and set(found.apart) == {0.0}


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(PlanError, match="has no merged form"):
        merging_errors(adapted(plan("houlsby", L)), ENCODINGS)
    with pytest.raises(PlanError, match="was not adapted"):
        merging_errors(tiny_bert(), ENCODINGS)

"""Norms of what was added. Oracle: the products themselves, formed, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from support.tiny_bert import CONFIG, L, mixed, short, tiny_bert
from torch import nn
from torch.linalg import vector_norm

import spafit
from spafit.adapters import LoRALinear
from spafit.bert import BertForSequenceClassification
from spafit.experiments.inspect.norms import Addition, norms, product_norm
from spafit.methods import plan
from spafit.plans import Plan, Stratum
from spafit.strata import adapt, pretrained_names
from spafit.techniques import TECHNIQUES


def trained(
    plan: Plan | str,
) -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    """Return a model whose trained tensors were moved at random, and its base."""
    model, base = tiny_bert(), tiny_bert()
    adapt(model, plan)
    assert model.adaptation is not None
    with torch.no_grad():
        for name in model.adaptation.trainable:
            parameter = model.get_parameter(name)
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    return model.requires_grad_(False), base.requires_grad_(False)


def by_place(found: list[Addition]) -> dict[tuple[int | None, str, str], Addition]:
    every = {(each.layer, each.place, each.kind): each for each in found}
    assert len(every) == len(found)
    return every


def test_of_lora_deltas_and_direct_training() -> None:
    model, base = trained(mixed())
    found = by_place(norms(model, base))
    layers, of_base = model.bert.encoder.layer, base.bert.encoder.layer
    query = layers[0].attention.self.query
    assert isinstance(query, LoRALinear)
    expected = {
        (0, "attention.self.query", "LoRA"): (
            query.scaling * query.lora_B @ query.lora_A,
            query.weight,
        ),
        (0, "attention.self.query", "bias"): (query.bias_delta.delta, query.bias),
        (0, "intermediate.dense", "weight"): (
            layers[0].intermediate.dense.weight - of_base[0].intermediate.dense.weight,
            of_base[0].intermediate.dense.weight,
        ),
        (5, "output.dense", "bias"): (
            layers[5].output.dense.bias - of_base[5].output.dense.bias,
            of_base[5].output.dense.bias,
        ),
        (None, "pooler.dense", "weight"): (
            model.bert.pooler.dense.weight - base.bert.pooler.dense.weight,
            base.bert.pooler.dense.weight,
        ),
    }
    for place, (change, beside) in expected.items():
        assert found[place].norm == pytest.approx(float(vector_norm(change)), rel=1e-12)
        assert found[place].beside == pytest.approx(float(vector_norm(beside)), rel=1e-12)
        ratio = float(vector_norm(change) / vector_norm(beside))
        assert found[place].relative == pytest.approx(ratio, rel=1e-12)
    assert {each[2] for each in found} == {"LoRA", "bias", "weight"}
    assert len(found) == 9  # 4 of layer 0, 1 of layer 4, 2 of layer 5, 2 of the pooler


@pytest.mark.parametrize("method", ["houlsby", "parallel"])
def test_of_bottlenecks(method: str) -> None:
    model, base = trained(plan(method, L))
    kind = {"houlsby": "series"}.get(method, method)
    found = by_place(norms(model, base))
    assert len(found) == 2 * 2 * L
    for place, end in (
        ("attention.output", model.bert.encoder.layer[3].attention.output),
        ("output", model.bert.encoder.layer[3].output),
    ):
        adapter = end.adapters[kind]
        s = adapter.technique.scaling
        assert s == (4.0 if kind == "parallel" else 1.0)
        product = float(vector_norm(s * adapter.up.weight @ adapter.down.weight))
        assert found[3, place, kind].norm == pytest.approx(product, rel=1e-12)
        assert found[3, place, kind].beside == math.sqrt(CONFIG.hidden_size)
        bias = found[3, place, f"{kind} bias"]
        assert bias.norm == pytest.approx(s * float(vector_norm(adapter.up.bias)), rel=1e-12)
        assert bias.beside == pytest.approx(float(vector_norm(end.dense.bias)), rel=1e-12)


def test_of_ia3_and_gains() -> None:
    train = {"query": [spafit.IA3()], "layer.output.LayerNorm": [spafit.LayerNormGain()]}
    model, base = trained(
        Plan("two", L, [Stratum("low", 0, L - 2), Stratum("top", L - 1, L - 1, train)])
    )
    found = by_place(norms(model, base))
    layer = model.bert.encoder.layer[L - 1]
    scale = found[L - 1, "attention.self.query", "(IA)³"]
    assert scale.norm == pytest.approx(float(vector_norm(layer.attention.self.query.ia3.l - 1)))
    assert scale.beside == math.sqrt(CONFIG.hidden_size)
    gain = found[L - 1, "output.LayerNorm", "gain"]
    assert gain.norm == pytest.approx(float(vector_norm(layer.output.LayerNorm.gain_delta.delta)))
    assert gain.beside == pytest.approx(float(vector_norm(layer.output.LayerNorm.weight)))
    assert len(found) == 2


def test_of_full_fine_tuning_everything_but_the_head() -> None:
    model, base = trained("full")
    found = norms(model, base)
    names = [each for each in pretrained_names(model) if not each.startswith("classifier.")]
    assert len(by_place(found)) == len(names)
    assert {each.kind for each in found} == {"weight", "bias", "gain"}
    assert {each.place for each in found if each.layer is None} >= {
        "embeddings.word_embeddings",
        "embeddings.LayerNorm",
        "pooler.dense",
    }


def test_an_untrained_adapter_adds_nothing_and_zeros_have_no_share() -> None:
    model, base = tiny_bert(), tiny_bert()
    with torch.no_grad():
        for each in (model, base):
            each.bert.encoder.layer[5].output.dense.bias.zero_()
    adapt(model, short("bitfit"))
    found = by_place(norms(model, base))
    assert {each.norm for each in found.values()} == {0.0}
    assert found[5, "output.dense", "bias"].relative is None
    assert found[4, "output.dense", "bias"].relative == 0.0


def test_no_product_is_formed() -> None:
    """BA would take 3 TiB here."""
    out, size, r = 600_000, 700_000, 2
    B, A = torch.ones(out, r), torch.full((r, size), 0.5)
    assert product_norm(B, A) == pytest.approx(math.sqrt(out * size), rel=1e-12)


def test_of_a_technique_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gained(spafit.LayerNorm):
        def __init__(self, norm: spafit.LayerNorm) -> None:
            nn.Module.__init__(self)
            self.take_over(norm)
            self.gain = nn.Parameter(torch.zeros_like(norm.weight))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + self.gain)

    @dataclass(frozen=True, repr=False)
    class Gain(spafit.Technique):
        """Scale the output of a LayerNorm."""

        name: ClassVar[str] = "own-gain"
        short: ClassVar[str] = "gain"
        trains: ClassVar[tuple[str, ...]] = ("gain",)
        attaches_to = (spafit.LayerNorm,)

        def attach(self, module: spafit.LayerNorm, generator: object) -> Gained:
            return Gained(module)

    monkeypatch.setitem(TECHNIQUES, "own-gain", Gain)
    train = {"layer.output.LayerNorm": [Gain()]}
    model, base = trained(Plan("own", L, [Stratum("all", 0, L - 1, train)]))
    found = norms(model, base)
    assert len(found) == L
    assert {(each.place, each.kind) for each in found} == {("output.LayerNorm", "own gain")}
    gain = model.bert.encoder.layer[0].output.LayerNorm.gain
    assert found[0].norm == pytest.approx(float(vector_norm(gain)))
    assert found[0].relative is None


def test_a_model_that_was_not_adapted_is_refused() -> None:
    with pytest.raises(spafit.errors.PlanError, match="was not adapted"):
        norms(tiny_bert(), tiny_bert())

"""The flat forward pass of a model that only predicts.

Oracle: the model's own forward pass, in float64 to 1e-12; in bf16 the error of autocast's, twice of
which is allowed.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from support.tiny_bert import CONFIG, ROWS, C, L, some_steps, tiny_bert

from spafit.adaptable import Linear
from spafit.adapters import BiasDelta, LayerNormGain
from spafit.bert import BertForSequenceClassification, set_impl
from spafit.errors import ConfigError
from spafit.kernels import products
from spafit.kernels.products import LIBRARY_VARIABLE, LaidOut, library, product
from spafit.layout import Packed, PackedBatch
from spafit.machine.precision import autocast
from spafit.methods import plan
from spafit.plans import Plan, Stratum
from spafit.strata import adapt, adapters_disabled, use
from spafit.trunk.flat import FlatModel, why_not_flat
from spafit.trunk.merging import merge

NORMS = {"layer.output.LayerNorm": [LayerNormGain(), BiasDelta()]}
PLANS = {
    **{row: ROWS[row][0] for row in ("spafit ii", "spafit direct", "mixed", "full", "bitfit")},
    "ia3": plan("ia3", L),
    "norms": Plan("norms", L, [Stratum("all", 0, L - 1, NORMS)]),
}


def packed(lengths: tuple[int, ...] = (2, 3, 3, 11, 17), seed: int = 0) -> PackedBatch:
    layout = Packed(lengths)
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.rows,)
    ids = torch.randint(CONFIG.vocab_size, shape, generator=generator)
    positions = torch.cat([torch.arange(each) for each in (*lengths, layout.filler)])
    return PackedBatch(ids, torch.randint(2, shape, generator=generator), positions, layout)


def plain(model: BertForSequenceClassification, batch: PackedBatch) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_packed(batch)


def trained(row: str = "spafit ii", dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_bert()
    adapt(model, PLANS[row], name="a", num_labels=C)
    some_steps(model, 2)
    return model.to(dtype).eval()


class TestFlatModel:
    @pytest.mark.parametrize("row", PLANS)
    def test_computes_what_the_model_does(self, row: str) -> None:
        model = trained(row)
        flat = FlatModel(model)
        for batch in (packed(), packed((1,)), packed((17,) * 5, seed=1)):
            torch.testing.assert_close(flat(batch), plain(model, batch), rtol=0, atol=1e-12)

    def test_a_model_of_one_layer_and_one_that_was_never_adapted(self) -> None:
        model = tiny_bert(config=dataclasses.replace(CONFIG, num_hidden_layers=1))
        expected = plain(model, packed())
        torch.testing.assert_close(FlatModel(model)(packed()), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("of", ["onednn", "mkl"])
    def test_float32_by_either_library(self, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(LIBRARY_VARIABLE, of)
        library.cache_clear()
        try:
            model = trained(dtype=torch.float32)
            flat = FlatModel(model)
            assert flat._pooler.by_onednn == (of == "onednn")
        finally:
            monkeypatch.undo()
            library.cache_clear()
        found = flat(packed())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, plain(model, packed()), rtol=0, atol=1e-5)

    def test_bf16_errs_at_most_twice_as_much_as_autocast(self) -> None:
        model = trained(dtype=torch.float32)
        flat = FlatModel(model, torch.bfloat16)
        ours, theirs = [], []
        for seed in range(20):
            batch = packed(seed=seed)
            right = plain(model, batch).double()
            with autocast("bf16", torch.device("cpu")):
                theirs.append(plain(model, batch).double() - right)
            ours.append(flat(batch).double() - right)
        errors = [float(torch.cat(each).norm()) for each in (ours, theirs)]
        assert 0 < errors[0] < 2 * errors[1]

    def test_the_model_stays_as_it_is(self) -> None:
        """And may use another adapter, or none."""
        model = trained()
        before, shown = copy.deepcopy(model.state_dict()), plain(model, packed())
        flat = FlatModel(model)
        found = flat(packed())
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
        assert torch.equal(plain(model, packed()), shown)
        use(model, None)
        assert not torch.equal(plain(model, packed()), shown)
        assert torch.equal(flat(packed()), found)

    def test_a_batch_is_checked(self) -> None:
        ids = torch.full((5,), CONFIG.vocab_size)
        with pytest.raises(ConfigError, match="input_ids must lie in"):
            FlatModel(tiny_bert())(packed((2, 3))._replace(input_ids=ids))


class Doubled(Linear):
    """Computes something of its own, and says of no merged form."""

    def __init__(self, linear: Linear) -> None:
        torch.nn.Module.__init__(self)
        self.take_over(linear)

    def affine(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().affine(x)


def double(model: BertForSequenceClassification) -> None:
    layer = model.bert.encoder.layer[2]
    layer.output.dense = Doubled(layer.output.dense)


CHANGES: dict[str, Any] = {
    "a hook of a layer": lambda m: m.bert.encoder.layer[3].register_forward_hook(lambda *_: None),
    "a hook of a map": lambda m: m.bert.pooler.dense.register_forward_pre_hook(lambda *_: None),
    "a hook of a delta": lambda m: m.bert.encoder.layer[
        2
    ].output.dense.bias_delta.register_forward_hook(lambda *_: None),
    "a forward of its own": lambda m: setattr(m.bert.encoder, "forward", m.bert.encoder.forward),
    "another forward_packed": lambda m: setattr(m, "forward_packed", m.forward_packed),
    "another class": lambda m: setattr(m.bert, "pooler", torch.nn.Identity()),
    "another map": double,
    "its plain form": lambda m: set_impl(m, "reference"),
    "a form that was asked for": lambda m: set_impl(m, "triton"),
    "half precision": lambda m: m.half(),
    "an adapter in the end of a sub-layer": lambda m: adapt(
        m, plan("houlsby", L), name="b", num_labels=C
    ),
}


class TestWhyNot:
    @pytest.mark.parametrize("change", CHANGES)
    def test_what_may_compute_something_else(self, change: str) -> None:
        model = trained(dtype=torch.float32)
        assert why_not_flat(model) == ""
        CHANGES[change](model)
        assert why_not_flat(model)

    def test_adapters_that_are_off(self) -> None:
        model = trained()
        with adapters_disabled(model):
            assert why_not_flat(model)
        assert not why_not_flat(model)

    def test_a_hook_of_all_modules(self) -> None:
        hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            assert why_not_flat(tiny_bert())
        finally:
            hook.remove()

    def test_what_is_merged_already(self) -> None:
        model = trained()
        expected = plain(model, packed())
        merge(model)
        assert not why_not_flat(model)
        torch.testing.assert_close(FlatModel(model)(packed()), expected, rtol=0, atol=1e-12)


class TestLaidOut:
    """Oracle: the product of the matrix as it is."""

    @pytest.mark.skipif(not products.has_onednn(), reason="this PyTorch has no oneDNN")
    @pytest.mark.parametrize("gelu", [False, True])
    @pytest.mark.parametrize("rows", [1, 7, 130])
    def test_float32(self, rows: int, gelu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(products, "library", lambda: "onednn")
        x, W, b = torch.randn(rows, 37), torch.randn(20, 37), torch.randn(20)
        laid_out = LaidOut(W, b, torch.float32)
        assert laid_out.weight.layout == torch._mkldnn  # type: ignore[attr-defined]
        expected = product(x, W, b)
        expected = torch.nn.functional.gelu(expected) if gelu else expected
        torch.testing.assert_close(laid_out(x, gelu), expected, rtol=0, atol=1e-5 * 37**0.5)

    def test_where_there_is_no_onednn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(products, "has_onednn", lambda: False)
        x, W, b = torch.randn(7, 37), torch.randn(20, 37), torch.randn(20)
        found = LaidOut(W, b, torch.bfloat16)(x.bfloat16(), gelu=True)
        expected = torch.nn.functional.gelu(x @ W.T + b)
        assert 0 < (found - expected).abs().max() < 0.2

"""Which hidden states may be kept and reused: everything that they depend on is in the key.

Oracle: the same run without a cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.small_runs import N_DEV, N, SmallRun, read_log
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization

from spafit.adapters import BiasDelta, BottleneckAdapter, ParallelAdapter, SeriesAdapter
from spafit.bert import BertForSequenceClassification, set_impl
from spafit.plans import Plan, Stratum
from spafit.techniques import TECHNIQUES, register
from spafit.training.fit import Result
from spafit.training.prefix.kept import prefix_key, why_not_kept

Model = BertForSequenceClassification

# One batch an epoch: the states are computed in the batch that reads them, so that all is equal bit
# for bit.
RUN: dict[str, Any] = {"epochs": 2, "batch_size": N, "frozen_dropout": False}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have the cache in a folder of the test's own."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


def same(one: Result, other: Result) -> bool:
    return (one.losses, one.history) == (other.losses, other.history)


class TestFrozenAfterTraining:
    """Layers that were trained and then frozen stand in group 1 with what training gave them."""

    def trained_first(self, small: SmallRun, learning_rate: float) -> Model:
        model = small.model()
        small.fit(model, epochs=1, learning_rate=learning_rate)
        for layer in model.bert.encoder.layer[:3]:
            layer.requires_grad_(False)
        assert model.bert.frozen_depth == 3
        return model

    @pytest.mark.parametrize("where", ["memory", "disk"])
    def test_another_model_of_the_same_base_reads_none_of_its_states(
        self, small: SmallRun, computed: list[int], where: str
    ) -> None:
        small.fit(self.trained_first(small, 1e-2), cache_prefix=where, **RUN)
        computed.clear()
        ours = small.fit(self.trained_first(small, 3e-2), cache_prefix=where, **RUN)
        assert sum(computed) == N + N_DEV
        assert same(ours, small.fit(self.trained_first(small, 3e-2), **RUN))

    def test_the_same_model_reads_them(self, small: SmallRun, computed: list[int]) -> None:
        first = small.fit(self.trained_first(small, 1e-2), cache_prefix="disk", **RUN)
        computed.clear()
        assert same(small.fit(self.trained_first(small, 1e-2), cache_prefix="disk", **RUN), first)
        assert computed == []


class TestKey:
    """Oracle: what changes the hidden states, listed here."""

    def key(self, model: Model) -> Any:
        return prefix_key(model, "1" * 64, dtype="float32", precision="float32")

    def frozen(self, small: SmallRun) -> Model:
        model = small.model()
        model.bert.encoder.layer[2].requires_grad_(False)
        model.bert.encoder.layer[1].requires_grad_(False)
        return model

    @pytest.mark.parametrize(
        "name",
        [
            "bert.embeddings.position_embeddings.weight",
            "bert.embeddings.LayerNorm.bias",
            "bert.encoder.layer.0.attention.self.value.weight",
            "bert.encoder.layer.1.output.LayerNorm.bias_delta.delta",
            "bert.encoder.layer.2.attention.self.query.lora_B",
            "bert.encoder.layer.2.output.dense.bias_delta.delta",
        ],
    )
    def test_every_value_below_the_first_layer_that_trains(
        self, small: SmallRun, name: str
    ) -> None:
        model = self.frozen(small)
        before = self.key(model)
        assert self.key(self.frozen(small)) == before
        with torch.no_grad():
            model.get_parameter(name).flatten()[-1] += 1e-3
        assert self.key(model) != before

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: setattr(layer.output.LayerNorm, "eps", 1e-3),
            lambda layer: setattr(layer.attention.self, "num_heads", 2),
            lambda layer: setattr(layer.attention.self.query, "scaling", 2.0),
            lambda layer: setattr(layer.attention.self.query, "adapters_on", False),
            lambda layer: set_impl(layer, "reference"),
            lambda layer: layer.intermediate.dense.to(torch.bfloat16),
            lambda layer: layer.register_buffer("shift", torch.ones(3)),
        ],
        ids=["eps", "heads", "scaling", "disabled", "form", "type", "buffer"],
    )
    def test_every_setting(self, small: SmallRun, change: Callable[[nn.Module], object]) -> None:
        model = self.frozen(small)
        before = self.key(model)
        change(model.bert.encoder.layer[2])
        assert self.key(model) != before

    def test_nothing_above_it(self, small: SmallRun) -> None:
        model = self.frozen(small)
        before = self.key(model)
        model.train()
        with torch.no_grad():
            for part in (model.bert.encoder.layer[3], model.bert.pooler, model.classifier):
                assert part is not None
                for parameter in part.parameters():
                    parameter.add_(1.0)
        assert self.key(model) == before


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x


def hook(place: Callable[[Model], nn.Module]) -> Callable[[Model], object]:
    return lambda model: place(model).register_forward_hook(lambda module, x, y: 1.5 * y)


def pre_hook(model: Model) -> None:
    dense = model.bert.encoder.layer[0].intermediate.dense
    dense.register_forward_pre_hook(lambda module, x: (1.5 * x[0],))


def own_forward(model: Model) -> None:
    pooled = model.bert.encoder.layer[0].attention.output
    before = pooled.forward
    pooled.forward = lambda *inputs: 1.5 * before(*inputs)


def own_method(model: Model) -> None:
    dense = model.bert.encoder.layer[0].output.dense
    before = dense.part
    dense.part = lambda: before()._replace(bias=1.5 * dense.bias + 0.5)


def own_module(model: Model) -> None:
    layer = model.bert.encoder.layer[0]
    layer.output.dropout = Doubled()


def own_class(model: Model) -> None:
    norm = model.bert.embeddings.LayerNorm

    class Shifted(type(norm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.5  # type: ignore[no-any-return]

    norm.__class__ = Shifted


def parametrized(model: Model) -> None:
    register_parametrization(model.bert.encoder.layer[0].output.dense, "weight", Doubled())


WATCHED = {
    "a hook on a layer": hook(lambda model: model.bert.encoder.layer[0]),
    "a hook on a linear map": hook(lambda model: model.bert.encoder.layer[0].attention.self.key),
    "a hook on the embeddings": hook(lambda model: model.bert.embeddings),
    "a hook on a table": hook(lambda model: model.bert.embeddings.word_embeddings),
    "a hook before a linear map": pre_hook,
    "a forward of its own": own_forward,
    "another method of its own": own_method,
    "a module of the user's": own_module,
    "a class of the user's": own_class,
    "a parametrization": parametrized,
}


@pytest.fixture(scope="module")
def unchanged(small: SmallRun) -> Result:
    """Run a model that nobody changed."""
    return small.fit(**RUN)


class TestWatched:
    """Oracle: the same run without a cache, on a model that was changed in the same way."""

    @pytest.mark.parametrize(
        ("name", "where"),
        [
            # Where it would be kept is chosen after why it is not: the kinds take turns.
            pytest.param(name, where, marks=pytest.mark.full if number % 2 else ())
            for first, where in enumerate(("memory", "disk"))
            for number, name in enumerate(WATCHED, first)
        ],
    )
    def test_is_computed_every_time(
        self,
        small: SmallRun,
        unchanged: Result,
        tmp_path: Path,
        folder: Path,
        name: str,
        where: str,
    ) -> None:
        ours, theirs, change = small.model(), small.model(), WATCHED[name]
        for model in (ours, theirs):
            change(model)
        kept = small.fit(ours, cache_prefix=where, out=tmp_path / "run", **RUN)
        assert same(kept, small.fit(theirs, **RUN))
        assert not same(kept, unchanged)  # else this test would see nothing
        assert not folder.exists()
        notes = [row["note"] for row in read_log(tmp_path / "run", "note")]
        assert any("computed every time" in note for note in notes), notes

    def test_a_hook_is_called_in_every_epoch(self, small: SmallRun) -> None:
        calls = []
        model = small.model()
        model.bert.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
        small.fit(model, cache_prefix="disk", **RUN)
        assert len(calls) == 4  # a batch of train and one of dev in each of two epochs

    def test_a_hook_of_all_modules(self, small: SmallRun) -> None:
        assert why_not_kept(small.model()) == ""
        handle = register_module_forward_hook(lambda module, x, y: None)
        try:
            assert "hook" in why_not_kept(small.model())
        finally:
            handle.remove()

    def test_above_group_1_nothing_matters(self, small: SmallRun, computed: list[int]) -> None:
        models = [small.model(), small.model()]
        for model in models:
            hook(lambda model: model.bert.encoder.layer[1])(model)
        kept = small.fit(models[0], cache_prefix="disk", **RUN)
        assert sum(computed) == N + N_DEV
        assert same(kept, small.fit(models[1], **RUN))


class TestOuterAutocast:
    """Oracle: the same run without an autocast around it."""

    @pytest.mark.parametrize("where", ["off", "memory", "disk"])
    def test_changes_nothing_and_leaves_no_other_states(
        self, small: SmallRun, computed: list[int], where: str
    ) -> None:
        plain = small.fit(**RUN)
        for context in (torch.autocast("cpu", dtype=torch.bfloat16), contextlib.nullcontext()):
            with context:
                assert same(small.fit(cache_prefix=where, **RUN), plain)
        if where == "disk":
            assert sum(computed) == N + N_DEV  # once: the second run reads what the first one kept


class TestOwnAdapters:
    """A bottleneck's settings belong to the key; what one of a user's own gives is not kept."""

    def frozen(self, small: SmallRun, adapter: BottleneckAdapter) -> Model:
        low = Stratum("low", 0, 1, {"layer.output": [adapter]})
        plan = Plan("p", 4, [low, Stratum("high", 2, 3, {"query": [BiasDelta()]})])
        model = small.model(plan)
        model.bert.encoder.layer[:2].requires_grad_(False)
        assert model.bert.frozen_depth == 2
        return model

    def test_settings_are_in_the_key(self, small: SmallRun) -> None:
        adapters = [
            SeriesAdapter(bottleneck=5),
            SeriesAdapter(bottleneck=5, activation="relu"),
            SeriesAdapter(bottleneck=5, scaling=2.0),
            ParallelAdapter(bottleneck=5, activation="swish", scaling=1.0),
        ]
        keys = set()
        for adapter in adapters:
            model = self.frozen(small, adapter)
            assert not why_not_kept(model)
            keys.add(prefix_key(model, "1" * 64, dtype="float32", precision="float32"))
        assert len(keys) == len(adapters)

    def test_what_a_user_s_own_reads_is_not_known(self, small: SmallRun) -> None:
        before = dict(TECHNIQUES)
        try:

            @register
            @dataclass(frozen=True)
            class Twisted(SeriesAdapter):
                name: ClassVar[str] = "twisted"

                def reads(self, H: Any, X: Any, norm: Any) -> Any:
                    return -H

            reason = why_not_kept(self.frozen(small, Twisted(bottleneck=5)))
            assert "computes Twisted, which is not spafit's own" in reason
        finally:
            TECHNIQUES.clear()
            TECHNIQUES.update(before)

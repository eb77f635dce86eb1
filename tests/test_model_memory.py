"""A forward pass changes no memory of the model, and tools that save or move it find all of it.

Query, key and value are adjacent in memory (:mod:`spafit.kernels.stacking`); these tests show that
other code need not know. Tests with several processes are in tests/test_shared_among_processes.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_model
from support.tensors import is_freed
from support.tiny_bert import CONFIG, L, batches, logits, mixed, short, some_steps, tiny_bert
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import AveragedModel

import spafit
from spafit.adaptable import Linear, project
from spafit.adapters import LoRALinear
from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError
from spafit.kernels.stacking import are_together
from spafit.strata import frozen_stored_in

QUERY = "bert.encoder.layer.4.attention.self.query"  # of the last layer Q is computed apart


def adapted(seed: int = 0, method: str = "SPAFIT-1-3-II") -> BertForSequenceClassification:
    """Return a small adapted model in which A and B matter."""
    model = tiny_bert(seed=seed)
    spafit.adapt(model, short(method), seed=seed)
    stir(model, seed)
    return model


def stir(model: nn.Module, seed: int = 0) -> None:
    """Change all that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter.dtype))


def memory_of(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return where every parameter's values, and its storage, begin, and the storage's size."""
    return {
        name: (
            parameter.data_ptr(),
            parameter.untyped_storage().data_ptr(),
            parameter.untyped_storage().nbytes(),
        )
        for name, parameter in model.named_parameters()
    }


def plain(model: nn.Module, seed: int = 3) -> torch.Tensor:
    """Return the logits of a model with these values that nothing was ever done to."""
    fresh = adapted(seed=7)
    fresh.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    spafit.set_impl(fresh, "reference")
    return logits(fresh, seed)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def lies_together(model: nn.Module, name: str = "weight") -> list[bool]:
    """Say of every layer whether the matrices of query, key and value lie side by side."""
    maps = [
        [getattr(layer.attention.self, n) for n in ("query", "key", "value")]
        for layer in model.bert.encoder.layer
    ]  # type: ignore[union-attr, operator]
    found = [[getattr(each, name, None) for each in three] for three in maps]
    return [are_together(three) for three in found if three[0] is not None]


class TestForward:
    """Oracle: the addresses of memory before."""

    @pytest.mark.parametrize("impl", ["auto", "fused", "reference"])
    @pytest.mark.parametrize(
        "plan", [short("SPAFIT-1-3-II"), short("full"), mixed()], ids=lambda plan: plan.name
    )
    def test_changes_no_memory(self, impl: str, plan: spafit.Plan) -> None:
        model = tiny_bert()
        spafit.set_impl(model, impl)
        before = memory_of(model)
        logits(model)
        assert memory_of(model) == before
        spafit.adapt(model, plan)
        before = memory_of(model)
        some_steps(model.train(), 2)
        logits(model.eval())
        assert memory_of(model) == before

    def test_the_triton_form_changes_none(self) -> None:
        attention = adapted().float().bert.encoder.layer[5].attention.self
        spafit.set_impl(attention, "triton")
        before = memory_of(attention)
        X = torch.randn(3, 20, requires_grad=True)
        project(X, [attention.query, attention.key, attention.value]).sum().backward()
        assert memory_of(attention) == before

    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_with_activation_checkpointing(self, impl: str) -> None:
        model = adapted()
        spafit.set_impl(model, impl)
        model.bert.encoder.recomputed = set(range(L))
        before = memory_of(model)
        some_steps(model.train(), 2)
        assert memory_of(model) == before

    def test_changes_no_memory_where_it_lies_apart(self) -> None:
        model = adapted()
        values = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(values, assign=True)
        assert not any(lies_together(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
        before = memory_of(model)
        some_steps(model.train(), 1)
        logits(model.eval())
        assert memory_of(model) == before

    def test_a_state_dict_of_before_stays_current(self) -> None:
        model = tiny_bert()
        spafit.adapt(model, short("SPAFIT-1-3-II"))
        state = model.state_dict()
        some_steps(model)
        assert all(torch.equal(state[name], p) for name, p in model.named_parameters())
        assert_equal(logits(model), plain(model))


class TestWhereTheyAreLaid:
    """Oracle: the addresses of memory: each matrix begins where the one before it ends."""

    @pytest.mark.parametrize(
        "handle",
        [
            lambda model: model,
            lambda model: model.float(),
            lambda model: model.to(torch.bfloat16),
            lambda model: copy.deepcopy(model),
            lambda model: pickle.loads(pickle.dumps(model)),
            lambda model: model.to("meta").to_empty(device="cpu"),
        ],
        ids=["adapted", "cast", "narrowed", "copied", "unpickled", "from meta"],
    )
    def test_side_by_side(
        self, handle: Callable[[BertForSequenceClassification], BertForSequenceClassification]
    ) -> None:
        model = handle(adapted())
        assert lies_together(model) == [True] * L
        assert lies_together(model, "lora_A") == [True] * 2
        assert lies_together(model, "lora_B") == [True] * 2
        storages = [storage for _, storage, _ in memory_of(model).values()]
        assert len(set(storages)) == len(storages)
        for parameter in model.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes

    def test_built_and_loaded(self, tiny: Path) -> None:
        assert all(lies_together(BertForSequenceClassification(CONFIG)))
        for dtype in (torch.float32, torch.bfloat16):
            model = spafit.load_pretrained(tiny, num_labels=2, dtype=dtype)
            assert all(lies_together(model))

    def test_while_the_frozen_are_stored_in_a_narrower_type(self) -> None:
        model = adapted()
        before = memory_of(model)
        with frozen_stored_in(model, torch.bfloat16):
            assert model.get_parameter(f"{QUERY}.weight").dtype == torch.bfloat16
            assert all(lies_together(model))
        assert memory_of(model) == before

    def test_moving_nothing_moves_nothing(self) -> None:
        model = adapted()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        before = memory_of(model)
        model.to("cpu").double()
        assert memory_of(model) == before

    def test_maps_of_different_rank_or_without_lora(self) -> None:
        lora = {"query": [spafit.LoRA(2, 3.0)], "value": [spafit.LoRA(5, 3.0)]}
        model = tiny_bert()
        spafit.adapt(model, spafit.Plan("two", L, [spafit.Stratum("all", 0, L - 1, lora)]))
        attention = model.bert.encoder.layer[2].attention.self
        assert are_together([attention.query.lora_A, attention.value.lora_A])
        some_steps(model)
        y = logits(model)
        spafit.set_impl(model, "reference")
        assert_equal(y, logits(model))


class TestSaving:
    """Oracle: the values in the model, and a matrix's size."""

    def test_torch_save_of_one_map_writes_one_map(self) -> None:
        model = adapted()
        logits(model)
        query = model.get_submodule(QUERY)
        file = io.BytesIO()
        torch.save(query.state_dict(), file)
        held = sum(value.nbytes for value in query.state_dict().values())
        overhead = io.BytesIO()  # what the same values take in tensors of their own
        torch.save({n: v.clone() for n, v in query.state_dict().items()}, overhead)
        assert held < len(file.getvalue()) <= len(overhead.getvalue()) + 256

    def test_safetensors(self, tmp_path: Path) -> None:
        model = adapted()
        logits(model)
        save_model(model, str(tmp_path / "m.safetensors"))
        assert load_file(tmp_path / "m.safetensors").keys() == model.state_dict().keys()
        other = adapted(seed=5)
        load_model(other, str(tmp_path / "m.safetensors"))
        assert_equal(logits(other), logits(model))
        assert_equal(logits(other), plain(model))

    def test_accelerate(self, tmp_path: Path) -> None:
        accelerate = pytest.importorskip("accelerate", reason="the package accelerate is missing")
        accelerator = accelerate.Accelerator(cpu=True)
        model = adapted()
        logits(model)
        accelerator.save_model(model, tmp_path / "model")
        saved = load_file(tmp_path / "model" / "model.safetensors")
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())

        expected = logits(model)
        prepared = accelerator.prepare(model)
        accelerator.save_state(tmp_path / "state")
        some_steps(model, 1)
        assert not torch.equal(logits(prepared), expected)
        accelerator.load_state(tmp_path / "state")
        assert torch.equal(logits(prepared), expected)

    def test_pickle_and_deepcopy(self) -> None:
        model = adapted()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            expected = logits(model)
            assert torch.equal(logits(other), expected)
            stir(other)
            assert torch.equal(logits(model), expected), "the copy is the model itself"
            assert_equal(logits(other), plain(other))


class TestFreed:
    """The last reference to a model is the last of its memory: it is part of no cycle.

    Python looks for cycles only now and then, and never because a GPU's memory runs short.
    """

    @pytest.mark.parametrize("method", ["full", "houlsby", "SPAFIT-1-3-II"])
    def test_adapted_and_trained(self, method: str) -> None:
        def made() -> nn.Module:
            model = tiny_bert()
            spafit.adapt(model, spafit.plan(method, L))
            some_steps(model, 1)
            return model

        assert is_freed(made)

    def test_several_adapters_used_mixed_and_merged(self) -> None:
        def made() -> nn.Module:
            model = tiny_bert()
            for name in ("one", "other"):
                spafit.adapt(model, short("SPAFIT-1-3-II"), name=name)
            spafit.use(model, "one")
            with spafit.adapters_disabled(model):
                logits(model)
            [(inputs, _)] = batches(1, seed=3)
            rows = ["one", "other"] * len(inputs["input_ids"])
            with torch.no_grad():
                spafit.forward_rows(model, rows[: len(inputs["input_ids"])], **inputs)
            spafit.merge(model)
            spafit.unmerge(model)
            return model

        assert is_freed(made)


class TestArrangedByTheUser:
    """Oracle: the reference form of a model with the same values, never rearranged."""

    def test_assigned_tensors_are_the_parameters(self) -> None:
        model = adapted()
        mine = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(mine, assign=True)
        assert_equal(logits(model), plain(model))
        mine[f"{QUERY}.weight"].mul_(1.5)
        mine[f"{QUERY}.lora_A"].mul_(-1.5)
        changed = logits(model)
        assert torch.equal(model.get_parameter(f"{QUERY}.lora_A"), mine[f"{QUERY}.lora_A"])
        assert_equal(changed, plain(model))

    def test_two_models_on_one_memory(self) -> None:
        """The second reads the first one's matrices, side by side as they are."""
        model = adapted()
        other = adapted(seed=5)
        other.load_state_dict(model.state_dict(), assign=True)
        assert all(lies_together(other))
        stir(model)
        assert torch.equal(logits(other), logits(model))

    def test_a_flat_vector(self) -> None:
        model = adapted()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        vector = parameters_to_vector(trained).detach().clone()
        vector_to_parameters(vector, trained)
        logits(model)
        vector.mul_(1.5)
        found = logits(model)
        assert torch.equal(parameters_to_vector(trained), vector)
        assert_equal(found, plain(model))

    def test_shared_memory_stays_shared(self) -> None:
        model = adapted().share_memory()
        logits(model)
        assert all(parameter.is_shared() for parameter in model.parameters())
        assert_equal(logits(model), plain(model))

    @pytest.mark.parametrize("name", ["weight", "lora_A"])
    def test_a_parametrized_map(self, name: str) -> None:
        class Doubled(nn.Module):
            def forward(self, tensor: torch.Tensor) -> torch.Tensor:
                return 2 * tensor

        model, twin = adapted(), adapted()
        register_parametrization(model.get_submodule(QUERY), name, Doubled())
        with torch.no_grad():
            twin.get_parameter(f"{QUERY}.{name}").mul_(2)
        assert_equal(logits(model), plain(twin))
        model.float().double()
        [(inputs, labels)] = batches(1)
        F.cross_entropy(model(**inputs), labels).backward()
        F.cross_entropy(twin(**inputs), labels).backward()
        ours = model.get_parameter(f"{QUERY}.parametrizations.{name}.original").grad
        theirs = twin.get_parameter(f"{QUERY}.{name}").grad
        assert (ours is None) == (theirs is None) == (name == "weight")
        if ours is not None and theirs is not None:
            # Rounded to float32 on the way.
            torch.testing.assert_close(ours, 2 * theirs, rtol=1e-4, atol=1e-5)

    def test_a_replaced_map(self) -> None:
        model = adapted()
        attention = model.bert.encoder.layer[0].attention.self
        key = nn.Linear(20, 20).double()
        attention.key = key  # type: ignore[assignment]
        expected = logits(model)
        assert torch.equal(logits(copy.deepcopy(model.double())), expected)

    def test_one_tensor_for_two_maps(self) -> None:
        model = tiny_bert()
        attention = model.bert.encoder.layer[0].attention.self
        attention.key.weight = attention.query.weight
        other = copy.deepcopy(model)
        assert torch.equal(logits(other), logits(model))
        tied = other.bert.encoder.layer[0].attention.self
        assert tied.key.weight is tied.query.weight


class TestAverages:
    """Oracle: the mean of the values, by hand."""

    def test_averaged_model(self) -> None:
        model = adapted()
        averaged = AveragedModel(model)
        values = []
        for seed in range(3):
            stir(model, seed)
            logits(model)
            averaged.update_parameters(model)
            values.append({n: p.detach().clone() for n, p in model.named_parameters()})
        for name, parameter in averaged.module.named_parameters():
            mean = sum(each[name] for each in values) / 3
            assert_equal(parameter, mean)  # type: ignore[arg-type]
        assert_equal(logits(averaged.module), plain(averaged.module))


class TestTransforms:
    """Oracle: autograd on the reference form."""

    def test_functional_call(self) -> None:
        model = adapted()
        [(inputs, _)] = batches(1)
        scaled = {n: 1.1 * p.detach() for n, p in model.named_parameters() if "lora" in n}
        before = memory_of(model)
        found = torch.func.functional_call(model, scaled, kwargs=inputs)
        assert memory_of(model) == before
        with torch.no_grad():
            for name, value in scaled.items():
                model.get_parameter(name).copy_(value)
        spafit.set_impl(model, "reference")
        assert_equal(found, model(**inputs))

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
    def test_grad(self, training: bool) -> None:
        model = adapted().train(training)  # the rates of dropout are 0
        [(inputs, labels)] = batches(1)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def loss_of(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            y = torch.func.functional_call(model, parameters, kwargs=inputs)
            return F.cross_entropy(y, labels)

        found, loss = torch.func.grad_and_value(loss_of)(trained)
        spafit.set_impl(model, "reference")
        expected = loss_of(trained)
        assert_equal(loss, expected)
        gradients = torch.autograd.grad(expected, list(trained.values()))
        for name, gradient in zip(trained, gradients, strict=True):
            assert_equal(found[name], gradient)

    def test_vmap_over_the_examples_of_a_layer(self) -> None:
        attention = adapted().bert.encoder.layer[5].intermediate
        X = torch.randn(3, 7, 20, dtype=torch.float64)
        assert_equal(torch.vmap(attention)(X), attention(X))

    def test_vmap_over_models(self) -> None:
        """An ensemble: maps whose values differ, in one call."""
        maps = [adapted(seed).get_submodule(QUERY) for seed in range(3)]
        assert all(isinstance(each, LoRALinear) for each in maps)
        parameters, _ = torch.func.stack_module_state(maps)
        x = torch.randn(7, 20, dtype=torch.float64)

        def apply(values: dict[str, torch.Tensor]) -> torch.Tensor:
            y: torch.Tensor = torch.func.functional_call(maps[0], values, (x,))
            return y

        found = torch.vmap(apply)(parameters)
        for y, each in zip(found, maps, strict=True):
            assert isinstance(each, Linear)
            assert_equal(y, each(x))

    @pytest.mark.parametrize("impl", ["fused", "triton"])
    def test_a_form_that_cannot_be_transformed_is_refused(self, impl: str) -> None:
        query = adapted().get_submodule(QUERY)
        spafit.set_impl(query, impl)
        X = torch.randn(3, 7, 20, dtype=torch.float64)
        with pytest.raises(ConfigError, match=rf"a linear map\(impl='{impl}'\).*torch.func"):
            torch.vmap(query)(X)


class TestCompiled:
    """Oracle: the eager form; no graph break."""

    def test_one_graph_with_matrices_apart_and_side_by_side(self) -> None:
        model = adapted()
        layer = model.bert.encoder.layer[5].attention.self
        X = torch.randn(7, 20, dtype=torch.float64)

        def project_all(X: torch.Tensor) -> torch.Tensor:
            return project(X, [layer.query, layer.key, layer.value])

        expected = project_all(X)
        compiled = torch.compile(project_all, fullgraph=True, backend="aot_eager")
        assert_equal(compiled(X), expected)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        assert_equal(compiled(X), expected)

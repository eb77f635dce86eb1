"""Several adapters on one model: loads, switches, steps, saves and removals in any order.

Oracle: the base before anything was attached, and for each adapter a model of its own that has
this adapter alone; all bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.tiny_bert import CONFIG, ROWS, L, batches, logits, some_steps, tiny_bert
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from spafit import strata
from spafit.adaptable import Adaptable, Dropout
from spafit.adapters import Bias
from spafit.bert import BertForSequenceClassification, set_impl
from spafit.errors import PlanError, WeightsError
from spafit.kernels.stacking import are_together
from spafit.methods import plan
from spafit.strata import adapt, adapters_disabled, fingerprint, remove_adapter, use
from spafit.weights.adapter_files import load_adapter, save_adapter

# Techniques of every kind: beside the maps, in their place, beside a sub-layer, in pre-trained
# tensors, in whole modules with the pooler, in the embeddings, and a dropout of its own.
PLANS = {
    "spafit": ROWS["spafit ii"][0],
    "direct": ROWS["spafit direct"][0],
    "mixed": ROWS["mixed"][0],
    "full": ROWS["full"][0],
    "series": plan("houlsby", L),
    "ia3": plan("ia3", L),
    "probe": plan("linear-probe", L),
}
LABELS = {"spafit": 2, "direct": 3, "mixed": 1, "full": 3, "series": 4, "ia3": 5, "probe": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the file of a trained adapter of each plan."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, one in PLANS.items():
        model = tiny_bert(torch.float32)
        adapt(model, one, name=name, num_labels=LABELS[name])
        steps(model, 2)
        save_adapter(model, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in PLANS}


def steps(model: BertForSequenceClassification, count: int, seed: int = 1) -> None:
    """Train what trains, by whatever head the model has."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for inputs, labels in batches(count, seed=seed):
        optimizer.zero_grad()
        loss: torch.Tensor = F.cross_entropy(model(**inputs), labels % model.num_labels)
        torch.autograd.backward(loss)
        optimizer.step()


def alone(path: Path, labels: int) -> BertForSequenceClassification:
    """Return a model with this adapter only."""
    model = tiny_bert(torch.float32)
    load_adapter(model, path, name="alone")
    assert model.num_labels == labels
    return model


def bits(model: BertForSequenceClassification) -> dict[str, bytes]:
    return {name: each.detach().numpy().tobytes() for name, each in model.named_parameters()}


class TestUse:
    def test_random_sequences(self, files: dict[str, Path], tmp_path: Path) -> None:
        base = tiny_bert(torch.float32)
        expected, pretrained = logits(base), bits(base)
        for seed in range(4):
            draw = random.Random(seed)
            model, twins = tiny_bert(torch.float32), {}
            for step in range(14):
                known = list(twins)
                used = None if model.adaptation is None else model.adaptation.name
                what = draw.choice(["load", "use", "use", "train", "save", "remove", "copy"])
                if what == "load" and (rest := sorted(PLANS.keys() - twins.keys())):
                    name = draw.choice(rest)
                    load_adapter(model, files[name], name=name)
                    twins[name] = alone(files[name], LABELS[name])
                elif what == "use":
                    use(model, draw.choice([None, *known]))
                elif what == "train" and used is not None:
                    steps(model, 1, seed=step)
                    steps(twins[used], 1, seed=step)
                elif what == "save" and used is not None:
                    save_adapter(model, tmp_path / "one.safetensors")
                    save_adapter(twins[used], tmp_path / "other.safetensors")
                    one, other = (tmp_path / f"{each}.safetensors" for each in ("one", "other"))
                    assert one.read_bytes() == other.read_bytes()
                elif what == "remove" and known:
                    remove_adapter(model, gone := draw.choice(known))
                    del twins[gone]
                elif what == "copy":
                    model = copy.deepcopy(model)
                used = model.adaptation
                shown = logits(model)
                assert torch.equal(shown, expected if used is None else logits(twins[used.name]))
                with adapters_disabled(model) if model.adaptations else torch.no_grad():
                    assert torch.equal(logits(model), expected)
                assert torch.equal(logits(model), shown)
            for name, twin in twins.items():
                use(model, name)
                assert torch.equal(logits(model), logits(twin))
                assert bits(model) == bits(twin)
            use(model, None)
            assert torch.equal(logits(model), expected)
            assert bits(model) == pretrained

    def test_copies_no_tensor(self, files: dict[str, Path]) -> None:
        model = tiny_bert(torch.float32)
        places = {}
        for name, path in files.items():
            load_adapter(model, path, name=name)
            places[name] = {key: each.data_ptr() for key, each in model.named_parameters()}
        for name in (*files, *reversed(files)):
            use(model, name)
            assert {k: each.data_ptr() for k, each in model.named_parameters()} == places[name]

    def test_k_adapters_take_the_memory_of_their_files_and_the_base_once(
        self, files: dict[str, Path]
    ) -> None:
        """Oracle: the bytes of the tensors in the files, and of the base."""
        model = tiny_bert(torch.float32)
        expected = sum(each.nbytes for each in model.parameters())
        for name, path in files.items():
            load_adapter(model, path, name=name)
            expected += sum(each.nbytes for each in load_file(path).values())
        for name in (None, *files):
            use(model, name)
            held = set(model.parameters())
            for adaptation in model.adaptations.values():
                held.update(*(each._parameters.values() for each in adaptation.modules()))
            storages = {each.untyped_storage().data_ptr(): each.nbytes for each in held - {None}}
            assert sum(storages.values()) == expected

    def test_a_switch_takes_less_than_a_millisecond(self) -> None:
        """For the number of modules of BERT-large; their sizes do not matter."""
        sizes = {"num_hidden_layers": 24, "hidden_size": 16, "num_attention_heads": 4}
        config = dataclasses.replace(CONFIG, **sizes)
        model = tiny_bert(torch.float32, config=config)
        for name in ("a", "b"):
            adapt(model, "SPAFIT-4-9-II", name=name)
        seconds = []
        for _ in range(60):
            for name in ("a", "b"):
                start = time.thread_time()
                use(model, name)
                seconds.append(time.thread_time() - start)
        assert statistics.median(seconds) < 1e-3

    def test_an_optimizer_trains_what_it_was_made_for(self) -> None:
        model = tiny_bert(torch.float32)
        for name in ("a", "b"):
            adapt(model, PLANS["direct"], name=name, seed=ord(name))
        use(model, "a")
        alone = tiny_bert(torch.float32)
        adapt(alone, PLANS["direct"], name="a", seed=ord("a"))
        optimizers = [
            torch.optim.SGD([each for each in one.parameters() if each.requires_grad], lr=0.1)
            for one in (model, alone)
        ]
        for one in (model, alone):
            [(inputs, labels)] = batches(1)
            torch.autograd.backward(F.cross_entropy(one(**inputs), labels))
        use(model, "b")
        other = bits(model)
        for optimizer in optimizers:
            optimizer.step()
        assert bits(model) == other
        use(model, "a")
        assert bits(model) == bits(alone)

    def test_mode_form_and_type_are_the_models(self, files: dict[str, Path]) -> None:
        model = tiny_bert(torch.float32)
        for name, path in files.items():
            load_adapter(model, path, name=name)
        use(model, None)
        model.train()
        set_impl(model, "reference")
        model.double()
        for name in files:
            use(model, name)
            assert all(each.training for each in model.modules())
            assert {getattr(each, "impl", "reference") for each in model.modules()} == {"reference"}
            assert {each.dtype for each in model.parameters()} == {torch.float64}
            load_adapter(single := tiny_bert(), files[name], name=name)
            set_impl(single, "reference")
            assert torch.equal(logits(model.eval()), logits(single))
            model.train()

    def test_a_plans_dropout_is_its_own(self) -> None:
        model = tiny_bert(torch.float32)
        spafit_plan = PLANS["spafit"]
        strata = [*spafit_plan.strata]
        strata[0] = dataclasses.replace(strata[0], dropout=0.25)
        adapt(model, dataclasses.replace(spafit_plan, strata=strata), name="a")
        layer = model.bert.encoder.layer[0]
        assert layer.dropout == (0.25, 0.25, 0.25)
        use(model, None)
        assert layer.dropout == (0.0, 0.0, 0.0)
        use(model, "a")
        assert layer.dropout == (0.25, 0.25, 0.25)

    def test_matrices_lie_side_by_side_wherever_the_model_goes(self) -> None:
        model = tiny_bert(torch.float32)
        for name in ("a", "b", "c"):
            adapt(model, PLANS["full" if name == "c" else "spafit"], name=name)
        for moved in (model, copy.deepcopy(model), model.double()):
            for name in ("a", "b", "c", None):
                use(moved, name)
                last = moved.bert.encoder.layer[-1].attention.self
                assert all(are_together(each) for each in last._matrices() if each)

    def test_what_is_refused(self, files: dict[str, Path], tmp_path: Path) -> None:
        model = tiny_bert(torch.float32)
        with pytest.raises(PlanError, match="no adapter 'rte'; load one"):
            use(model, "rte")
        load_adapter(model, files["spafit"], name="rte")
        load_adapter(model, files["full"], name="cola")
        for wrong in (lambda: use(model, "mrpc"), lambda: remove_adapter(model, "mrpc")):
            with pytest.raises(PlanError, match="no adapter 'mrpc'; it has 'rte', 'cola'"):
                wrong()
        with pytest.raises(PlanError, match="has an adapter 'rte' already"):
            load_adapter(model, files["ia3"], name="rte")
        for name in ("", "a\nb", 3):
            with pytest.raises(PlanError, match="name must be text"):
                load_adapter(model, files["ia3"], name=name)  # type: ignore[arg-type]
        with pytest.raises(PlanError, match=r"adapted already.*name of its own"):
            adapt(model, PLANS["ia3"])
        with adapters_disabled(model), pytest.raises(PlanError, match="leave the with block"):
            use(model, "rte")
        other = tiny_bert(torch.float32, seed=5)
        before = logits(other)
        load_adapter(model, files["ia3"], name="x")
        save_adapter(model, tmp_path / "x.safetensors")
        with pytest.raises(WeightsError, match="was trained on the base"):
            load_adapter(other, tmp_path / "x.safetensors", name="x")
        assert not other.adaptations
        assert torch.equal(logits(other), before)

    def test_an_adapter_without_a_name_may_be_one_of_several(self, files: dict[str, Path]) -> None:
        model = tiny_bert(torch.float32)
        adapt(model, PLANS["direct"])
        some_steps(model, 1)
        trained = logits(model)
        load_adapter(model, files["full"], name="full")
        use(model, "default")
        assert torch.equal(logits(model), trained)
        use(model, None)
        assert fingerprint(model) == fingerprint(tiny_bert(torch.float32))

    def test_one_that_trained_the_base_itself_stands_alone(self, files: dict[str, Path]) -> None:
        model = tiny_bert(torch.float32)
        adapt(model, PLANS["full"])
        some_steps(model, 1)
        before = bits(model)
        for refused in (
            lambda: use(model, None),
            lambda: load_adapter(model, files["ia3"], name="ia3"),
            lambda: adapt(model, PLANS["ia3"], name="ia3"),
            lambda: remove_adapter(model, "default"),
        ):
            with pytest.raises(PlanError, match="the model before training is gone"):
                refused()
        assert bits(model) == before and list(model.adaptations) == ["default"]

    def test_adapting_that_fails_changes_nothing(
        self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_bert(torch.float32)
        load_adapter(model, files["spafit"], name="spafit")
        before, shown = bits(model), logits(model)
        attach, calls = strata.attach_all, []

        def short_of_memory(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 5:
                raise MemoryError
            return attach(*arguments)

        monkeypatch.setattr(strata, "attach_all", short_of_memory)
        with pytest.raises(MemoryError):
            adapt(model, PLANS["ia3"], name="ia3")
        assert bits(model) == before and list(model.adaptations) == ["spafit"]
        assert torch.equal(logits(model), shown)


class Calls:
    """Counts the calls of a hook that is a method of it."""

    def __init__(self) -> None:
        self.number = 0

    def count(self, *_: Any) -> None:
        self.number += 1


class _Tripled(nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return 3 * tensor


class TestWhatAUserDoesToTheModules:
    @pytest.mark.parametrize("path", ["classifier", "bert.pooler", "bert.encoder.layer.4.output"])
    def test_hooks_from_before_are_called_and_can_be_removed(self, path: str) -> None:
        model, calls = tiny_bert(torch.float32), Calls()
        hook = model.get_submodule(path).register_forward_hook(calls.count)
        for name in ("mixed", "series"):
            adapt(model, PLANS[name], name=name)
            logits(model)
        assert calls.number == 2
        hook.remove()
        for name in ("mixed", None):
            use(model, name)
            logits(model)
        assert calls.number == 2

    def test_a_hook_of_a_technique_is_not_the_bases(self, monkeypatch: pytest.MonkeyPatch) -> None:
        attach = Bias.attach

        def with_hook(self: Bias, module: Adaptable, generator: torch.Generator) -> Adaptable:
            module.register_forward_hook(lambda module, _, y: 3 * y)
            return attach(self, module, generator)

        model = tiny_bert(torch.float32)
        before = logits(model)
        monkeypatch.setattr(Bias, "attach", with_hook)
        adapt(model, PLANS["spafit"], name="a")
        assert not torch.equal(logits(model), before)
        use(model, None)
        assert torch.equal(logits(model), before)

    def test_a_replaced_forward_computes_with_the_adapter(self) -> None:
        model = tiny_bert(torch.float32)
        linear = model.bert.encoder.layer[1].output.dense
        forward = type(linear).forward
        linear.forward = MethodType(lambda self, x: 3 * forward(self, x), linear)
        before = logits(model)
        adapt(model, PLANS["spafit"], name="a")
        assert torch.equal(logits(model), before)
        some_steps(model, 1)
        delta = model.bert.encoder.layer[1].output.dense.bias_delta
        assert delta is not None and bool(delta.delta.any())
        use(model, None)
        assert torch.equal(logits(model), before)

    def test_a_forward_that_may_keep_to_the_base_is_refused(self) -> None:
        model = tiny_bert(torch.float32)
        linear = model.bert.encoder.layer[1].output.dense
        plain = linear.forward
        linear.forward = lambda x: 3 * plain(x)  # type: ignore[method-assign]
        before = logits(model)
        with pytest.raises(PlanError, match="replace it after adapting"):
            adapt(model, PLANS["spafit"])
        assert torch.equal(logits(model), before) and not model.adaptations
        assert all(each.requires_grad for each in model.parameters())

    def test_a_module_that_compiles_itself(self) -> None:
        model = tiny_bert(torch.float32)
        end = model.bert.encoder.layer[1].output
        call = end._call_impl
        end._compiled_call_impl = lambda *inputs: call(*inputs)  # as by end.compile()
        before = logits(model)
        adapt(model, PLANS["series"], name="a")
        some_steps(model, 1)
        up = model.get_parameter("bert.encoder.layer.1.output.adapters.series.up.weight")
        assert up.grad is not None
        use(model, None)
        assert torch.equal(logits(model), before)

    def test_a_module_of_another_kind_is_refused(self) -> None:
        model = tiny_bert(torch.float32)
        model.bert.encoder.layer[3].output.dense = nn.Linear(37, 20)
        with pytest.raises(PlanError, match=r"3\.output\.dense was replaced by a Linear"):
            adapt(model, PLANS["spafit"])

    def test_parametrizations_stay_where_they_were_put(self, files: dict[str, Path]) -> None:
        model = tiny_bert(torch.float32)
        for name in ("spafit", "direct"):
            load_adapter(model, files[name], name=name)
        shown = {}
        for name in ("spafit", None):
            use(model, name)
            register_parametrization(
                model.bert.encoder.layer[4].intermediate.dense, "weight", _Tripled()
            )
            shown[name] = logits(model)
        for name in ("spafit", "direct", None, "spafit"):
            use(model, name)
            assert name == "direct" or torch.equal(logits(model), shown[name])

    @pytest.mark.parametrize("where", ["direct", None])
    def test_replaced_modules_stay_where_they_were_put(
        self, files: dict[str, Path], where: str | None
    ) -> None:
        model = tiny_bert(torch.float32)
        for name in ("spafit", "direct"):
            load_adapter(model, files[name], name=name)
        use(model, where)
        dense = copy.deepcopy(model.bert.encoder.layer[4].output.dense)
        dense.weight.data *= 3
        model.bert.encoder.layer[4].output.dense = dense
        model.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 2)).eval()
        shown = logits(model)
        use(model, "spafit")
        set_impl(model, "reference")
        model.double().train()
        use(model, where)
        assert all(each.training for each in model.modules())
        assert {getattr(each, "impl", "reference") for each in model.modules()} == {"reference"}
        assert {each.dtype for each in model.parameters()} == {torch.float64}
        found = logits(model.eval())
        torch.testing.assert_close(found, shown.double(), atol=1e-5, rtol=1e-5)
        adapt(model, PLANS["direct"], name="new", num_labels=3)  # beside a head of a user's own
        assert model.num_labels == 3

    def test_gradients_and_buffers_move_with_the_model(self) -> None:
        model = tiny_bert(torch.float32)
        adapt(model, PLANS["spafit"], name="a")
        model.classifier.register_buffer("seen", torch.ones(2))
        [(inputs, labels)] = batches(1)
        torch.autograd.backward(F.cross_entropy(model(**inputs), labels))
        adapt(model, PLANS["direct"], name="b")
        model.double()
        use(model, "a")
        assert model.classifier.seen.dtype == torch.float64
        gradients = {each.grad.dtype for each in model.parameters() if each.grad is not None}
        assert gradients == {torch.float64}

    def test_dropout_has_no_form_that_it_lacks(self, files: dict[str, Path]) -> None:
        model = tiny_bert(torch.float32)
        load_adapter(model, files["full"], name="full")
        use(model, None)
        set_impl(model, "triton")
        for name in ("full", None):
            use(model, name)
            found = {each.impl for each in model.modules() if isinstance(each, Dropout)}
            assert found == {"auto"}


def test_none_of_several_is_in_use(files: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_bert(torch.float32)
    load_adapter(model, files["spafit"], name="a")
    use(model, None)
    for needs_one in (
        lambda: save_adapter(model, tmp_path / "a.safetensors"),
        lambda: strata.summarise(model),
    ):
        with pytest.raises(PlanError, match="no adapter is in use; choose one of 'a'"):
            needs_one()


class TestDisabled:
    def test_nothing_is_used_where_the_pretrained_model_is_promised(
        self, files: dict[str, Path]
    ) -> None:
        model = tiny_bert(torch.float32)
        load_adapter(model, files["spafit"], name="a")
        use(model, None)
        with adapters_disabled(model):
            for change in (
                lambda: use(model, "a"),
                lambda: adapt(model, PLANS["ia3"], name="b"),
            ):
                with pytest.raises(PlanError, match="leave the with block"):
                    change()
        use(model, "a")

    def test_another_thread_switches(self, files: dict[str, Path]) -> None:
        """Between the choice of what is switched off and the switching off, nobody else comes."""
        model = tiny_bert(torch.float32)
        for name in ("spafit", "direct"):
            load_adapter(model, files[name], name=name)
        expected = logits(tiny_bert(torch.float32))
        stop = threading.Event()

        def switch() -> None:
            while not stop.is_set():
                for name in ("spafit", "direct", None):
                    with contextlib.suppress(PlanError):
                        use(model, name)

        other = threading.Thread(target=switch)
        other.start()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for _ in range(40):
                with adapters_disabled(model):
                    assert torch.equal(logits(model), expected)
        finally:
            stop.set()
            other.join()
            sys.setswitchinterval(interval)
        for name in ("spafit", "direct"):
            use(model, name)
            assert torch.equal(logits(model), logits(alone(files[name], LABELS[name])))

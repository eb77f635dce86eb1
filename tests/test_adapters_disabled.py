"""Blocks of ``adapters_disabled`` that nest, overlap and end in any order.

Oracle: the base's logits while any block lasts; after the last, every tensor and switch as before,
bit for bit.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_bert import HEAD, ROWS, logits, some_steps, tiny_bert

from spafit import strata
from spafit.adaptable import Adaptable
from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError
from spafit.strata import adapt, adapters_disabled
from spafit.weights.adapter_files import load_adapter, save_adapter

ROW_NAMES = ("spafit ii", "spafit direct")


@pytest.fixture(scope="module", params=ROW_NAMES)
def trained_once(request: pytest.FixtureRequest) -> BertForSequenceClassification:
    model = tiny_bert(torch.float32)
    adapt(model, ROWS[request.param][0])
    some_steps(model, 2)
    return model


@pytest.fixture
def model(trained_once: BertForSequenceClassification) -> BertForSequenceClassification:
    return copy.deepcopy(trained_once)


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    return logits(tiny_bert(torch.float32))


def picture(model: BertForSequenceClassification) -> dict[str, object]:
    """Return every tensor's bits and place and every switch."""
    tensors = {
        name: (each.detach().numpy().tobytes(), each.data_ptr())
        for name, each in model.named_parameters()
    }
    switches = {
        name: each.adapters_on
        for name, each in model.named_modules()
        if isinstance(each, Adaptable)
    }
    return {**tensors, "switches": switches}


@pytest.mark.parametrize("seed", range(12))
def test_in_random_orders(
    model: BertForSequenceClassification, base: torch.Tensor, seed: int
) -> None:
    draw = random.Random(seed)
    before, learned, blocks = picture(model), logits(model), []
    for _ in range(10):
        if blocks and draw.random() < 0.5:
            block = blocks.pop(draw.randrange(len(blocks)))
            block.__exit__(None, None, None)
        else:
            blocks.append(adapters_disabled(model))
            blocks[-1].__enter__()
        assert torch.equal(logits(model), base if blocks else learned)
        assert (picture(model) == before) == (not blocks)
    draw.shuffle(blocks)
    for block in blocks:
        block.__exit__(None, None, None)
    assert picture(model) == before
    assert model.adaptation is not None
    assert model.adaptation.disabled == 0
    assert not model.adaptation.set_aside


def test_in_generators(model: BertForSequenceClassification, base: torch.Tensor) -> None:
    """One is left half read and closed after the other."""

    def shown() -> Iterator[torch.Tensor]:
        with adapters_disabled(model):
            while True:
                yield logits(model)

    before, one, two = picture(model), shown(), shown()
    assert torch.equal(next(one), base)
    assert torch.equal(next(two), base)
    one.close()
    assert torch.equal(next(two), base)
    two.close()
    assert picture(model) == before


def test_ended_by_the_garbage_collector_while_another_begins(
    trained_once: BertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator that nobody finished ends its block wherever the collector happens to run."""
    model, other = copy.deepcopy(trained_once), copy.deepcopy(trained_once)
    before = picture(other)

    def shown() -> Iterator[None]:
        with adapters_disabled(other):
            yield

    unfinished = [shown()]
    next(unfinished[0])
    switch_off = strata._switch_off

    def collecting(*arguments: Any) -> None:
        unfinished.clear()
        switch_off(*arguments)

    def begin() -> None:
        with adapters_disabled(model):
            pass

    monkeypatch.setattr(strata, "_switch_off", collecting)
    thread = threading.Thread(target=begin, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert picture(other) == before


def test_an_adapter_is_not_loaded_inside(
    model: BertForSequenceClassification, tmp_path: Path
) -> None:
    """Its head would be written over at the end of the block."""
    save_adapter(model, tmp_path / "adapter.safetensors")
    before = picture(model)
    with (
        adapters_disabled(model),
        pytest.raises(PlanError, match="disabled here; leave the with block first"),
    ):
        load_adapter(model, tmp_path / "adapter.safetensors")
    assert picture(model) == before


def test_in_threads(model: BertForSequenceClassification, base: torch.Tensor) -> None:
    before, faults = picture(model), []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(20):
            with adapters_disabled(model):
                if draw.random() < 0.2 and not torch.equal(logits(model), base):
                    faults.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert picture(model) == before


def test_the_second_thread_to_begin_is_the_last_to_end(
    model: BertForSequenceClassification,
) -> None:
    before, begun, go_on = picture(model), threading.Event(), threading.Event()

    def first() -> None:
        with adapters_disabled(model):
            begun.set()
            go_on.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    with adapters_disabled(model):
        go_on.set()
        thread.join()
    assert picture(model) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_cast_inside_holds_for_the_whole_model(
    model: BertForSequenceClassification, overwrite: bool
) -> None:
    """Also for what was set aside, and where ``.to`` makes new parameters."""
    expected = copy.deepcopy(model).double()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        with adapters_disabled(model), adapters_disabled(model):
            model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    assert {each.dtype for each in model.parameters()} == {torch.float64}
    state = model.state_dict()
    assert all(torch.equal(state[name], each) for name, each in expected.state_dict().items())
    assert torch.equal(logits(model), logits(expected))


def test_what_the_user_switched_off_stays_off(model: BertForSequenceClassification) -> None:
    off = model.bert.encoder.layer[3].attention.get_submodule("self.query")
    off.adapters_on = False
    before = picture(model)
    with adapters_disabled(model), adapters_disabled(model):
        pass
    assert not off.adapters_on
    assert picture(model) == before


def test_what_the_user_moved_by_hand_stays(model: BertForSequenceClassification) -> None:
    with torch.no_grad():
        for name in HEAD:
            model.get_parameter(name).add_(0.5)
    before = picture(model)
    with adapters_disabled(model):
        assert not all(picture(model)[name] == before[name] for name in HEAD)
    assert picture(model) == before

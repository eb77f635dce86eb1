"""Predictions that run out of memory, and predictions that are stopped early."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.small_runs import N, SmallRun, undecided

from spafit.bert import BertForSequenceClassification
from spafit.errors import SpafitError, TrainingError
from spafit.layout import PackedBatch
from spafit.training.inference import AbandonedError, predict, predict_logits


@pytest.fixture(scope="module")
def model(small: SmallRun) -> BertForSequenceClassification:
    """Load a model that no test of this module changes."""
    return undecided(small, small.train)


def room_for(
    model: BertForSequenceClassification,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    error: Callable[[], BaseException],
) -> list[int]:
    """Have a model fail beyond some examples at a time; gives how many it was asked for."""
    asked: list[int] = []
    forward = model.forward_packed

    def greedy(batch: PackedBatch, prefix: torch.Tensor | None = None) -> torch.Tensor:
        asked.append(len(batch.layout.lengths))
        if asked[-1] > most:
            raise error()
        return forward(batch, prefix)

    monkeypatch.setattr(model, "forward_packed", greedy)
    return asked


def no_room() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")


class TestMemoryAtItsEnd:
    """Oracle: the same examples in batches of the size that fits from the start."""

    @pytest.mark.parametrize(
        ("batch_size", "most", "fits", "asked"),
        [
            (64, 25, 25, [25]),
            (64, 12, 12, [25, 12, 12, 1]),
            (64, 4, 3, [25, 12, 6, *[3] * 8, 1]),
            (8, 1, 1, [8, 4, 2, *[1] * 25]),
            (7, 3, 3, [7, *[3] * 8, 1]),
        ],
    )
    @pytest.mark.parametrize(
        "error",
        [
            no_room,
            lambda: MemoryError(),
            lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        ],
        ids=["gpu", "python", "host"],
    )
    def test_halved_until_it_fits(
        self,
        small: SmallRun,
        model: BertForSequenceClassification,
        monkeypatch: pytest.MonkeyPatch,
        error: Callable[[], BaseException],
        batch_size: int,
        most: int,
        fits: int,
        asked: list[int],
    ) -> None:
        """Every example once, where it belongs; no batch is tried that is known not to fit."""
        train = small.train
        encodings = small.tokenizer.encode(train.texts_a, train.texts_b, max_length=53)
        expected = predict_logits(model, encodings, batch_size=fits)
        found = room_for(model, monkeypatch, most, error)
        assert np.array_equal(predict_logits(model, encodings, batch_size=batch_size), expected)
        assert found == asked

    def test_not_even_for_one(self, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
        model = small.model().train()
        found = room_for(model, monkeypatch, 0, no_room)
        match = r"not enough memory for one example at a time \(CUDA out of memory\. .*--max-length"
        with pytest.raises(TrainingError, match=match) as caught:
            predict(model, small.tokenizer, small.train)
        assert "\n" not in str(caught.value)
        assert found == [25, 12, 6, 3, 1]
        assert model.training

    def test_other_errors_pass_through(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, error = small.model(), RuntimeError("CUDA error: device-side assert triggered")
        found = room_for(model, monkeypatch, 0, lambda: error)
        with pytest.raises(RuntimeError) as caught:
            predict(model, small.tokenizer, small.train)
        assert caught.value is error
        assert found == [25]


class TestAbandoned:
    """Oracle: the batches that were computed, counted."""

    @pytest.mark.parametrize("after", [0, 1, 3])
    def test_before_the_next_batch(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch, after: int
    ) -> None:
        model = small.model().train()
        train = small.train
        encodings = small.tokenizer.encode(train.texts_a, train.texts_b, max_length=53)
        found = room_for(model, monkeypatch, N, no_room)
        with pytest.raises(AbandonedError):
            predict_logits(model, encodings, batch_size=6, abandoned=lambda: len(found) == after)
        assert found == [6] * after
        assert model.training

    def test_asked_before_every_batch_and_never_again(
        self, small: SmallRun, model: BertForSequenceClassification
    ) -> None:
        train = small.train
        encodings = small.tokenizer.encode(train.texts_a, train.texts_b, max_length=53)
        asked: list[int] = []

        def abandoned() -> bool:
            asked.append(1)
            return False

        expected = predict_logits(model, encodings, batch_size=6)
        found = predict_logits(model, encodings, batch_size=6, abandoned=abandoned)
        assert np.array_equal(found, expected)
        assert len(asked) == 5

    def test_none_of_spafits_errors(self) -> None:
        """It is for the caller, who asked for it; nobody else is to meet it."""
        assert not issubclass(AbandonedError, SpafitError)

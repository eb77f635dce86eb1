"""Predictions of a file part by part, by a model that is merged once.

Oracle: the parts predicted one by one; and counts of what is held meanwhile.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import SmallRun, make_dataset, undecided

from spafit.errors import DataError
from spafit.tasks.task import Dataset
from spafit.training import inference
from spafit.training.inference import Predictor, predict
from spafit.trunk.flat import FlatModel

PARTS, ROWS = 9, 7


def parts(count: int = PARTS) -> Iterator[Dataset]:
    return (make_dataset("rte", ROWS, seed=seed) for seed in range(count))


class TestPredictor:
    @pytest.mark.parametrize("precision", ["float32", "bf16"])
    def test_a_stream_is_its_parts_bit_for_bit(self, small: SmallRun, precision: str) -> None:
        model = undecided(small, small.train)
        predictor = Predictor(model, small.tokenizer, precision=precision)
        found = list(predictor.stream(parts()))
        assert len(found) == PARTS
        for (part, predicted), expected in zip(found, parts(), strict=True):
            assert part == expected
            alone = Predictor(model, small.tokenizer, precision=precision).predict(expected)
            assert np.array_equal(predicted.logits, alone.logits)
            assert predicted.labels == alone.labels

    def test_merged_once(self, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[torch.dtype] = []

        class Counted(FlatModel):
            def __init__(self, model: object, dtype: torch.dtype) -> None:
                made.append(dtype)
                super().__init__(model, dtype)  # type: ignore[arg-type]

        monkeypatch.setattr(inference, "FlatModel", Counted)
        predictor = Predictor(small.model(), small.tokenizer, precision="bf16")
        assert len(list(predictor.stream(parts(3)))) == 3
        predictor.predict(small.dev)
        assert made == [torch.bfloat16]

    def test_without_merging_the_model_itself_computes(self, small: SmallRun) -> None:
        model = undecided(small, small.train)
        merged, plain = (
            Predictor(model, small.tokenizer, merges=merges) for merges in (True, False)
        )
        assert plain.flat is None
        assert isinstance(merged.flat, FlatModel)
        difference = merged.predict(small.dev).logits - plain.predict(small.dev).logits
        assert np.abs(difference).max() < 1e-5

    def test_predict_merges_for_many_examples(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, merged = undecided(small, small.train), list[bool]()
        predict_logits = inference.predict_logits

        def noted(*given: Any, flat: FlatModel | None, **settings: Any) -> Any:
            merged.append(flat is not None)
            return predict_logits(*given, flat=flat, **settings)

        monkeypatch.setattr(inference, "predict_logits", noted)
        monkeypatch.setattr(inference, "WORTH_MERGING", len(small.dev))
        few = dataclasses.replace(small.dev, examples=small.dev.examples[:-1])
        for data in (small.dev, few):
            predict(model, small.tokenizer, data)
        assert merged == [True, False]

    def test_what_cannot_be_merged_computes_as_it_stands(self, small: SmallRun) -> None:
        model = undecided(small, small.train)
        seen: list[int] = []
        layer = model.bert.encoder.layer[1]
        layer.register_forward_hook(lambda *_: seen.append(1))
        Predictor(model, small.tokenizer).predict(small.dev)
        assert seen == [1]

    def test_no_more_than_three_parts_are_held(self, small: SmallRun) -> None:
        held: weakref.WeakSet[Dataset] = weakref.WeakSet()

        class Part(Dataset):
            __hash__ = object.__hash__

        def noted() -> Iterator[Dataset]:
            for each in parts():
                part = Part(**{f.name: getattr(each, f.name) for f in dataclasses.fields(each)})
                held.add(part)
                yield part
                del part

        most = 0
        for each in Predictor(small.model(), small.tokenizer).stream(noted()):
            del each
            gc.collect()
            most = max(most, len(held))
        assert 1 <= most <= 3

    def test_a_thread_tokenizes(self, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
        threads: list[threading.Thread] = []
        encode = inference.encode

        def noted(*arguments: object) -> object:
            threads.append(threading.current_thread())
            return encode(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(inference, "encode", noted)
        predictor = Predictor(small.model(), small.tokenizer)
        stream = predictor.stream(parts())
        next(stream)
        assert threading.main_thread() not in threads
        stream.close()  # type: ignore[attr-defined]
        threads[0].join(timeout=60)
        assert not threads[0].is_alive()
        assert len(threads) < PARTS

    def test_an_error_comes_after_the_parts_before_it(self, small: SmallRun) -> None:
        def broken() -> Iterator[Dataset]:
            yield from parts(3)
            yield make_dataset("sst-2", 2)

        model = small.model()
        assert model.adaptation is not None
        model.adaptation.labels = ("entailment", "not_entailment")
        found = 0
        with pytest.raises(DataError, match="SST-2 has"):
            for _ in Predictor(model, small.tokenizer).stream(broken()):
                found += 1
        assert found == 3

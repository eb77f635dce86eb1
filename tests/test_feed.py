"""The batches of a run, and what a thread makes ahead of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from small_runs import SmallRun
from test_captured import make_feed

from spafit.feed import made_ahead
from spafit.layout import Packed, PackedBatch
from spafit.optimisation import epoch_order


class TestFeed:
    """Oracle: the order of the data and the tokenizer, put together by hand."""

    @pytest.mark.parametrize("accumulation", [1, 4, 99])
    @pytest.mark.parametrize("bucketed", [False, True])
    def test_every_example_with_its_target(
        self, small: SmallRun, bucketed: bool, accumulation: int
    ) -> None:
        feed = make_feed(small, bucketed=bucketed, accumulation=accumulation)
        feed.targets = torch.arange(100, 125)  # so that each names its row
        steps = list(feed)
        assert len(steps) == 4 * feed.steps_an_epoch == 20
        for epoch in range(1, 5):
            of_epoch = [fed for fed in steps if fed.epoch == epoch]
            drawn = epoch_order(25, 5, epoch)
            for number, fed in enumerate(of_epoch):
                rows = set(drawn[6 * number : 6 * number + 6].tolist())
                found = [int(each) - 100 for part in fed.parts for each in part.targets]
                assert len(found) == fed.examples == len(rows)
                assert set(found) == rows
                assert len(fed.parts) == min(accumulation, len(rows))
                for part in fed.parts:
                    assert (part.batch.layout.bucket is not None) == bucketed
                    ids = part.batch.input_ids.tolist()
                    expected = [
                        token
                        for target in part.targets.tolist()
                        for token in feed.encodings.input_ids[target - 100]
                    ]
                    assert ids[: len(expected)] == expected

    def test_a_thread_gives_the_same(self, small: SmallRun) -> None:
        feed = make_feed(small)
        ahead = list(made_ahead(feed._orders(), feed._make, 2))
        for (epoch, n, parts), fed in zip(ahead, feed, strict=True):
            assert (epoch, n) == (fed.epoch, fed.examples)
            for ours, theirs in zip(parts, fed.parts, strict=True):
                assert torch.equal(ours.batch.input_ids, theirs.batch.input_ids)

    def test_what_is_missing_is_computed_in_the_arithmetic_of_the_run(
        self, small: SmallRun
    ) -> None:
        """On a CPU by the thread that asks, like all that is read."""

        class Kept:
            """Has every second part."""

            def __init__(self) -> None:
                self.asked: list[list[int]] = []
                self.threads: set[str] = set()

            def read(self, rows: list[int], layout: Packed) -> torch.Tensor | None:
                self.asked.append(rows)
                self.threads.add(threading.current_thread().name)
                return torch.ones(layout.rows, 1) if len(self.asked) % 2 else None

            def __call__(self, rows: list[int], batch: PackedBatch) -> torch.Tensor:
                assert rows == self.asked[-1]
                assert torch.is_autocast_enabled("cpu")
                return torch.zeros(batch.layout.rows, 1)

        feed = make_feed(small)
        feed.arithmetic, kept = "bf16", Kept()
        feed.prefix = kept  # type: ignore[assignment]
        prefixes = [part.prefix for fed in feed for part in fed.parts]
        assert [float(prefix.mean()) for prefix in prefixes if prefix is not None] == [1, 0] * 10
        assert kept.threads == {threading.current_thread().name}


class TestMadeAhead:
    """Oracle: ``map``; what is made before it is asked for is seen from inside."""

    @pytest.mark.parametrize("ahead", [0, 1, 3, 50])
    def test_all_in_order(self, ahead: int) -> None:
        def slow_at_first(item: int) -> int:
            time.sleep(0.002 * (5 - item) if item < 5 else 0)
            return item * item

        made = list(made_ahead(range(17), slow_at_first, ahead))
        assert made == [item * item for item in range(17)]
        assert list(made_ahead([], slow_at_first, ahead)) == []

    def test_as_many_as_said_and_by_another_thread(self) -> None:
        made: list[int] = []
        threads = set()

        def make(item: int) -> int:
            threads.add(threading.current_thread().name.partition("_")[0])
            made.append(item)
            return item

        results = made_ahead(range(10), make, 2)
        assert next(results) == 0
        deadline = time.monotonic() + 10
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert made == [0, 1, 2]
        assert threads == {"spafit-feed"}
        results.close()
        assert len(made) <= 4

    @pytest.mark.parametrize("ahead", [0, 2])
    def test_an_error_comes_where_its_result_would(self, ahead: int) -> None:
        def make(item: int) -> float:
            return 1 / (3 - item)

        results = made_ahead(range(6), make, ahead)
        assert [next(results) for _ in range(3)] == [1 / 3, 1 / 2, 1]
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_no_thread_is_left(self) -> None:
        def items() -> Iterator[int]:
            yield from range(1000)

        for _ in made_ahead(items(), str, 2):
            break
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if not any(each.name.startswith("spafit-feed") for each in threading.enumerate()):
                return
            time.sleep(0.01)
        pytest.fail("the thread goes on")

    def test_who_stops_halfway_waits_for_no_more_than_is_begun(self) -> None:
        begun: list[int] = []
        ended: list[int] = []

        def make(item: int) -> int:
            begun.append(item)
            time.sleep(0.05 if item else 0)
            ended.append(item)
            return item

        results = made_ahead(range(9), make, 5)
        assert next(results) == 0
        results.close()
        assert begun == ended
        assert len(begun) < 4

"""The batches of a run, and their prefetching by a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from support.captured import eager, make_feed
from support.small_runs import SmallRun

from spafit.layout import Packed, PackedBatch
from spafit.training.batches import Fed, Feed, made_ahead
from spafit.training.optimisation import epoch_order
from spafit.training.step import MicroBatch


class TestFeed:
    """Oracle: the order of the data and the tokenizer, put together by hand."""

    @pytest.mark.parametrize("accumulation", [1, 4, 99])
    @pytest.mark.parametrize("bucketed", [False, True])
    def test_every_example_with_its_target(
        self, small: SmallRun, bucketed: bool, accumulation: int
    ) -> None:
        feed = make_feed(small, bucketed=bucketed, accumulation=accumulation)
        feed.targets = torch.arange(100, 125)  # so that each names its row
        steps = list(feed.batches())
        assert len(steps) == 4 * feed.steps_an_epoch == 20
        for epoch in range(1, 5):
            of_epoch = [fed for fed in steps if fed.epoch == epoch]
            drawn = epoch_order(25, 5, epoch)
            for number, fed in enumerate(of_epoch):
                assert fed.drawn.tolist() == drawn[6 * number : 6 * number + 6].tolist()
                rows = set(fed.drawn.tolist())
                found = [int(each) - 100 for part in fed.micro_batches for each in part.targets]
                assert len(found) == len(fed.drawn) == len(rows)
                assert set(found) == rows
                assert len(fed.micro_batches) == min(accumulation, len(rows))
                for part in fed.micro_batches:
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
        ahead = list(made_ahead(feed._orders(0), feed._make, 2))
        for (epoch, drawn, parts), fed in zip(ahead, feed.batches(), strict=True):
            assert (epoch, drawn.tolist()) == (fed.epoch, fed.drawn.tolist())
            for ours, theirs in zip(parts, fed.micro_batches, strict=True):
                assert torch.equal(ours.batch.input_ids, theirs.batch.input_ids)

    def test_what_is_missing_is_computed_in_the_precision_of_the_run(self, small: SmallRun) -> None:
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
        feed.precision, kept = "bf16", Kept()
        feed.prefix = kept  # type: ignore[assignment]
        prefixes = [part.prefix for fed in feed.batches() for part in fed.micro_batches]
        assert [float(prefix.mean()) for prefix in prefixes if prefix is not None] == [1, 0] * 10
        assert kept.threads == {threading.current_thread().name}


class PretendedGPU:
    """Stands in for a ``torch.device``, so that a feed makes its batches by a thread, pinned."""

    type = "cuda"


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Feed], Feed]]:
    """Have a feed believe in a GPU; what it sends there stays on the host."""
    makers: set[str] = set()
    make = Feed._make

    def making(self: Feed, step: Any) -> Any:
        makers.add(threading.current_thread().name.partition("_")[0])
        return make(self, step)

    def stay(self: Feed, part: Any) -> MicroBatch:
        return MicroBatch(part.batch, part.targets, part.prefix)

    def pretend(feed: Feed) -> Feed:
        monkeypatch.setattr(Feed, "_make", making)
        monkeypatch.setattr(Feed, "_send", stay)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        feed.device = PretendedGPU()  # type: ignore[assignment]
        return feed

    yield pretend
    assert not makers or "spafit-feed" in makers, "no thread has made anything"


def content(steps: Iterable[Fed]) -> list[Any]:
    """Write out all that steps are given, as plain numbers."""
    return [
        (
            fed.epoch,
            fed.drawn.tolist(),
            [
                (
                    [tensor.tolist() for tensor in part.batch.tensors()],
                    part.batch.layout.bucket,
                    part.targets.tolist(),
                )
                for part in fed.micro_batches
            ],
        )
        for fed in steps
    ]


class TestFromAnyStepOn:
    """Oracle: the end of what a feed gives that begins at the first step."""

    @pytest.mark.parametrize("threaded", [False, True], ids=["host", "thread"])
    @pytest.mark.parametrize("bucketed", [False, True], ids=["exact", "bucketed"])
    def test_every_tail(
        self,
        small: SmallRun,
        pretend_gpu: Callable[[Feed], Feed],
        bucketed: bool,
        threaded: bool,
    ) -> None:
        """20 steps in 4 epochs of 5; 5, 10, 15 and 20 are the ends of epochs."""
        feed = make_feed(small, bucketed=bucketed, accumulation=2)
        feed.targets = torch.arange(100, 125)  # so that each names its row
        whole = content(feed.batches())
        assert len(whole) == 20
        assert len({str(each) for each in whole}) == 20
        if threaded:
            pretend_gpu(feed)
        for done in range(21):
            assert content(feed.batches(done)) == whole[done:], done

    @pytest.mark.parametrize("done", [21, 25, 400])
    def test_after_the_end_there_is_nothing(self, small: SmallRun, done: int) -> None:
        assert list(make_feed(small).batches(done)) == []

    def test_more_epochs_begin_alike(self, small: SmallRun) -> None:
        """A run that is given more epochs later goes on with what a longer one would have had."""
        short, long = make_feed(small), make_feed(small)
        long.epochs = 6
        whole = content(long.batches())
        assert len(whole) == 30
        assert content(long.batches(20)) == whole[20:]
        assert whole[:20] == content(short.batches())


class TestHalve:
    """Oracle: the batch before, counted out by hand."""

    @pytest.mark.parametrize(
        ("accumulation", "parts"), [(1, [2, 4, 6]), (2, [4, 6]), (3, [6]), (5, [6]), (6, [])]
    )
    def test_until_single_examples(
        self, small: SmallRun, accumulation: int, parts: list[int]
    ) -> None:
        feed = make_feed(small, accumulation=accumulation)
        feed.targets = torch.arange(100, 125)
        fed = next(feed.batches())
        first, found = fed, []
        while (halved := feed.halve(fed)) is not None:
            fed = halved
            found.append(len(fed.micro_batches))
            assert feed.accumulation == len(fed.micro_batches)
            assert (fed.epoch, fed.drawn.tolist()) == (first.epoch, first.drawn.tolist())
            targets = [int(each) for part in fed.micro_batches for each in part.targets]
            assert sorted(targets) == sorted(100 + first.drawn)
            sizes = [len(part.targets) for part in fed.micro_batches]
            assert max(sizes) - min(sizes) <= 1
        assert found == parts
        assert feed.accumulation == (parts[-1] if parts else accumulation)

    def test_a_single_example_changes_nothing(self, small: SmallRun) -> None:
        """The last batch of an epoch has one; those after it are not cut for its sake."""
        feed = make_feed(small)
        *_, last = (fed for fed in feed.batches() if fed.epoch == 1)
        assert len(last.drawn) == 1
        assert feed.halve(last) is None
        assert feed.accumulation == 1

    @pytest.mark.parametrize("threaded", [False, True], ids=["host", "thread"])
    def test_those_made_ahead_are_halved_too(
        self, small: SmallRun, pretend_gpu: Callable[[Feed], Feed], threaded: bool
    ) -> None:
        expected = content(make_feed(small).batches())[:8]
        expected += content(make_feed(small, accumulation=2).batches())[8:11]
        expected += content(make_feed(small, accumulation=4).batches())[11:]
        feed = make_feed(small)
        if threaded:
            pretend_gpu(feed)
        found = []
        for number, fed in enumerate(feed.batches()):
            found.append(fed)
            if number in (7, 10):
                assert feed.halve(fed) is not None
        assert content(found) == expected

    def test_the_gradient_is_the_same(self, small: SmallRun) -> None:
        """To rounding: in float64, without dropout."""
        norms = []
        for times in range(4):
            feed = make_feed(small)
            fed = next(feed.batches())
            for _ in range(times):
                halved = feed.halve(fed)
                assert halved is not None
                fed = halved
            step = eager(small.model(dtype=torch.float64, dropout=False))
            norms.append([float(each) for each in step(fed.micro_batches, 1e-2)])
        for loss, norm in norms[1:]:
            assert loss == pytest.approx(norms[0][0], rel=1e-12)
            assert norm == pytest.approx(norms[0][1], rel=1e-12)


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

"""Ratios, the order of turns, checks before timing, and memory measured in separate processes.

Oracles: numbers worked out by hand, and contenders that keep a log.
"""

from __future__ import annotations

import itertools
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks.harness import peak_memory, timing
from benchmarks.harness.timing import Contender, Rows, Spread, WrongResultError


class TestRatios:
    """Oracle: numbers worked out by hand."""

    def test_a_spread(self) -> None:
        # In order 1 2 4 8: quartiles lie a quarter and three quarters of the way, at 1.75 and 5.
        assert Spread.of([4.0, 1.0, 8.0, 2.0]) == Spread(3.0, 1.75, 5.0, 1.0, 8.0)
        assert Spread.of([2.5]) == Spread(2.5, 2.5, 2.5, 2.5, 2.5)

    def test_the_ratio_is_of_each_round_and_then_the_median(self) -> None:
        rounds = [Rows((1, 2), 20), Rows((3,), 5), Rows((4, 5, 6), 35)]
        times_ms = {"base": [100.0, 40.0, 900.0], "fast": [50.0, 10.0, 300.0]}
        base, fast = timing.timings(times_ms, rounds)
        # 2, 4 and 3 times as fast. The ratio of the medians would be 2.
        assert fast.ratio == Spread(3.0, 2.5, 3.5, 2.0, 4.0)
        assert base.ratio == Spread(1.0, 1.0, 1.0, 1.0, 1.0)
        assert (base.median_ms, fast.median_ms) == (100.0, 50.0)
        assert fast.examples_per_s == pytest.approx(6 / 0.36)
        assert fast.tokens_per_s == pytest.approx(60 / 0.36)

    def test_the_order_rotates(self) -> None:
        assert ["".join(timing.rotated("abc", number)) for number in range(4)] == [
            "abc", "bca", "cab", "abc",
        ]  # fmt: skip


class Log:
    """Contenders that say when they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def contender(self, name: str, value: float, tolerance: float | None = None) -> Contender:
        def run(rows: Rows) -> None:
            self.ran.append(f"{name}{rows.numbers[0]}")
            time.sleep(0.001)

        return Contender(name, run, lambda _: {"y": torch.tensor([2.0, value])}, tolerance)


class TestCompare:
    """Oracle: the order in which contenders that keep a log were called."""

    batches = (Rows((0,), 3), Rows((1,), 4))

    def test_contenders_take_turns(self) -> None:
        log = Log()
        found = timing.compare(
            log.contender("a", 1.0), [log.contender("b", 1.0)], self.batches, warmup=1, repeats=2
        )
        assert log.ran == ["a0", "b0", *("a0", "b0"), *("b1", "a1"), *("a0", "b0"), *("b1", "a1")]
        assert [timing.name for timing in found] == ["a", "b"]
        assert [len(timing.times_ms) for timing in found] == [4, 4]
        assert all(timing.median_ms >= 1.0 for timing in found)

    @pytest.mark.parametrize("wrong", [1.1, float("nan")])
    def test_what_is_wrong_is_refused_before_anything_is_timed(self, wrong: float) -> None:
        log = Log()
        with pytest.raises(WrongResultError, match=r"^b: y differs from a's .* nothing was timed"):
            timing.compare(log.contender("a", 1.0), [log.contender("b", wrong)], self.batches)
        assert log.ran == []

    def test_the_tolerance_is_a_share_of_the_largest_magnitude(self) -> None:
        log = Log()
        # 0.1 of 2.0 is 5 %.
        for tolerance, fits in ((0.051, True), (0.049, False)):
            candidate = log.contender("b", 1.1, tolerance)
            if fits:
                timing.check_results(log.contender("a", 1.0), [candidate], self.batches[0], 0.0)
            else:
                with pytest.raises(WrongResultError):
                    timing.check_results(log.contender("a", 1.0), [candidate], self.batches[0], 1.0)

    def test_several_calls_make_a_round_of_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log = Log()
        clock = types.SimpleNamespace(perf_counter=itertools.count(0, 6).__next__)
        monkeypatch.setattr(timing, "time", clock)  # a round takes six seconds
        [found] = timing.take_turns([log.contender("a", 1.0)], self.batches, warmup=0, calls=3)
        assert log.ran == ["a0"] * 3 + ["a1"] * 3
        assert found.times_ms == (2000.0, 2000.0)

    def test_work_in_another_process_is_timed_by_its_own_clock(self) -> None:
        answers = iter([9.0, 2.0, 4.0, 1.0, 3.0])  # the first is the warm-up's
        contender = Contender("a", lambda _: next(answers), lambda _: {}, has_own_clock=True)
        [found] = timing.take_turns([contender], self.batches, calls=2)
        assert found.times_ms == (3.0, 2.0)

    def test_what_prepares_itself_settles_on_every_batch(self) -> None:
        ran: list[int] = []
        # Something new in the second and the third pass.
        contender = Contender(
            "a",
            lambda rows: ran.append(rows.numbers[0]),
            lambda _: {},
            prepared=lambda: min(len(ran), 6),
        )
        assert timing.settle(contender, self.batches) == 4
        assert ran == [0, 1] * 4
        never = Contender("b", lambda _: ran.append(0), lambda _: {}, prepared=lambda: len(ran))
        with pytest.raises(RuntimeError, match="b still prepares itself"):
            timing.settle(never, self.batches)
        assert timing.settle(Contender("c", print, lambda _: {}), self.batches) == 2

    @pytest.mark.parametrize(
        ("value", "fits"), [(1.19, True), (1.21, False), (float("nan"), False)]
    )
    def test_rounding_is_judged_by_the_baseline_s_own(self, value: float, fits: bool) -> None:
        log = Log()

        def truth(rows: Rows) -> dict[str, torch.Tensor]:
            return {"y": torch.tensor([2.0, 1.0])}

        # The baseline is off by 0.1, the candidate may be by 0.2.
        sides = log.contender("a", 1.1), [log.contender("b", value)]
        if fits:
            assert len(timing.compare(*sides, self.batches, truth=truth, tolerance=0.0)) == 2
        else:
            with pytest.raises(WrongResultError, match="b: y are off by"):
                timing.compare(*sides, self.batches, truth=truth, tolerance=9.0)
        exact = log.contender("a", 1.0)  # 0.01 · √5 is allowed in any case
        timing.check_by_truth(truth, exact, [log.contender("b", 1.022)], self.batches[0])
        with pytest.raises(WrongResultError):
            timing.check_by_truth(truth, exact, [log.contender("b", 1.023)], self.batches[0])

    def test_other_results_and_other_shapes_are_refused(self) -> None:
        one = Contender("one", print, lambda _: {"y": torch.ones(2)})
        other = Contender("other", print, lambda _: {"z": torch.ones(2)})
        longer = Contender("longer", print, lambda _: {"y": torch.ones(3)})
        with pytest.raises(WrongResultError, match="other gives z; one gives y"):
            timing.check_results(one, [other], self.batches[0], 1.0)
        with pytest.raises(WrongResultError, match=r"y has shape \(3,\), one's has \(2,\)"):
            timing.check_results(one, [longer], self.batches[0], 1.0)


FILLING = """
import torch
def filling(mib):
    kept = torch.ones(20, 2**20, dtype=torch.uint8)
    return lambda: torch.ones(mib, 2**20, dtype=torch.uint8).sum(dtype=torch.uint8) + len(kept)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's record of a process")
def test_peak_memory_is_that_of_the_work(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the size of what the work allocates; the rest is what PyTorch takes on its way."""
    (tmp_path / "target.py").write_text(FILLING, encoding="utf-8")
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peak = peak_memory.measure_peak_memory("target:filling", {"mib": 200})
    assert 199 < peak.above_weights_mib < 230
    assert peak.after_setup_mib > 20
    with pytest.raises(RuntimeError, match="target:filling failed in its own process"):
        peak_memory.measure_peak_memory("target:filling", {"gib": 1})

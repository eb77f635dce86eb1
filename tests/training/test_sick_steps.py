"""Steps that fail: out of memory, and gradients that are not finite."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import REPOSITORY, TESTS
from support.interruptions import differences, everything, interrupted
from support.small_runs import SmallRun, read_log, trained

from spafit.errors import TrainingError
from spafit.training import step as training_step
from spafit.training.optimisation import learning_rate_factor, loss_function
from spafit.training.step import TrainingStep


def memory_for(most: int) -> Callable[..., torch.Tensor]:
    """Return a loss function that runs out of memory beyond some examples at a time."""

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(targets) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")
        return loss_function(logits, targets)

    return loss


def losses_times(factors: dict[int, float]) -> Callable[..., torch.Tensor]:
    """Return a loss function whose n-th answer, from 1, is multiplied by a factor."""
    calls = iter(range(1, 10_000))

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss_function(logits, targets) * factors.get(next(calls), 1.0)

    return loss


class TestOutOfMemory:
    """Oracle: the same run with enough memory. Float64, dropout off: rounding alone may differ."""

    def test_the_same_gradients_from_smaller_parts(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models = [small.model(dtype=torch.float64, dropout=False) for _ in range(2)]
        plenty = small.fit(models[0], batch_size=11, epochs=2, out=tmp_path / "plenty")
        monkeypatch.setattr(training_step, "loss_function", memory_for(3))
        scarce = small.fit(models[1], batch_size=11, epochs=2, out=tmp_path / "scarce")
        assert np.abs(np.subtract(plenty.losses, scarce.losses)).max() < 1e-10
        norms = [
            [row["grad_norm"] for row in read_log(tmp_path / name, "grad_norm")]
            for name in ("plenty", "scarce")
        ]
        assert np.abs(np.subtract(*norms)).max() < 1e-10
        first, second = map(trained, models)
        assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-10
        notes = [row["note"] for row in read_log(tmp_path / "scarce", "note")]
        # 11 in one part, then 6 at most in two, then 3 at most in four: each size once.
        assert [note for note in notes if "not enough memory" in note] == [
            f"not enough memory for {examples} examples at a time (CUDA out of memory. Tried "
            f"to allocate 20 GiB.); batches are computed in {parts} micro-batches from step 1 on, "
            "with the same gradient except for the masks of dropout"
            for examples, parts in ((11, 2), (6, 4))
        ]

    def test_random_numbers_are_drawn_as_if_nothing_had_been_tried(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Oracle: the run that was asked to compute in two parts from the start; dropout on."""
        expected = small.fit(epochs=2, accumulation=2)
        monkeypatch.setattr(training_step, "loss_function", memory_for(3))
        assert small.fit(epochs=2).losses == expected.losses

    def test_taken_up_again_it_knows(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(training_step, "loss_function", memory_for(2))
        small.fit(epochs=2, out=tmp_path / "whole")
        interrupted(small, tmp_path / "parts", [3, 7], epochs=2)
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))
        notes = [row["note"] for row in read_log(tmp_path / "parts", "note")]
        assert sum("not enough memory" in note for note in notes) == 2  # 6, 3

    def test_not_even_for_one(self, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(training_step, "loss_function", memory_for(0))
        match = r"not enough memory for one example at a time \(CUDA out of memory.*--recompute"
        with pytest.raises(TrainingError, match=match):
            small.fit()

    @pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
    def test_of_the_host_for_real(self, tmp_path: Path) -> None:
        """A process whose address space is limited, so that the allocator really fails."""
        code = """
import json, resource, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import torch
from support.small_runs import SmallRun
from weights_tools.tiny import make_tiny
torch.set_num_threads(1)
out = Path(sys.argv[1])
small = SmallRun(make_tiny(out / "tiny"))
small.fit(epochs=1)  # everything is loaded now
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
from spafit.training import step as training_step
plain = training_step.loss_function
def greedy(logits, targets):  # 200 MB for each example
    memory = torch.empty(len(targets) * 50_000_000)
    return plain(logits, targets) + 0 * memory[0].zero_()
training_step.loss_function = greedy
limit = used + 700_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
result = small.fit(epochs=1, out=out / "run")
print(json.dumps(result.losses))
"""
        found = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(TESTS), str(REPOSITORY)],
            capture_output=True,
            text=True,
            env={"OMP_NUM_THREADS": "1", "PATH": ""},
        )
        assert found.returncode == 0, found.stderr
        assert len(json.loads(found.stdout.splitlines()[-1])) == 5
        notes = [row["note"] for row in read_log(tmp_path / "run", "note")]
        assert any("not enough memory for 6 examples" in note for note in notes), notes
        assert any("can't allocate memory" in note for note in notes), notes


class TestNotFinite:
    """Oracle: a run that never had the step, and the schedule by hand."""

    @pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
    def test_optimizer_and_schedule_skip_together(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
    ) -> None:
        monkeypatch.setattr(training_step, "loss_function", losses_times({3: factor, 7: factor}))
        result = small.fit(out=tmp_path, epochs=2, warmup=0.3)
        assert result.skipped == 2
        assert [step for step, loss in enumerate(result.losses, 1) if not math.isfinite(loss)] == [
            *(3, 7)
        ]
        rows = read_log(tmp_path, "learning_rate")
        assert [row["step"] for row in rows if row.get("skipped")] == [3, 7]
        assert [row["loss"] is None for row in rows] == [row.get("skipped", False) for row in rows]
        updates = [0, 1, 2, 2, 3, 4, 5, 5, 6, 7]
        assert [row["learning_rate"] for row in rows] == [
            0.003 * learning_rate_factor(update, 10, 0.3) for update in updates
        ]
        assert "NaN" not in (tmp_path / "run.json").read_text()

    def test_nothing_moves(self, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
        model = small.model()
        before = trained(model)
        monkeypatch.setattr(
            training_step, "loss_function", losses_times(dict.fromkeys(range(1, 6), math.nan))
        )
        small.fit(model, epochs=1)
        assert not differences(before, trained(model))

    @pytest.mark.parametrize("healthy", [0, 8])
    def test_25_in_a_row_stop_with_the_last_good_checkpoint_kept(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, healthy: int
    ) -> None:
        sick = dict.fromkeys(range(healthy + 1, 1000), math.nan)
        monkeypatch.setattr(training_step, "loss_function", losses_times(sick))
        match = (
            rf"25 steps in a row, up to step {healthy + 25} \(epoch \d\), was NaN or infinite "
            r"\(the last loss is nan\).*lower learning rate than 0\.003"
        )
        with pytest.raises(TrainingError, match=match):
            small.fit(out=tmp_path, epochs=20, save_every=4)
        steps = sorted(path.name for path in (tmp_path / "checkpoints").glob("*"))
        assert steps == (["step-5", "step-8"] if healthy else [])
        assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"

    def test_24_in_a_row_do_not(self, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
        sick = dict.fromkeys([*range(2, 26), *range(27, 51)], math.inf)
        monkeypatch.setattr(training_step, "loss_function", losses_times(sick))
        assert small.fit(epochs=12).skipped == 48

    def test_taken_up_again_amid_them(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The count in a row, the schedule and the losses go on where they were."""
        sick: dict[str, Any] = {"calls": 0}

        def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            sick["calls"] += 1
            bad = sick["calls"] in (4, 5, 6, 7, 12)
            return loss_function(logits, targets) * (math.nan if bad else 1.0)

        monkeypatch.setattr(training_step, "loss_function", loss)
        small.fit(epochs=3, out=tmp_path / "whole", warmup=0.5)
        sick["calls"] = 0
        interrupted(small, tmp_path / "parts", [5, 6, 12], epochs=3, warmup=0.5)
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))


class TestNoRoomForMoments:
    """Oracle: the message; AdamW makes its moments in the first step."""

    @pytest.mark.parametrize(
        ("error", "reason"),
        [(torch.OutOfMemoryError("CUDA out of memory\nmore"), "CUDA out of memory"),
         (MemoryError(), "MemoryError")],
    )  # fmt: skip
    def test_ends_the_run(
        self,
        small: SmallRun,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
        reason: str,
    ) -> None:
        def failing(self: TrainingStep) -> torch.Tensor:
            raise error

        monkeypatch.setattr(TrainingStep, "update", failing)
        match = rf"the optimizer's moments \({reason}\), which take twice the trained"
        with pytest.raises(TrainingError, match=match):
            small.fit(out=tmp_path)

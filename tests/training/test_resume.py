"""A run that was stopped and resumed equals the run that was not stopped.

The runs have 20 steps, 60 with ``--torture``, dropout, two micro-batches per batch, warm-up,
evaluations at steps that are not multiples of the checkpoint interval, and kept hidden states.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interruptions import differences, everything, interrupted, stopped_after
from support.small_runs import (
    METHODS,
    STEPS_AN_EPOCH,
    N,
    SmallRun,
    make_dataset,
    read_log,
    trained,
    written,
)

from spafit.errors import CheckpointError, ConfigError, StoppedError
from spafit.methods import plan
from spafit.tasks.glue import Dataset
from spafit.training import fit as fitting
from spafit.training.batches import Feed

STEPS = 60
# After the first step, an epoch, an evaluation, a checkpoint, none of these, and before the last.
POINTS = (1, 5, 7, 8, 13, 19)
SETTINGS = {
    "accumulation": 2,
    "warmup": 0.1,
    "eval_every": 7,
    "save_every": 4,
    "dropout_in_group_1": False,
    "cache_prefix": "memory",
}


@pytest.fixture(scope="module")
def full(sized: Callable[[int, int], int]) -> dict[str, Any]:
    """Return the settings of the runs that are resumed at many steps."""
    return {**SETTINGS, "epochs": sized(POINTS[-1] + 1, STEPS) // STEPS_AN_EPOCH}


@pytest.fixture(scope="module")
def whole(
    small: SmallRun, tmp_path_factory: pytest.TempPathFactory, full: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Train without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    model = small.model()
    return small.fit(model, out=out, **full), trained(model), everything(out)


@pytest.fixture(scope="module")
def stopped_once(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train, stopped after step 7 of 10; the folder, which tests only copy."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with stopped_after(7), pytest.raises(StoppedError):
        small.fit(out=out, epochs=2)
    return out


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """Return a folder of the test's own with a run that was stopped after step 7 of 10."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


class TestBitForBit:
    """Oracle: the same run, uninterrupted: weights, optimizer, losses, log, random numbers."""

    @pytest.mark.parametrize("part", range(len(POINTS)))
    def test_resumed_at_every_step(
        self,
        small: SmallRun,
        full: dict[str, Any],
        whole: tuple[Any, Any, Any],
        tmp_path: Path,
        part: int,
        sized: Callable[[int, int], int],
        promise: Callable[[str, int, str], None],
    ) -> None:
        """After every step with ``--torture``; else after those of ``POINTS``."""
        every = range(part + 1, STEPS + 1, len(POINTS))
        steps = list(every) if sized(0, 1) else [POINTS[part]]
        for step in steps:
            result, model = interrupted(small, tmp_path / str(step), [step], **full)
            assert not differences(whole[2], everything(tmp_path / str(step))), step
            assert not differences(whole[1], trained(model)), step
            assert (result.losses, result.history) == (whole[0].losses, whole[0].history), step
        promise("resume points of a tiny run, bit for bit", len(steps), "all equal")

    @pytest.mark.parametrize(
        "stops", [pytest.param([11, 14], marks=pytest.mark.full), [11, 12, 13, 14, 15]], ids=len
    )
    def test_several_times_within_an_epoch(
        self,
        small: SmallRun,
        full: dict[str, Any],
        whole: tuple[Any, Any, Any],
        tmp_path: Path,
        stops: list[int],
    ) -> None:
        interrupted(small, tmp_path, stops, **full)
        assert not differences(whole[2], everything(tmp_path))

    @pytest.mark.parametrize("method", METHODS)
    def test_every_kind_of_plan(self, small: SmallRun, tmp_path: Path, method: str) -> None:
        settings = {"epochs": 2, "decay_biases": True, "save_every": 3}
        small.fit(small.model(method), out=tmp_path / "whole", **settings)
        interrupted(small, tmp_path / "parts", [2, 7], lambda: small.model(method), **settings)
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))

    @pytest.mark.parametrize(
        "changes",
        [{"recompute": (2, 3)}, {"precision": "bf16", "frozen_weights": "half"}, {"seed": 2**40}],
        ids=str,
    )
    def test_with_other_settings(
        self, small: SmallRun, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        small.fit(out=tmp_path / "whole", epochs=2, **changes)
        interrupted(small, tmp_path / "parts", [3, 6], epochs=2, **changes)
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))

    def test_a_score(self, small: SmallRun, tmp_path: Path) -> None:
        data = (make_dataset("sts-b", 13), make_dataset("sts-b", 7, seed=5))
        settings = {"data": data, "epochs": 3}
        models = [lambda: small.model(num_labels=1)] * 2
        small.fit(models[0](), out=tmp_path / "whole", **settings)
        interrupted(small, tmp_path / "parts", [2, 5], models[1], **settings)
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))

    def test_kept_on_disk_too(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = {**SETTINGS, "cache_prefix": "disk", "epochs": 3}
        for name, stops in (("whole", []), ("parts", [1, 4, 11])):
            monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / f"cache of {name}"))
            interrupted(small, tmp_path / name, stops, **settings)
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))

    def test_these_runs_would_differ(self, small: SmallRun, tmp_path: Path) -> None:
        """Otherwise the tests above would see nothing: one more number drawn changes the rest."""
        small.fit(out=tmp_path / "one", epochs=2)
        with stopped_after(3), pytest.raises(StoppedError):
            small.fit(out=tmp_path / "other", epochs=2)
        state = tmp_path / "other" / "checkpoints" / "step-3" / "state.safetensors"
        _rewrite(state, lambda tensors: tensors["random.cpu"][100:200].bitwise_xor_(1))
        small.fit(out=tmp_path / "other", epochs=2)
        found = differences(everything(tmp_path / "one"), everything(tmp_path / "other"))
        assert found

    def test_no_example_is_missed_or_repeated(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Oracle: over 3 epochs, stopped 6 times, every example is computed 3 times."""
        seen: Counter[int] = Counter()
        send = Feed._send

        def spy(self: Feed, part: Any) -> Any:
            seen.update(part.rows)
            return send(self, part)

        monkeypatch.setattr(Feed, "_send", spy)
        interrupted(small, tmp_path, [1, 4, 5, 8, 10, 14], epochs=3)
        assert seen == dict.fromkeys(range(N), 3)


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a file of a checkpoint, and its manifest with it."""
    import hashlib

    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {
        "nbytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


class TestStopping:
    """Oracle: the record, and what a later run finds."""

    @pytest.mark.parametrize(
        "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    )
    def test_the_step_in_hand_ends_and_is_saved(
        self, small: SmallRun, tmp_path: Path, number: signal.Signals
    ) -> None:
        before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
        with stopped_after(3, number), pytest.raises(StoppedError) as caught:
            small.fit(out=tmp_path)
        assert caught.value.signal == number
        assert f"stopped by {number.name} after step 3" in str(caught.value)
        assert (tmp_path / "checkpoints" / "step-3" / "manifest.json").is_file()
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["status"] == "interrupted"
        assert not (tmp_path / "run.lock").exists()
        assert {each: signal.getsignal(each) for each in before} == before

    def test_what_is_ignored_stays_so(self, small: SmallRun, tmp_path: Path) -> None:
        """As nohup has it with SIGHUP."""
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with stopped_after(3, signal.SIGHUP):
                assert len(small.fit(out=tmp_path, epochs=1).losses) == 5
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_without_a_folder_nothing_is_caught(self, small: SmallRun) -> None:
        with stopped_after(2, signal.SIGINT), pytest.raises(KeyboardInterrupt):
            small.fit()

    def test_an_evaluation_is_given_up_and_made_up_for(
        self, small: SmallRun, tmp_path: Path
    ) -> None:
        small.fit(out=tmp_path / "whole", epochs=2)
        interrupted(small, tmp_path / "parts", [5], epochs=2)  # 5 is the end of the first epoch
        assert [row["step"] for row in read_log(tmp_path / "parts", "evaluation")] == [5, 10]
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))


class TestWhatMayChange:
    """Oracle: the run's record, and a run with the later settings from its first step."""

    def test_harmless_changes_are_recorded(self, small: SmallRun, tmp_path: Path) -> None:
        with stopped_after(7), pytest.raises(StoppedError):
            small.fit(out=tmp_path, epochs=2)
        changed = {"epochs": 3, "eval_every": 4, "save_every": 2, "keep_checkpoints": 3}
        result = small.fit(out=tmp_path, **changed)
        assert len(result.losses) == 15
        assert [each["step"] for each in result.history] == [5, 8, 12, 15]
        record = json.loads((tmp_path / "run.json").read_text())
        (entry,) = record["resumed"]
        assert entry == {
            "step": 7,
            "changed": {
                "epochs": [2, 3],
                "eval_every": [None, 4],
                "save_every": [None, 2],
                "keep_checkpoints": [2, 3],
            },
        }
        assert record["settings"]["epochs"] == 3

    def test_another_library_of_products_is_recorded(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fitting, "library_on", lambda device: "one")
        with stopped_after(3), pytest.raises(StoppedError):
            small.fit(out=tmp_path, epochs=1)
        monkeypatch.setattr(fitting, "library_on", lambda device: "another")
        small.fit(out=tmp_path, epochs=1)
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["resumed"] == [{"step": 3, "changed": {"products": ["one", "another"]}}]

    def test_a_finished_run_gives_its_result(self, small: SmallRun, tmp_path: Path) -> None:
        first = small.fit(small.model(), out=tmp_path)
        before = everything(tmp_path)
        model = small.model()
        again = small.fit(model, out=tmp_path)
        unlike = {"peak_memory_mib", "seconds"}
        for field in dataclasses.fields(first):
            if field.name not in unlike:
                assert getattr(first, field.name) == getattr(again, field.name), field.name
        assert not differences(before, everything(tmp_path))
        best = everything(tmp_path)["the best adapter"]
        assert not differences(best, written(model))
        assert not model.training

    def test_a_finished_run_goes_on_for_more_epochs(self, small: SmallRun, tmp_path: Path) -> None:
        small.fit(out=tmp_path, epochs=2)
        result = small.fit(out=tmp_path, epochs=3)
        assert len(result.losses) == 15
        assert [row["step"] for row in read_log(tmp_path, "step")][-1] == 15

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"seed": 4}, r"seed is 3, asked for is 4"),
            ({"learning_rate": 1e-3}, r"learning_rate is 0\.003, asked for is 0\.001"),
            ({"batch_size": 5}, r"batch_size is 6, asked for is 5"),
            ({"warmup": 0.5}, r"warmup is 0\.0, asked for is 0\.5"),
            ({"weight_decay": 0.5}, r"weight_decay is 0\.01, asked for is 0\.5"),
            ({"decay_biases": True}, r"decay_biases is False, asked for is True"),
            ({"max_grad_norm": 0.5}, r"max_grad_norm is 1\.0, asked for is 0\.5"),
            ({"max_length": 20}, r"max_length is 53, asked for is 20"),
            ({"precision": "bf16"}, r"precision is 'float32', asked for is 'bf16'"),
            ({"dropout_in_group_1": False}, r"dropout_in_group_1 is True, asked for is False"),
        ],
    )
    def test_another_setting_is_refused(
        self, small: SmallRun, stopped: Path, changes: dict[str, Any], named: str
    ) -> None:
        self._refused(small, stopped, named, **changes)

    @pytest.mark.parametrize(
        ("method", "named"),
        [
            ("full", r"method is 'SPAFIT-0-1-II', asked for is 'Full Fine-tuning'"),
            (plan("SPAFIT-0-1-II", 4, r=6, alpha=7.0, lora_dropout=0.2), r"lora\.r, is 5, .* is 6"),
        ],
        ids=["method", "rank"],
    )
    def test_another_plan_is_refused(
        self, small: SmallRun, stopped: Path, method: Any, named: str
    ) -> None:
        self._refused(small, stopped, named, model=small.model(method))

    def test_another_task_is_refused(self, small: SmallRun, stopped: Path) -> None:
        data = (make_dataset("mrpc", N), make_dataset("mrpc", 7))
        self._refused(small, stopped, r"task is 'rte', asked for is 'mrpc'", data=data)

    def test_another_base_is_refused(self, small: SmallRun, stopped: Path) -> None:
        model = small.model()
        with torch.no_grad():
            model.bert.pooler.dense.bias[0] += 1.0
        self._refused(small, stopped, r"base_fingerprint is '", model=model)

    def test_other_data_are_refused(self, small: SmallRun, stopped: Path, tmp_path: Path) -> None:
        def other(dataset: Dataset) -> Dataset:
            return dataclasses.replace(dataset, sha256="f" * 64)

        copied = shutil.copytree(stopped, tmp_path / "copied")
        data = (other(small.train), small.dev)
        self._refused(small, stopped, r"data\.train\.sha256 is '0+1'", data=data)
        data = (small.train, other(small.dev))
        self._refused(small, copied, r"data\.dev\.sha256 is '0+2'", data=data)

    def _refused(self, small: SmallRun, out: Path, named: str, **changes: Any) -> None:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(CheckpointError, match=rf"holds another run: .*{named}.*--overwrite"):
            small.fit(changes.pop("model", None), out=out, **{"epochs": 2, **changes})
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        small.fit(out=out, epochs=2)


class TestRefusedRunsStayAsTheyWere:
    """Oracle: every byte of the folder."""

    def _bytes(self, folder: Path) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def test_fewer_epochs_than_were_done(self, small: SmallRun, tmp_path: Path) -> None:
        small.fit(out=tmp_path, epochs=3)
        before = self._bytes(tmp_path)
        with pytest.raises(
            CheckpointError, match="at step 15, and these settings end at step 10; give"
        ):
            small.fit(out=tmp_path, epochs=2)
        assert self._bytes(tmp_path) == before

    def test_a_prefix_that_does_not_fit(self, small: SmallRun, tmp_path: Path) -> None:
        settings = {"dropout_in_group_1": False, "epochs": 1}
        small.fit(out=tmp_path / "run", **settings)
        before = self._bytes(tmp_path)
        kept = {"cache_prefix": "memory", "cache_limit_gib": 1e-6, **settings}
        for name in ("run", "new"):
            with pytest.raises(ConfigError, match="the limit is 1073"):
                small.fit(out=tmp_path / name, **{**kept, "epochs": 2})
        assert self._bytes(tmp_path) == before
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("name", ["adapter.safetensors", "log.jsonl"])
    def test_files_that_no_run_left_there(self, small: SmallRun, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("mine")
        with pytest.raises(CheckpointError, match=rf"{name} exists, but the folder has no record"):
            small.fit(out=tmp_path, epochs=1)
        assert self._bytes(tmp_path) == {tmp_path / name: b"mine"}
        small.fit(out=tmp_path, epochs=1, overwrite=True)

    def test_another_configuration_of_the_base(self, small: SmallRun, tmp_path: Path) -> None:
        """The fingerprint is of the tensors alone."""
        with stopped_after(7), pytest.raises(StoppedError):
            small.fit(out=tmp_path)
        model = small.model()
        model.config = dataclasses.replace(model.config, layer_norm_eps=1e-3)
        match = r"base_config\.layer_norm_eps is 1e-12, asked for is 0\.001"
        with pytest.raises(CheckpointError, match=match):
            small.fit(model, out=tmp_path)

    def test_values_that_were_trained_before_the_first_checkpoint(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run without a checkpoint begins anew, and must begin where it began."""
        model = small.model()
        with monkeypatch.context() as patched:
            patched.setattr("spafit.training.loop.predict_logits", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                small.fit(model, out=tmp_path)
        with pytest.raises(CheckpointError, match="load and adapt the model again"):
            small.fit(model, out=tmp_path)
        assert small.fit(out=tmp_path).losses == small.fit().losses

    def test_what_json_cannot_hold(self, small: SmallRun, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="about must be what JSON can hold"):
            small.fit(out=tmp_path / "run", about={"x": float("nan")})
        assert not (tmp_path / "run").exists()


class TestWords:
    """Oracle: what the command in the message does."""

    def test_overwrite_would_not_go_on(self, small: SmallRun, tmp_path: Path) -> None:
        with stopped_after(3), pytest.raises(StoppedError, match=r"without overwrite \(--over"):
            small.fit(out=tmp_path, overwrite=True)
        small.fit(out=tmp_path)
        record = json.loads((tmp_path / "run.json").read_text())
        assert [each["step"] for each in record["resumed"]] == [3]

    def test_fewer_parts_are_fewer_parts(self, small: SmallRun, tmp_path: Path) -> None:
        with stopped_after(3), pytest.raises(StoppedError):
            small.fit(out=tmp_path, accumulation=3)
        small.fit(out=tmp_path, accumulation=1, epochs=1)
        (step,) = [path for path in (tmp_path / "checkpoints").iterdir() if path.name == "step-5"]
        assert json.loads((step / "state.json").read_text())["accumulation"] == 1


EVERY_THIRD = {"epochs": 2, "save_every": 3}


@pytest.fixture(scope="module")
def left(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a run of 10 steps leaves that nothing happened to."""
    out = tmp_path_factory.mktemp("left") / "run"
    small.fit(out=out, **EVERY_THIRD)
    return everything(out)


@pytest.fixture(scope="module")
def stopped_late(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train, stopped after step 9 of 10; the folder, which tests only copy."""
    out = tmp_path_factory.mktemp("stopped late") / "run"
    with stopped_after(9), pytest.raises(StoppedError):
        small.fit(out=out, **EVERY_THIRD)
    return out


class TestDamage:
    """Oracle: the uninterrupted run; never load a lie."""

    FILES = ("adapter.safetensors", "state.safetensors", "state.json", "manifest.json")

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("how", ["flipped", "cut", "removed", "doubled"])
    def test_an_older_checkpoint_is_taken(
        self,
        small: SmallRun,
        left: dict[str, Any],
        stopped_late: Path,
        tmp_path: Path,
        name: str,
        how: str,
    ) -> None:
        out = shutil.copytree(stopped_late, tmp_path / "parts")
        _damage(out / "checkpoints" / "step-9" / name, how)
        small.fit(out=out, **EVERY_THIRD)
        notes = [row["note"] for row in read_log(out, "note")]
        wrong = f"step-9/{name}" if name != "manifest.json" else "step-9/"  # what it says of others
        assert any(wrong in note for note in notes), notes
        assert any("resumed after step 6" in note for note in notes), notes
        assert not differences(left, everything(out))

    def test_rows_that_the_log_has_lost_are_spoken_of(self, small: SmallRun, stopped: Path) -> None:
        (stopped / "log.jsonl").write_bytes(b"")
        small.fit(out=stopped, epochs=2)
        notes = [row["note"] for row in read_log(stopped, "note")]
        assert any("has lost" in note and "bytes of earlier rows" in note for note in notes), notes

    def test_where_none_is_sound_nothing_is_touched(self, small: SmallRun, stopped: Path) -> None:
        for folder in (stopped / "checkpoints").iterdir():
            _damage(folder / "state.safetensors", "flipped")
        before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
        with pytest.raises(CheckpointError, match=r"without a usable checkpoint: .*step-7.*step-5"):
            small.fit(out=stopped, epochs=2)
        assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
        small.fit(out=stopped, overwrite=True, epochs=1)

    def test_a_finished_run_without_checkpoints_is_kept(
        self, small: SmallRun, tmp_path: Path
    ) -> None:
        small.fit(out=tmp_path, epochs=1)
        for path in (tmp_path / "checkpoints").rglob("*.*"):
            path.unlink()
        for path in (tmp_path / "checkpoints").iterdir():
            path.rmdir()
        with pytest.raises(CheckpointError, match=r"a finished run without checkpoints"):
            small.fit(out=tmp_path, epochs=1)

    @pytest.mark.parametrize(
        "change",
        [
            lambda values: values.pop("skips"),
            lambda values: values.update(history=7),
            lambda values: values.update(random={"python": [3, [1], None]}),
            lambda values: values.update(best_step="5"),
            lambda values: values.update(log_bytes=-1),
            lambda values: values.update(record=None),
            lambda values: values["record"].update(resumed=7),
            lambda values: values.update(accumulation=None),
            lambda values: values.update(kernels=[["a", "b"]]),
            lambda values: values["random"]["numpy"].__setitem__(1, [2**40]),
            lambda values: values["history"][0].update(metrics=[0.5]),
            lambda values: values["history"][0].update(epoch=None),
            lambda values: values["history"].append(dict(values["history"][0])),
        ],
    )
    def test_a_checkpoint_that_lies_with_a_good_manifest(
        self, small: SmallRun, stopped: Path, change: Callable[[dict[str, Any]], object]
    ) -> None:
        import hashlib

        folder = stopped / "checkpoints" / "step-7"
        values = json.loads((folder / "state.json").read_text())
        change(values)
        text = json.dumps(values).encode()
        (folder / "state.json").write_bytes(text)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["state.json"] = {
            "nbytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        record = (stopped / "run.json").read_bytes()
        with pytest.raises(CheckpointError, match=r"damaged"):
            small.fit(out=stopped, epochs=2)
        assert (stopped / "run.json").read_bytes() == record


def _damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    if how == "flipped":
        content[len(content) // 2] ^= 4
    path.write_bytes({"cut": content[:-9], "doubled": content * 2}.get(how, content))

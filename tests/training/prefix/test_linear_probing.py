"""Linear probing: nothing trains but the head, and what is kept of an example is one vector.

Oracles: the same run with nothing kept, training/plain.py, and the number of examples that the
encoder is run on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.captured import Recorder, captured, eager, make_feed
from support.interruptions import differences, everything, interrupted, stopped_after
from support.small_runs import METHODS, N_DEV, N, SmallRun, read_log, trained, write_glue
from torch import nn

from spafit.bert import BertForSequenceClassification, Encoder, set_impl
from spafit.cli import main, training
from spafit.errors import CheckpointError, ConfigError, StoppedError
from spafit.methods import plan
from spafit.plans import Plan, Stratum
from spafit.tasks.glue import load
from spafit.training import plain
from spafit.training.inference import encode, evaluate
from spafit.training.prefix.cache import PrefixCache
from spafit.training.prefix.kept import prefix_key
from spafit.training.settings import TrainConfig, complete
from spafit.weights.adapter_files import load_adapter
from spafit.weights.pretrained import load_pretrained

Model = BertForSequenceClassification

D, L = 24, 4
PROBE = plan("linear-probe", L)
WITH_POOLER = Plan("head and pooler", L, [Stratum("all layers", 0, L - 1)], pooler="full")
OFF = {"dropout_in_group_1": False, "cache_prefix": "off"}
WITH_DROPOUT = {"dropout_in_group_1": True, "cache_prefix": "off"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have the cache in a folder of the test's own."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many examples the encoder is run on, and through how many layers each."""
    calls: list[int] = []
    forward = Encoder.forward

    def spy(self: Encoder, X: torch.Tensor, layout: Any, **how: Any) -> Any:
        start, stop = how.get("start", 0), how.get("stop")
        layers = (len(self.layer) if stop is None else stop) - start
        sequences = len(X) if not hasattr(layout, "lengths") else len(layout.lengths)
        calls.extend([layers] * sequences)
        return forward(self, X, layout, **how)

    monkeypatch.setattr(Encoder, "forward", spy)
    return calls


def far(one: Any, other: Any) -> float:
    return float(np.abs(np.subtract(one.losses, other.losses)).max())


class TestSettings:
    """Oracle: the paper's settings, but for a plan that trains the head alone."""

    def completed(self, small: SmallRun, model: Model, **settings: Any) -> tuple[bool | None, str]:
        config = complete(small.settings(**settings), model, small.train)
        return config.dropout_in_group_1, config.cache_prefix

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, (False, "memory")),
            ({"dropout_in_group_1": True}, (True, "off")),
            ({"dropout_in_group_1": False}, (False, "memory")),
            ({"cache_prefix": "off"}, (False, "off")),
            ({"dropout_in_group_1": False, "cache_prefix": "disk"}, (False, "disk")),
        ],
        ids=str,
    )
    def test_a_head_alone(
        self, small: SmallRun, settings: dict[str, Any], expected: tuple[bool, str]
    ) -> None:
        assert self.completed(small, small.model(PROBE), **settings) == expected

    @pytest.mark.parametrize("method", [*METHODS, WITH_POOLER], ids=str)
    def test_any_other_plan(self, small: SmallRun, method: str | Plan) -> None:
        assert self.completed(small, small.model(method)) == (True, "off")
        without = {"dropout_in_group_1": False}
        assert self.completed(small, small.model(method), **without) == (False, "off")

    def test_a_plan_of_which_the_user_froze_the_rest(self, small: SmallRun) -> None:
        model = small.model()
        model.bert.requires_grad_(False)
        assert self.completed(small, model) == (True, "off")

    def test_what_would_be_rounded_is_not_kept(self, small: SmallRun) -> None:
        model = small.model(PROBE, dtype=torch.float64)
        assert self.completed(small, model) == (False, "off")
        set_impl(model, "reference")
        losses = small.fit(model, epochs=2).losses
        other = small.model(PROBE, dtype=torch.float64)
        set_impl(other, "reference")
        config = small.settings(epochs=2)
        expected, _ = plain.fit(other, small.tokenizer, small.train, small.dev, config)
        assert list(losses) == expected

    @pytest.mark.parametrize("where", ["memory", "disk"])
    def test_dropout_and_a_cache(self, where: str) -> None:
        with pytest.raises(ConfigError, match="--no-dropout-in-group-1"):
            TrainConfig(cache_prefix=where, dropout_in_group_1=True)

    def test_the_record_says_what_was_used(self, small: SmallRun, tmp_path: Path) -> None:
        small.fit(small.model(PROBE), out=tmp_path / "run", epochs=1)
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert (record["method"], record["trainable"]) == ("Linear probing", 2 * D + 2)
        assert record["dropout_in_group_1"] is record["settings"]["dropout_in_group_1"] is False
        assert record["settings"]["cache_prefix"] == "memory"


class TestCommand:
    """Oracle: the run that Python makes, and its adapter on a fresh model."""

    def test_from_plan_to_prediction(
        self, small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model, data = str(small.folder), str(write_glue(tmp_path / "glue"))
        assert main(["plan", "linear-probe", "--model", model, "--num-labels", "2"]) == 0
        assert f"Linear probing: {2 * D + 2} of " in capsys.readouterr().out
        words = f"train --task rte --method linear-probe --model {model} --data {data} --seed 3"
        words += f" --epochs 2 --batch-size 6 --learning-rate 0.003 --quiet --out {tmp_path}/run"
        assert main(words.split()) == 0
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["settings"]["cache_prefix"] == "memory"
        assert main(["eval", str(tmp_path / "run")]) == 0
        score = record["result"]["metrics"]["accuracy"]
        assert f"{score:.4f}" in capsys.readouterr().out
        again = load_pretrained(small.folder, num_labels=2)
        load_adapter(again, tmp_path / "run" / "adapter.safetensors")
        dev = load("rte", "dev", tmp_path / "glue")
        assert evaluate(again, small.tokenizer, dev)["accuracy"] == score

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ([], (None, "auto")),
            (["--dropout-in-group-1"], (True, "auto")),
            (["--no-dropout-in-group-1", "--cache-prefix", "disk"], (False, "disk")),
        ],
    )
    def test_options(
        self, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: tuple[Any, str]
    ) -> None:
        made: list[TrainConfig] = []
        monkeypatch.setattr(training, "run_train", lambda *given: made.append(given[4]))
        assert main(["train", "--task", "rte", "--method", "linear-probe", *options]) == 0
        assert (made[0].dropout_in_group_1, made[0].cache_prefix) == expected


class TestPlain:
    """Oracle: ``plain.fit``, in the reference form. The head's dropout is on."""

    @pytest.mark.parametrize(
        ("settings", "tolerance"),
        [({}, 0.0), ({"dropout_in_group_1": False, "cache_prefix": "memory"}, 1e-6)],
        ids=str,
    )
    def test_bit_for_bit_and_from_what_is_kept_to_rounding(
        self, small: SmallRun, settings: dict[str, Any], tolerance: float
    ) -> None:
        ours, theirs = small.model(PROBE), small.model(PROBE)
        for model in (ours, theirs):
            set_impl(model, "reference")
        result = small.fit(ours, epochs=2, **settings)
        config = small.settings(epochs=2)
        losses, history = plain.fit(theirs, small.tokenizer, small.train, small.dev, config)
        assert np.abs(np.subtract(result.losses, losses)).max() <= tolerance
        assert list(result.history) == history
        for name, value in trained(ours).items():
            assert (value - trained(theirs)[name]).abs().max() <= tolerance

    def test_these_losses_depend_on_the_heads_dropout_alone(self, small: SmallRun) -> None:
        one = small.fit(small.model(PROBE), epochs=1)
        assert far(one, small.fit(small.model(PROBE, dropout=False), epochs=1)) > 1e-4
        assert far(one, small.fit(small.model(PROBE), epochs=1, **WITH_DROPOUT)) > 1e-4


class TestKept:
    """Oracle: the same run with nothing kept."""

    @pytest.mark.parametrize("where", ["memory", "disk"])
    @pytest.mark.parametrize("method", [PROBE, WITH_POOLER], ids=["head", "head and pooler"])
    def test_same_losses_and_every_example_once(
        self, small: SmallRun, encoded: list[int], method: Plan, where: str
    ) -> None:
        kept = {"dropout_in_group_1": False, "cache_prefix": where}
        ours, theirs = small.model(method), small.model(method)
        result = small.fit(ours, epochs=3, **kept)
        # The pooler that trains is given [CLS], for which no layer is run again.
        assert sorted(each for each in encoded if each) == [L] * (N + N_DEV)
        plain = small.fit(theirs, epochs=3, **OFF)
        assert far(result, plain) < 1e-6
        assert result.history == plain.history
        assert all((a - trained(theirs)[n]).abs().max() < 1e-6 for n, a in trained(ours).items())

    def test_micro_batches(self, small: SmallRun) -> None:
        ours = small.fit(small.model(PROBE, dropout=False), epochs=2, accumulation=3)
        assert far(ours, small.fit(small.model(PROBE, dropout=False), epochs=2, **OFF)) < 1e-6

    @pytest.mark.parametrize(
        ("method", "output", "vectors"),
        [(PROBE, "pooled", N), (WITH_POOLER, "first", N), ("spafit", "states", None)],
        ids=["head", "head and pooler", "SPAFIT"],
    )
    def test_one_vector_of_an_example(
        self, small: SmallRun, method: str | Plan, output: str, vectors: int | None
    ) -> None:
        model = small.model(method)
        encodings = encode(model, small.tokenizer, small.train, None)
        key = prefix_key(model, "1" * 64, dtype="float32", precision="float32")
        assert key.output == output
        with PrefixCache(encodings, key, folder=None, limit_bytes=2**20) as held:
            assert held.nbytes == 4 * D * (vectors or sum(encodings.lengths))

    def test_an_unknown_output(self, small: SmallRun) -> None:
        key = prefix_key(small.model(PROBE), "1" * 64, dtype="float32", precision="float32")
        with pytest.raises(ConfigError, match="states, first, pooled: 'logits'"):
            type(key)(**{**vars(key), "output": "logits"})

    def test_later_runs_on_the_same_disk(self, small: SmallRun, encoded: list[int]) -> None:
        """The same plan reads them; another, which keeps something else, computes its own."""
        disk = {"dropout_in_group_1": False, "cache_prefix": "disk", "epochs": 1}
        first = small.fit(small.model(PROBE), **disk)
        encoded.clear()
        assert small.fit(small.model(PROBE), **disk).losses == first.losses
        small.fit(small.model(PROBE), **{**disk, "seed": 9})
        assert encoded == []
        for method, layers in ((WITH_POOLER, L), ("spafit", 1)):
            encoded.clear()
            kept = small.fit(small.model(method), **disk)
            assert encoded.count(layers) == N + N_DEV
            assert far(kept, small.fit(small.model(method), epochs=1, **OFF)) < 1e-6

    @pytest.mark.parametrize("name", ["dense.weight", "dense.bias"])
    def test_the_pooler_belongs_to_the_key(self, small: SmallRun, name: str) -> None:
        keys = []
        for method in (PROBE, WITH_POOLER):
            model = small.model(method)
            for _ in range(2):
                keys.append(prefix_key(model, "1" * 64, dtype="float32", precision="float32"))
                with torch.no_grad():
                    model.bert.get_parameter(f"pooler.{name}").flatten()[-1] += 1e-3
        assert keys[0] != keys[1]
        assert keys[2] == keys[3]  # where it trains, it is run every time

    @pytest.mark.parametrize("part", ["pooler", "pooler.dense"])
    def test_a_pooler_with_a_hook_is_run_every_time(
        self, small: SmallRun, tmp_path: Path, encoded: list[int], part: str
    ) -> None:
        ours, theirs = small.model(PROBE), small.model(PROBE)
        for model in (ours, theirs):
            model.bert.get_submodule(part).register_forward_hook(lambda _, x, y: 1.5 * y)
        result = small.fit(ours, epochs=2, out=tmp_path / "run")
        assert len(encoded) == 2 * (N + N_DEV)
        assert result.losses == small.fit(theirs, epochs=2, **OFF).losses
        [note] = [row["note"] for row in read_log(tmp_path / "run", "note")]
        assert f"bert.{part} has a hook" in note and "computed every time" in note

    def test_a_pooler_of_ones_own_has_no_dropout_either(self, small: SmallRun) -> None:
        model = small.model(PROBE)
        model.bert.pooler = nn.Sequential(nn.Dropout(0.5), model.bert.pooler)  # type: ignore
        model.train()
        model.bert.freeze_dropout()
        assert not any(module.training for module in model.bert.pooler.modules())
        assert model.dropout.training

    def test_a_prefix_of_another_plan_is_refused(self, small: SmallRun) -> None:
        probe, other = small.model(PROBE), small.model()
        batch = encode(probe, small.tokenizer, small.train, None).packed(range(5))
        assert probe.bert.prefix(batch).shape == (5, D)
        for one, another in ((probe, other), (other, probe)):
            with pytest.raises(ConfigError, match="the prefix of this batch must have shape"):
                one.forward_packed(batch, another.bert.prefix(batch))

    def test_a_captured_step(self, small: SmallRun) -> None:
        def losses(step: Any) -> list[float]:
            step.model.train()
            step.model.bert.freeze_dropout()
            torch.manual_seed(1)
            found = []
            for fed in make_feed(small, epochs=2).batches():
                parts = [
                    part._replace(prefix=step.model.bert.prefix(part.batch))
                    for part in fed.micro_batches
                ]
                found.append(float(step(parts, 2.0**-7).loss))
            return found

        recorder = Recorder()
        ours = losses(captured(small.model(PROBE), recorder))
        assert ours == losses(eager(small.model(PROBE)))
        assert recorder.replays


class TestResumed:
    """Oracle: the same run, uninterrupted, bit for bit."""

    @pytest.mark.parametrize("where", ["memory", "disk"])
    def test_bit_for_bit(self, small: SmallRun, tmp_path: Path, where: str) -> None:
        settings = {"dropout_in_group_1": False, "cache_prefix": where, "epochs": 2}

        def model() -> Model:
            return small.model(PROBE)

        small.fit(model(), out=tmp_path / "whole", **settings)
        interrupted(small, tmp_path / "parts", [2, 7], model, **settings)
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))

    @pytest.mark.parametrize("name", ["dropout_in_group_1", "frozen_dropout"])
    def test_a_run_of_an_older_version(self, small: SmallRun, tmp_path: Path, name: str) -> None:
        """A head alone was trained with dropout below it then: the same command goes on with it."""

        def older(record: dict[str, Any]) -> None:
            record["settings"][name] = record["settings"].pop("dropout_in_group_1")

        small.fit(small.model(PROBE), out=tmp_path / "whole", epochs=2, **WITH_DROPOUT)
        out = tmp_path / "run"
        with stopped_after(7), pytest.raises(StoppedError):
            small.fit(small.model(PROBE), out=out, epochs=2, **WITH_DROPOUT)
        _edit(out / "run.json", older)
        small.fit(small.model(PROBE), out=out, epochs=2)
        assert not differences(everything(tmp_path / "whole"), everything(out))
        record = json.loads((out / "run.json").read_text())
        assert record["settings"]["dropout_in_group_1"] is True
        assert record["settings"]["cache_prefix"] == "off"

    def test_what_is_asked_for_is_not_overruled(self, small: SmallRun, tmp_path: Path) -> None:
        small.fit(small.model(PROBE), out=tmp_path, epochs=1, **WITH_DROPOUT)
        with pytest.raises(CheckpointError, match="dropout_in_group_1 is True, asked for is False"):
            small.fit(small.model(PROBE), out=tmp_path, epochs=1, **OFF)
        small.fit(small.model(PROBE), out=tmp_path, epochs=1, overwrite=True)
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["dropout_in_group_1"] is False

    def test_another_plan_is_refused_as_before(self, small: SmallRun, tmp_path: Path) -> None:
        small.fit(out=tmp_path, epochs=1, **OFF)
        with pytest.raises(CheckpointError, match="dropout_in_group_1 is False, asked for is True"):
            small.fit(out=tmp_path, epochs=1)

    @pytest.mark.parametrize("content", ["", "[]", '{"settings": 3}'])
    def test_a_damaged_record(self, small: SmallRun, tmp_path: Path, content: str) -> None:
        small.fit(small.model(PROBE), out=tmp_path, epochs=1)
        (tmp_path / "run.json").write_text(content)
        small.fit(small.model(PROBE), out=tmp_path, epochs=2)  # the checkpoint has it, too


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

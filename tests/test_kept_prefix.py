"""Training with the hidden states after group 1 kept, recomputed groups, and half weights.

Oracle: the same run without them. With group 1 in evaluation mode all compute the same function.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import N, SmallRun, read_log, trained

from spafit.bert import BertForSequenceClassification, BertModel
from spafit.errors import ConfigError, PlanError
from spafit.fingerprint import fingerprint
from spafit.inference import predict_logits
from spafit.kept_prefix import KeptPrefix
from spafit.methods import plan
from spafit.prefix_cache import PrefixCache, PrefixKey
from spafit.strata import frozen_stored_in
from spafit.train_config import TrainConfig

KEPT = {"frozen_dropout": False, "cache_prefix": "memory"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have the cache in a folder of the test's own."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many examples group 1 was computed of, apart from the rest, call by call."""
    counts: list[int] = []
    prefix = BertModel.prefix

    def spy(self: BertModel, batch: Any) -> torch.Tensor:
        counts.append(len(batch.layout.lengths))
        return prefix(self, batch)

    monkeypatch.setattr(BertModel, "prefix", spy)
    return counts


def values(model: BertForSequenceClassification, without: str = "nothing") -> torch.Tensor:
    named = trained(model).items()
    return torch.cat([tensor.flatten() for name, tensor in named if without not in name])


class TestSameTraining:
    """Oracle: ``frozen_dropout=False`` without a cache."""

    @pytest.mark.parametrize("where", ["memory", "disk"])
    def test_bit_for_bit_where_the_batches_are_the_same(
        self, small: SmallRun, computed: list[int], where: str
    ) -> None:
        """One batch an epoch: what is kept was computed in the batch that reads it."""
        same = {"batch_size": N, "epochs": 5, "frozen_dropout": False}
        ours, theirs = small.model(), small.model()
        kept = small.fit(ours, cache_prefix=where, **same)
        plain = small.fit(theirs, **same)
        assert kept.losses == plain.losses
        assert kept.history == plain.history
        assert torch.equal(values(ours), values(theirs))
        assert sorted(computed) == [len(small.dev), N]  # once, of five epochs

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_to_rounding_where_they_are_not(
        self, small: SmallRun, computed: list[int], accumulation: int
    ) -> None:
        ours, theirs = small.model(), small.model()
        kept = small.fit(ours, accumulation=accumulation, **KEPT)
        plain = small.fit(theirs, accumulation=accumulation, frozen_dropout=False)
        assert np.abs(np.subtract(kept.losses, plain.losses)).max() < 1e-6
        # A bias of the keys moves no probability: its gradient is rounding alone, and AdamW makes a
        # step of it all the same.
        ours_but, theirs_but = (values(model, without="key.bias") for model in (ours, theirs))
        assert (ours_but - theirs_but).abs().max() < 1e-6
        assert sum(computed) == N + len(small.dev)  # of four epochs

    def test_half_is_near(self, small: SmallRun) -> None:
        kept = small.fit(cache_dtype="half", **KEPT)
        plain = small.fit(frozen_dropout=False)
        difference = np.abs(np.subtract(kept.losses, plain.losses)).max()
        assert 0 < difference < 1e-2

    def test_group_1_without_dropout_is_another_training(self, small: SmallRun) -> None:
        """The paper's has dropout there, so that none of this is the default."""
        assert TrainConfig().cache_prefix == "off"
        assert TrainConfig().frozen_dropout
        off = small.fit(epochs=1, frozen_dropout=False)
        assert max(np.abs(np.subtract(off.losses, small.fit(epochs=1).losses))) > 1e-4

    def test_only_group_1_is_put_into_evaluation_mode(self, small: SmallRun) -> None:
        model = small.model()
        model.train()
        model.bert.freeze_dropout()
        assert model.bert.frozen_depth == 1
        assert not model.bert.embeddings.dropout.training
        assert [layer.training for layer in model.bert.encoder.layer] == [False, True, True, True]
        assert model.dropout.training
        assert model.training


class TestLaterRuns:
    """Oracle: the number of examples that group 1 is computed of."""

    @pytest.mark.parametrize(
        "changes",
        [{"seed": 8}, {"learning_rate": 1e-4}, {"method": "spafit-direct"}, {"epochs": 1}],
        ids=str,
    )
    def test_read_what_an_earlier_one_kept(
        self, small: SmallRun, computed: list[int], changes: dict[str, Any]
    ) -> None:
        disk = {"cache_prefix": "disk", "frozen_dropout": False}
        small.fit(**disk)
        assert sum(computed) == N + len(small.dev)
        computed.clear()
        changes = dict(changes)
        model = small.model(changes.pop("method", "spafit"))
        small.fit(model, **disk, **changes)
        assert computed == []

    def test_another_depth_or_length_is_computed_anew(
        self, small: SmallRun, computed: list[int]
    ) -> None:
        disk = {"cache_prefix": "disk", "frozen_dropout": False}
        small.fit(**disk)
        for model, changes in (
            (small.model(plan("SPAFIT-1-2-I", 4, r=5, alpha=7.0)), {}),
            (small.model(), {"max_length": 9}),
        ):
            computed.clear()
            small.fit(model, **disk, **changes)
            assert sum(computed) == N + len(small.dev)

    def test_what_is_damaged_is_computed_anew(
        self, small: SmallRun, computed: list[int], cache: Path, tmp_path: Path
    ) -> None:
        disk = {"cache_prefix": "disk", "frozen_dropout": False}
        first = small.fit(**disk)
        computed.clear()
        for path in (cache / "prefix").rglob("*"):
            if path.is_file():
                content = bytearray(path.read_bytes())
                content[len(content) // 2] ^= 8
                path.write_bytes(content)
        again = small.fit(out=tmp_path / "run", **disk)
        assert computed
        notes = [row["note"] for row in read_log(tmp_path / "run", "note")]
        assert len(notes) == 2  # of train and of dev
        assert all(str(cache) in note for note in notes)
        assert np.abs(np.subtract(first.losses, again.losses)).max() < 1e-6

    def test_the_record_says_which(self, small: SmallRun, tmp_path: Path) -> None:
        small.fit(out=tmp_path / "run", epochs=1, **KEPT)
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["dropout_in_group_1"] is False
        assert record["settings"]["cache_prefix"] == "memory"
        small.fit(out=tmp_path / "other", epochs=1)
        record = json.loads((tmp_path / "other" / "run.json").read_text())
        assert record["dropout_in_group_1"] is True


class TestRefusals:
    def test_dropout_and_a_cache(self) -> None:
        with pytest.raises(ConfigError, match="frozen_dropout=False"):
            TrainConfig(cache_prefix="memory")

    @pytest.mark.parametrize("method", ["full", "bitfit"])
    def test_nothing_to_keep(self, small: SmallRun, method: str) -> None:
        with pytest.raises(PlanError, match="no hidden state stays the same"):
            small.fit(small.model(plan(method, 4)), **KEPT)

    def test_more_than_the_limit(self, small: SmallRun) -> None:
        with pytest.raises(ConfigError, match="the limit is 1073; keep them as half"):
            small.fit(cache_limit_gib=1e-6, **KEPT)

    @pytest.mark.parametrize("recompute", [(0,), [2], (1.0,), "2"])
    def test_recompute(self, recompute: Any) -> None:
        with pytest.raises(ConfigError, match="recompute must be"):
            TrainConfig(recompute=recompute)


class TestRecompute:
    """Oracle: the same run without it, dropout on: the draws repeat."""

    @pytest.mark.parametrize("groups", [(2,), (3,), (2, 3), (1, 2, 3)])
    def test_same_training(self, small: SmallRun, groups: tuple[int, ...]) -> None:
        ours, theirs = small.model(), small.model()
        assert small.fit(ours, recompute=groups).losses == small.fit(theirs).losses
        assert torch.equal(values(ours), values(theirs))
        assert ours.bert.encoder.recomputed == set()


class TestFrozenWeightsInHalf:
    """Oracle: the same run under bf16 autocast with float32 weights, which rounds them at use."""

    def test_same_training(self, small: SmallRun, tmp_path: Path) -> None:
        bf16 = {"precision": "bf16", "epochs": 2}
        ours, theirs = small.model(), small.model()
        half = small.fit(ours, frozen_weights="half", out=tmp_path, **bf16)
        # LoRA's merged weight is summed from W before or after rounding: one bf16 rounding apart.
        assert np.abs(np.subtract(half.losses, small.fit(theirs, **bf16).losses)).max() < 2e-2
        # Afterwards they are the pre-trained ones again.
        for name, tensor in small.model().named_parameters():
            if name not in trained(ours):
                assert torch.equal(ours.get_parameter(name), tensor), name
        assert all(tensor.dtype == torch.float32 for tensor in trained(ours).values())
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["base_fingerprint"] == fingerprint(small.model())

    @pytest.mark.parametrize("method", ["spafit", "full"])
    def test_what_is_narrow_and_for_how_long(self, small: SmallRun, method: str) -> None:
        """Oracle: the names and shapes of what is frozen; the model before the block."""
        model = small.model(method)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        base = fingerprint(model)
        frozen = {
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() == 2 and "encoder" in name and not parameter.requires_grad
        }
        assert (len(frozen) == 0) == (method == "full")
        with pytest.raises(ZeroDivisionError), frozen_stored_in(model, torch.bfloat16):
            for name, parameter in model.named_parameters():
                expected = torch.bfloat16 if name in frozen else torch.float32
                assert parameter.dtype == expected, name
            assert model.adaptation is not None
            assert model.adaptation.base_fingerprint == base
            _ = 1 / 0
        after = model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())


def test_a_kept_prefix_gives_the_same_logits(small: SmallRun) -> None:
    """Oracle: prediction without it; every batch has rows that belong to no sequence, or none."""
    model = small.model()
    dev = small.dev
    encodings = small.tokenizer.encode(dev.texts_a, dev.texts_b, max_length=53)
    key = PrefixKey("0" * 64, 1, "1" * 64, model.config.hidden_size, 4, 1e-12, "float32", "float32")
    model.eval()
    with PrefixCache(encodings, key, folder=None, limit_bytes=2**30) as cache:
        kept = KeptPrefix(model, encodings, cache)
        for _ in range(2):  # computed, then read
            ours = predict_logits(model, encodings, batch_size=4, prefix=kept)
            assert np.abs(ours - predict_logits(model, encodings, batch_size=4)).max() < 1e-6

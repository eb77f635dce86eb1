"""Training with the hidden states after group 1 kept, recomputed groups, and half weights.

Oracle: the same run without them. With group 1 in evaluation mode all compute the same function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import LEARNING_RATE, N, SmallRun, read_log, trained

from spafit.bert import BertForSequenceClassification, BertModel
from spafit.errors import ConfigError, PlanError, TrainingError
from spafit.methods import plan
from spafit.strata import fingerprint, frozen_stored_in
from spafit.text.tokenization import Encodings
from spafit.training.inference import predict_logits
from spafit.training.optimisation import epoch_order
from spafit.training.prefix import kept as kept_prefix
from spafit.training.prefix.cache import PrefixCache, PrefixKey
from spafit.training.prefix.kept import KeptPrefix
from spafit.training.settings import TrainConfig, complete

KEPT = {"dropout_in_group_1": False, "cache_prefix": "memory"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have the cache in a folder of the test's own."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def values(model: BertForSequenceClassification, without: str = "nothing") -> torch.Tensor:
    named = trained(model).items()
    return torch.cat([tensor.flatten() for name, tensor in named if without not in name])


class TestSameTraining:
    """Oracle: ``dropout_in_group_1=False`` without a cache."""

    @pytest.mark.parametrize("where", ["memory", "disk"])
    def test_bit_for_bit_where_the_batches_are_the_same(
        self, small: SmallRun, computed: list[int], where: str
    ) -> None:
        """One batch an epoch: what is kept was computed in the batch that reads it."""
        same = {"batch_size": N, "epochs": 3, "dropout_in_group_1": False}
        ours, theirs = small.model(), small.model()
        kept = small.fit(ours, cache_prefix=where, **same)
        plain = small.fit(theirs, **same)
        assert kept.losses == plain.losses
        assert kept.history == plain.history
        assert torch.equal(values(ours), values(theirs))
        assert sorted(computed) == [len(small.dev), N]  # once, of three epochs

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_to_rounding_where_they_are_not(
        self, small: SmallRun, computed: list[int], accumulation: int
    ) -> None:
        ours, theirs = small.model(), small.model()
        kept = small.fit(ours, accumulation=accumulation, epochs=2, **KEPT)
        plain = small.fit(theirs, accumulation=accumulation, epochs=2, dropout_in_group_1=False)
        assert np.abs(np.subtract(kept.losses, plain.losses)).max() < 1e-6
        # A bias of the keys moves no probability: its gradient is rounding alone, and AdamW makes a
        # step of it all the same.
        ours_but, theirs_but = (values(model, without="key.bias") for model in (ours, theirs))
        assert (ours_but - theirs_but).abs().max() < 1e-3 * LEARNING_RATE
        assert sum(computed) == N + len(small.dev)  # of two epochs

    def test_half_is_near(self, small: SmallRun) -> None:
        kept = small.fit(cache_dtype="half", epochs=2, **KEPT)
        plain = small.fit(epochs=2, dropout_in_group_1=False)
        difference = np.abs(np.subtract(kept.losses, plain.losses)).max()
        assert 0 < difference < 1e-2

    def test_group_1_without_dropout_is_another_training(self, small: SmallRun) -> None:
        """The paper's has dropout there, so that none of this is the default."""
        completed = complete(small.settings(), small.model(), small.train)
        assert (completed.cache_prefix, completed.dropout_in_group_1) == ("off", True)
        off = small.fit(epochs=1, dropout_in_group_1=False)
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
        [{"seed": 8}, {"learning_rate": 1e-4}, {"method": "spafit-direct"}, {"epochs": 2}],
        ids=str,
    )
    def test_read_what_an_earlier_one_kept(
        self, small: SmallRun, computed: list[int], changes: dict[str, Any]
    ) -> None:
        disk = {"cache_prefix": "disk", "dropout_in_group_1": False, "epochs": 1}
        small.fit(**disk)
        assert sum(computed) == N + len(small.dev)
        computed.clear()
        changes = dict(changes)
        model = small.model(changes.pop("method", "spafit"))
        small.fit(model, **{**disk, **changes})
        assert computed == []

    def test_another_depth_or_length_is_computed_anew(
        self, small: SmallRun, computed: list[int]
    ) -> None:
        disk = {"cache_prefix": "disk", "dropout_in_group_1": False, "epochs": 1}
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
        disk = {"cache_prefix": "disk", "dropout_in_group_1": False, "epochs": 2}
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
        with pytest.raises(ConfigError, match="dropout_in_group_1=False"):
            TrainConfig(cache_prefix="memory")

    @pytest.mark.parametrize("method", ["full", "bitfit"])
    def test_nothing_to_keep(self, small: SmallRun, method: str) -> None:
        with pytest.raises(PlanError, match="no hidden state stays constant"):
            small.fit(small.model(plan(method, 4)), **KEPT)

    def test_more_than_the_limit(self, small: SmallRun) -> None:
        with pytest.raises(ConfigError, match="the limit is 1073; keep them as half"):
            small.fit(cache_limit_gib=1e-6, **KEPT)

    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            ("spafit", {"cache_prefix": "auto-disk", "cache_limit_gib": 1e-6}),
            ("spafit", {"cache_prefix": "auto-disk"}),  # the folder of the cache is a file
            (plan("linear-probe", 4), {"cache_limit_gib": 1e-9}),  # in memory, by "auto"
        ],
    )
    def test_what_nobody_asked_for_is_left_out(
        self, small: SmallRun, tmp_path: Path, cache: Path, method: Any, settings: dict[str, Any]
    ) -> None:
        """Oracle: the run with nothing kept."""
        cache.touch()
        usual = {"epochs": 1, "dropout_in_group_1": False}
        run = small.fit(small.model(method), out=tmp_path / "run", **usual, **settings)
        assert run.losses == small.fit(small.model(method), cache_prefix="off", **usual).losses
        [note] = [row["note"] for row in read_log(tmp_path / "run", "note")]
        assert note.endswith("; the output of the frozen layers is computed every time")

    def test_on_disk_wherever_it_can_be(self, small: SmallRun, cache: Path) -> None:
        """Oracle: where no dropout is, and layers are frozen."""
        for method, dropout, where in (
            ("spafit", False, "disk"),
            ("spafit", None, "off"),
            ("full", False, "off"),
            (plan("linear-probe", 4), None, "disk"),
        ):
            config = small.settings(cache_prefix="auto-disk", dropout_in_group_1=dropout)
            assert complete(config, small.model(method), small.train).cache_prefix == where
        together = complete(
            small.settings(cache_prefix="auto-disk", dropout_in_group_1=False),
            small.model(),
            small.train,
            shares=True,
        )
        assert together.cache_prefix == "disk"

    @pytest.mark.parametrize("recompute", [(0,), [2], (1.0,), "2"])
    def test_recompute(self, recompute: Any) -> None:
        with pytest.raises(ConfigError, match="recompute must be"):
            TrainConfig(recompute=recompute)


class TestRecompute:
    """Oracle: the same run without it, dropout on: the draws repeat."""

    def test_same_training(self, small: SmallRun) -> None:
        theirs = small.model()
        losses = small.fit(theirs, epochs=2).losses
        for groups in ((2,), (3,), (2, 3), (1, 2, 3)):
            ours = small.model()
            assert small.fit(ours, epochs=2, recompute=groups).losses == losses, groups
            assert torch.equal(values(ours), values(theirs)), groups
            assert ours.bert.encoder.recomputed == set(), groups


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
            if parameter.dim() == 2 and ".embeddings." not in name and not parameter.requires_grad
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


@contextmanager
def keep(model: BertForSequenceClassification, encodings: Encodings) -> Iterator[KeptPrefix]:
    """Keep hidden states in memory, in evaluation mode and without gradients."""
    size = model.config.hidden_size
    key = PrefixKey("0" * 64, 1, "1" * 64, size, "float32", "float32", "here")
    model.eval()
    with PrefixCache(encodings, key, folder=None, limit_bytes=2**30) as cache, torch.no_grad():
        yield KeptPrefix(model, encodings, cache)


def encode(small: SmallRun) -> Encodings:
    return small.tokenizer.encode(small.train.texts_a, small.train.texts_b, max_length=53)


def ask(kept: KeptPrefix, batches: list[list[int]]) -> None:
    """Ask for the states of batches, as a run does."""
    for rows in batches:
        batch = kept.encodings.packed(rows)
        assert len(kept(rows, batch)) == batch.layout.rows


def states(kept: KeptPrefix) -> torch.Tensor:
    """Read the states of all examples, which are kept by now."""
    assert not kept.cache.missing(range(N))
    return kept.cache.read(range(N))


ORDERS = {
    "one at a time": [[row] for row in range(N)],
    "from the end": [[row] for row in reversed(range(N))],
    "drawn": epoch_order(N, 3, 1).reshape(5, 5).tolist(),
    "drawn otherwise": epoch_order(N, 3, 2).reshape(5, 5).tolist(),
    "large": [list(range(19)), list(range(7, N))],
    "all": [list(range(N))],
}


def groups_of(kept: KeptPrefix) -> list[list[int]]:
    """Return the groups that a kept prefix computes together, in their order."""
    return list({id(group): group for group in kept._group_of.values()}.values())


class TestWhoAsksFirst:
    """Oracle: the states that were computed for another order of batches, bit for bit.

    25 examples in groups of 7, the last of 4.
    """

    @pytest.fixture(autouse=True)
    def groups_of_seven(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kept_prefix, "_GROUP", 7)

    @pytest.mark.parametrize("order", ORDERS)
    def test_does_not_matter(self, small: SmallRun, computed: list[int], order: str) -> None:
        model, encodings = small.model(), encode(small)
        found = []
        for batches in (ORDERS["one at a time"], ORDERS[order]):
            with keep(model, encodings) as kept:
                ask(kept, batches)
                found.append(states(kept))
            assert sorted(computed) == [4, 7, 7, 7]
            computed.clear()
        assert torch.equal(*found)

    def test_it_would_where_batches_decided(self, small: SmallRun) -> None:
        """Otherwise the test above would see nothing."""
        model, encodings = small.model().eval(), encode(small)
        lengths = encodings.lengths
        with torch.no_grad():
            whole = model.bert.prefix(encodings.packed(list(range(N))))[: sum(lengths)]
            alone = [model.bert.prefix(encodings.packed([row])) for row in range(N)]
        parts = torch.cat([each[:length] for each, length in zip(alone, lengths, strict=True)])
        assert 0 < (whole - parts).abs().max() < 1e-5

    def test_groups_are_of_like_length(self, small: SmallRun) -> None:
        encodings = encode(small)
        with keep(small.model(), encodings) as kept:
            groups = [sorted(encodings.lengths[row] for row in group) for group in groups_of(kept)]
        assert [len(group) for group in groups] == [7, 7, 7, 4]
        assert [length for group in groups for length in group] == sorted(encodings.lengths)

    def test_a_group_is_computed_once_for_all_that_a_batch_lacks(
        self, small: SmallRun, computed: list[int]
    ) -> None:
        with keep(small.model(), encode(small)) as kept:
            rows = groups_of(kept)[1][2:5] + groups_of(kept)[3][:1]
            ask(kept, [rows])
            assert computed == [7, 4]
            ask(kept, [rows, groups_of(kept)[1], groups_of(kept)[3]])
            assert computed == [7, 4]
            ask(kept, [groups_of(kept)[0][:1] + groups_of(kept)[1]])
            assert computed == [7, 4, 7]


class TestMemoryAtItsEnd:
    """Oracle: the states that were computed with enough of it, to rounding."""

    @pytest.fixture
    def room_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[int, BaseException], list[int]]:
        """Have group 1 fail beyond some examples at a time; gives how many were tried."""

        def limit(most: int, error: BaseException) -> list[int]:
            tried: list[int] = []
            prefix = BertModel.prefix

            def greedy(self: BertModel, batch: Any) -> torch.Tensor:
                tried.append(len(batch.layout.lengths))
                if tried[-1] > most:
                    raise error
                return prefix(self, batch)

            monkeypatch.setattr(BertModel, "prefix", greedy)
            return tried

        return limit

    @pytest.mark.parametrize(
        ("most", "tried"),
        [(25, [25]), (13, [25, 12, 13]), (7, [25, 12, 6, 6, 13, 6, 7])],
    )
    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=repr
    )
    def test_a_group_is_halved(
        self,
        small: SmallRun,
        room_for: Callable[[int, BaseException], list[int]],
        error: BaseException,
        most: int,
        tried: list[int],
    ) -> None:
        model, encodings = small.model(), encode(small)
        with keep(model, encodings) as kept:
            ask(kept, ORDERS["all"])
            expected = states(kept)
        found = room_for(most, error)
        orders = []
        for batches in (ORDERS["one at a time"], ORDERS["drawn"]):
            with keep(model, encodings) as kept:
                ask(kept, batches)
                assert (states(kept) - expected).abs().max() < 1e-5
                orders.append(states(kept))
            assert found == tried
            found.clear()
        assert torch.equal(*orders)  # which half an example is in is no matter of who asks

    def test_not_even_for_one(
        self, small: SmallRun, room_for: Callable[[int, BaseException], list[int]]
    ) -> None:
        tried = room_for(0, torch.OutOfMemoryError("CUDA out of memory"))
        with (
            pytest.raises(TrainingError, match=r"of one example \(CUDA out of memory\); truncate"),
            keep(small.model(), encode(small)) as kept,
        ):
            ask(kept, [[3]])
        assert tried == [25, 12, 6, 3, 1]

    def test_other_errors_pass_through(
        self, small: SmallRun, room_for: Callable[[int, BaseException], list[int]]
    ) -> None:
        tried = room_for(0, error := RuntimeError("CUDA error: device-side assert triggered"))
        with (
            pytest.raises(RuntimeError) as caught,
            keep(small.model(), encode(small)) as kept,
        ):
            ask(kept, [[3]])
        assert caught.value is error
        assert tried == [25]


def test_a_kept_prefix_gives_the_same_logits(small: SmallRun) -> None:
    """Oracle: prediction without it; every batch has rows that belong to no sequence, or none."""
    model = small.model()
    dev = small.dev
    encodings = small.tokenizer.encode(dev.texts_a, dev.texts_b, max_length=53)
    with keep(model, encodings) as kept:
        for _ in range(2):  # computed, then read
            ours = predict_logits(model, encodings, batch_size=4, prefix=kept)
            assert np.abs(ours - predict_logits(model, encodings, batch_size=4)).max() < 1e-6

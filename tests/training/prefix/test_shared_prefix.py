"""Runs of one process that share the output of the frozen layers.

Oracle: the same runs, each by itself with ``cache_prefix="memory"``, bit for bit; and the number of
examples that group 1 is computed of.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.interruptions import differences, everything, stopped_after
from support.small_runs import BATCH, N_DEV, N, SmallRun, loss_failing_from, read_log, trained

import spafit
from spafit.adapters import BiasDelta
from spafit.bert import BertForSequenceClassification, BertModel
from spafit.errors import ConfigError, PlanError, StoppedError, TrainingError
from spafit.methods import plan
from spafit.plans import Plan, Stratum
from spafit.text.tokenization import Encodings
from spafit.training.fit import fit
from spafit.training.prefix.cache import PrefixCache, PrefixKey
from spafit.training.prefix.shared import SharedPrefix
from spafit.training.result import Result
from spafit.training.settings import TrainConfig

KEPT: dict[str, Any] = {"dropout_in_group_1": False, "cache_prefix": "memory"}


def together(
    small: SmallRun,
    shared: SharedPrefix,
    model: BertForSequenceClassification | None = None,
    **changes: Any,
) -> Result:
    """Train a model, a fresh one where none is given, with what it shares with others."""
    model = small.model() if model is None else model
    settings = small.settings(**{"dropout_in_group_1": False, **changes})
    return fit(model, small.tokenizer, small.train, small.dev, settings, shared=shared)


class TestSameRuns:
    # The rates, too, and a method with the same group 1.
    MEMBERS: tuple[dict[str, Any], ...] = (
        {"seed": 3},
        {"seed": 4},
        {"seed": 5, "learning_rate": 1e-2, "batch_size": 7, "method": "spafit-direct", "epochs": 1},
    )

    def test_bit_for_bit_with_group_1_computed_once(
        self, small: SmallRun, computed: list[int], tmp_path: Path
    ) -> None:
        """Losses, dev scores, logs, adapters and the whole of the last checkpoint."""
        shared = SharedPrefix()
        for number, member in enumerate(self.MEMBERS):
            changes = {"epochs": 2, **member}
            method = changes.pop("method", "spafit")
            ours, theirs = small.model(method), small.model(method)
            folder, alone = tmp_path / f"{number}", tmp_path / f"{number} alone"
            computed.clear()
            found = together(small, shared, ours, out=folder, **changes)
            assert sum(computed) == (0 if number else N + N_DEV)
            computed.clear()
            expected = small.fit(theirs, out=alone, **KEPT, **changes)
            assert sum(computed) == N + N_DEV
            assert found.losses == expected.losses
            assert found.history == expected.history
            assert differences(trained(ours), trained(theirs)) == []
            assert differences(everything(folder), everything(alone)) == []
            assert read_log(folder, "note") == read_log(alone, "note") == []
            record = spafit.runs.record.read_run(folder / "run.json")
            assert record["settings"]["cache_prefix"] == "memory"

    def test_to_rounding_where_nothing_is_kept(self, small: SmallRun) -> None:
        """Oracle: ``dropout_in_group_1=False`` alone, the way it was before."""
        shared = SharedPrefix()
        together(small, shared, epochs=1)
        ours = together(small, shared, seed=4, epochs=1)
        plain = small.fit(seed=4, epochs=1, dropout_in_group_1=False)
        assert np.abs(np.subtract(ours.losses, plain.losses)).max() < 1e-6

    def test_bit_for_bit_where_the_batches_are_the_same(self, small: SmallRun) -> None:
        """One batch an epoch: what is kept was computed in the batch that reads it."""
        shared = SharedPrefix()
        for seed in (3, 4):
            same: dict[str, Any] = {"seed": seed, "batch_size": N, "epochs": 2}
            plain = small.fit(dropout_in_group_1=False, **same)
            assert together(small, shared, **same).losses == plain.losses

    def test_on_a_head_alone(self, small: SmallRun, computed: list[int]) -> None:
        """Linear probing, whose defaults are these: the pooled output is shared."""
        shared = SharedPrefix()
        for seed in (3, 4):
            computed.clear()
            model = small.model(plan("linear-probe", 4))
            ours = together(small, shared, model, seed=seed, dropout_in_group_1=None)
            assert sum(computed) == (N + N_DEV if seed == 3 else 0)
            theirs = small.fit(small.model(plan("linear-probe", 4)), seed=seed)
            assert ours.losses == theirs.losses

    def test_on_disk_a_file_is_shared_as_ever(
        self,
        small: SmallRun,
        computed: list[int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path))
        shared = SharedPrefix()
        for seed in (3, 4):
            together(small, shared, epochs=1, cache_prefix="disk", seed=seed)
        assert sum(computed) == N + N_DEV
        assert not shared._caches and any((tmp_path / "prefix").iterdir())


class TestWhatIsNotShared:
    def test_another_group_1_or_other_texts(self, small: SmallRun, computed: list[int]) -> None:
        shared = SharedPrefix()
        together(small, shared, epochs=1)
        for model, changes in (
            (small.model(plan("SPAFIT-1-2-I", 4, r=5, alpha=7.0)), {}),
            (small.model(), {"max_length": 9}),
            (small.model(), {"cache_dtype": "half"}),
        ):
            computed.clear()
            together(small, shared, model, epochs=1, **changes)
            assert sum(computed) == N + N_DEV, changes

    def test_what_a_run_has_trained_and_then_frozen(
        self, small: SmallRun, computed: list[int]
    ) -> None:
        """It is no other run's, so that it is not held after its phase either."""
        train = {"layer.output.LayerNorm": [BiasDelta()]}
        strata = [
            Stratum("low", 0, 0),
            Stratum("middle", 1, 2, train, freeze=1),
            Stratum("top", 3, 3, train),
        ]
        shared = SharedPrefix()
        for number in (0, 1):
            computed.clear()
            ours = together(small, shared, small.model(Plan("timed", 4, strata)), epochs=2)
            assert sum(computed) == (2 - number) * (N + N_DEV)
            assert len(shared._caches) == 2  # of train and dev
            theirs = small.fit(small.model(Plan("timed", 4, strata)), epochs=2, **KEPT)
            assert ours.losses == theirs.losses

    def test_train_and_dev_may_be_the_same_rows(self, small: SmallRun) -> None:
        config = small.settings(epochs=1, dropout_in_group_1=False)
        model, shared = small.model(), SharedPrefix()
        fit(model, small.tokenizer, small.train, small.train, config, shared=shared)
        assert len(shared._caches) == 2

    def test_what_was_computed_in_halves_for_lack_of_memory(
        self, small: SmallRun, computed: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is rounded otherwise than in a run by itself that has the memory."""
        prefix = BertModel.prefix

        def greedy(self: BertModel, batch: Any) -> torch.Tensor:
            if len(batch.layout.lengths) > 13:
                raise MemoryError
            return prefix(self, batch)

        shared = SharedPrefix()
        with monkeypatch.context() as patch:
            patch.setattr(BertModel, "prefix", greedy)
            together(small, shared, epochs=1)
        computed.clear()
        ours = together(small, shared, epochs=1, seed=4)
        assert computed == [N]  # dev's 11 fitted
        assert ours.losses == small.fit(epochs=1, seed=4, **KEPT).losses


class TestInterrupted:
    """Oracle: the uninterrupted run by itself."""

    def test_stopped_and_resumed_with_others(self, small: SmallRun, tmp_path: Path) -> None:
        """In the same process; tests/runs/test_sigkill.py has it in another."""
        shared, folder, alone = SharedPrefix(), tmp_path / "shared", tmp_path / "alone"
        with stopped_after(7), pytest.raises(StoppedError):
            together(small, shared, out=folder, epochs=2)
        together(small, shared, seed=4, epochs=1)
        together(small, shared, out=folder, epochs=2)
        small.fit(out=alone, epochs=2, **KEPT)
        assert differences(everything(folder), everything(alone)) == []

    def test_a_run_that_fails_leaves_the_others_theirs(
        self, small: SmallRun, computed: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shared = SharedPrefix()
        with monkeypatch.context() as patch:
            patch.setattr(spafit.training.step, "loss_function", loss_failing_from(2))
            with pytest.raises(TrainingError):
                together(small, shared, epochs=9)
        computed.clear()
        ours = together(small, shared, epochs=1, seed=4)
        assert computed == []
        assert ours.losses == small.fit(epochs=1, seed=4, **KEPT).losses


class TestRefusals:
    @pytest.mark.parametrize("changes", [{}, {"dropout_in_group_1": True}], ids=str)
    def test_dropout_in_group_1(
        self, small: SmallRun, changes: dict[str, Any], tmp_path: Path
    ) -> None:
        changes = {"dropout_in_group_1": None, **changes}
        with pytest.raises(ConfigError, match=r"\(--no-dropout-in-group-1\), or .* --together$"):
            together(small, SharedPrefix(), out=tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("method", ["bitfit", "full"])
    @pytest.mark.parametrize("dropout", [None, False])
    def test_no_frozen_layers(self, small: SmallRun, method: str, dropout: bool | None) -> None:
        """Whatever dropout is: there is nothing to switch it off for."""
        model = small.model(plan(method, 4))
        match = "so there are no frozen layers whose output runs could share"
        with pytest.raises(PlanError, match=match):
            together(small, SharedPrefix(), model, dropout_in_group_1=dropout)

    def test_nothing_is_kept(self, small: SmallRun) -> None:
        with pytest.raises(ConfigError, match=r'leave out cache_prefix="off" \(--cache-prefix off'):
            together(small, SharedPrefix(), cache_prefix="off")

    def test_more_than_the_limit(self, small: SmallRun) -> None:
        with pytest.raises(ConfigError, match="the limit is 1073; keep them as half"):
            together(small, SharedPrefix(), cache_limit_gib=1e-6)


class TestMemory:
    """Caches of 3 examples of 4 tokens and D = 5 float32 numbers: 240 bytes."""

    BYTES = 3 * 4 * 5 * 4

    @pytest.fixture
    def opened(self) -> Callable[..., Any]:
        """Open the cache of an imaginary model's states, by its number."""
        encodings = Encodings([[1, 2, 3, 4]] * 3, [[0] * 4] * 3, 0)

        def open_(shared: SharedPrefix, number: int, limit: int, name: str = "train") -> Any:
            key = PrefixKey(f"{number:064}", 1, "1" * 64, 5, "float32", "float32", "here")
            return shared.opened(name, encodings, key, limit)

        return open_

    def kept(self, opened: Callable[..., Any], shared: SharedPrefix, number: int) -> bool:
        """Open a cache and fill it; return whether it was filled already."""
        with opened(shared, number, 2 * self.BYTES) as cache:
            assert isinstance(cache, PrefixCache) and cache.nbytes == self.BYTES
            was = not cache.missing([0, 1, 2])
            cache.store([0, 1, 2], torch.ones(12, 5))
        return was

    def test_what_was_used_least_recently_makes_room(self, opened: Callable[..., Any]) -> None:
        shared = SharedPrefix()
        kept = [self.kept(opened, shared, number) for number in (0, 1, 0, 2, 0, 1, 2)]
        assert kept == [False, False, True, False, True, False, False]

    def test_but_nothing_that_is_in_use(self, opened: Callable[..., Any]) -> None:
        shared = SharedPrefix()
        with opened(shared, 0, self.BYTES) as cache:
            cache.store([0, 1, 2], torch.ones(12, 5))
            with opened(shared, 0, self.BYTES, "dev"):
                assert not cache.missing([0, 1, 2])
        with opened(shared, 0, self.BYTES) as cache:
            assert not cache.missing([0, 1, 2])

    def test_nor_is_it_another_run_s_at_the_same_time(self, opened: Callable[..., Any]) -> None:
        shared = SharedPrefix()
        with (
            opened(shared, 0, self.BYTES),
            pytest.raises(ConfigError, match="another run reads these"),
            opened(shared, 0, self.BYTES),
        ):
            pass
        with opened(shared, 0, self.BYTES):
            pass

    def test_a_run_s_own_limit_holds_for_what_is_there(self, opened: Callable[..., Any]) -> None:
        shared = SharedPrefix()
        self.kept(opened, shared, 0)
        with pytest.raises(ConfigError, match="the limit is 239"), opened(shared, 0, 239):
            pass


def test_the_settings_of_a_run_that_shares(small: SmallRun) -> None:
    """Only with what is shared: by itself ``"auto"`` keeps nothing here."""
    config = TrainConfig(dropout_in_group_1=False, batch_size=BATCH, device="cpu")
    for shares, where in ((True, "memory"), (False, "off")):
        completed = spafit.training.settings.complete(config, small.model(), small.train, shares)
        assert completed.cache_prefix == where

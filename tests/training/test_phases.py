"""Strata that thaw and freeze while a run trains.

Oracles: ``plain.fit``, bit for bit; a loop in plain torch over the same batches; the base and the
values at the beginning of a phase, bit for bit; the uninterrupted run.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.captured import Recorder, captured, eager, make_feed
from support.interruptions import differences, everything, interrupted
from support.small_runs import STEPS_AN_EPOCH, N, SmallRun, read_log, trained
from support.tiny_bert import L, batches, tiny_bert

import spafit
from spafit.adapters import BiasDelta, Full, LoRA
from spafit.bert import BertForSequenceClassification, BertModel
from spafit.errors import PlanError
from spafit.plans import Plan, Stratum, Trained
from spafit.training import plain
from spafit.training.loop import Loop
from spafit.training.prefix.cache import PrefixCache

TRAIN = {"query": [LoRA(3, 5.0, dropout=0.2)], "layer.output.LayerNorm": [BiasDelta()]}


def timed(*times: dict[str, Any]) -> Plan:
    """Give a plan of one layer a stratum."""
    strata = [
        Stratum(f"s{number}", number, number, TRAIN, **each) for number, each in enumerate(times)
    ]
    return Plan("timed", len(times), strata)


# Of 4 epochs of 5 steps. Frozen from the bottom; thawed from the top; and both at once.
FROM_BELOW = timed({"freeze": 1}, {"freeze": "50%"}, {"freeze": 3}, {})
FROM_ABOVE = timed({"thaw": 3}, {"thaw": "50%"}, {"thaw": 1}, {})
BOTH = timed({"thaw": 1, "freeze": 2}, {"freeze": "30%"}, {"thaw": "25%", "freeze": "90%"}, {})
PLANS = {"from below": FROM_BELOW, "from above": FROM_ABOVE, "both": BOTH}
# What trains after so many steps, layer by layer.
STARTS = {
    "from below": {0: "0123", 5: "123", 10: "23", 15: "3"},
    "from above": {0: "3", 5: "23", 10: "123", 15: "0123"},
    "both": {0: "13", 5: "0123", 6: "023", 10: "23", 18: "3"},
}
ALL = pytest.mark.parametrize("name", PLANS)


def layers_that_train(model: BertForSequenceClassification) -> str:
    layers = model.bert.encoder.layer
    return "".join(
        str(number)
        for number, layer in enumerate(layers)
        if any(each.requires_grad for each in layer.parameters())
    )


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, dict[str, torch.Tensor]]]:
    """Collect, before every step of a run, its number, what trains, and all values."""
    seen: list[tuple[int, str, dict[str, torch.Tensor]]] = []
    take = Loop._take

    def taking(self: Loop, fed: Any) -> None:
        seen.append((self.state.step, layers_that_train(self.model), trained(self.model)))
        take(self, fed)

    monkeypatch.setattr(Loop, "_take", taking)
    return seen


class TestTimes:
    @pytest.mark.parametrize(
        ("thaw", "freeze", "steps"),
        [
            (0, None, (0, 120)),
            (2, None, (60, 120)),
            (0.5, 3, (15, 90)),
            ("25%", "75%", (30, 90)),
            ("10%", 2, (12, 60)),
            (0, "100%", (0, 120)),
        ],
    )
    def test_in_steps(self, thaw: Any, freeze: Any, steps: tuple[int, int]) -> None:
        """Of 4 epochs of 30 steps."""
        how = Trained(thaw=thaw, freeze=freeze)
        assert how.steps(30, 120) == steps
        trains = [step for step in range(120) if how.trains_at(step, 30, 120)]
        assert trains == list(range(*steps))

    @pytest.mark.parametrize(
        ("thaw", "freeze"), [(2, 2), (3, 1), ("50%", "20%"), (0, 0), (0, "0%"), ("100%", None)]
    )
    def test_never_is_refused(self, thaw: Any, freeze: Any) -> None:
        with pytest.raises(
            PlanError, match=r"s: it would never train, for it (thaws|freezes) after \d"
        ):
            Stratum("s", 0, 0, TRAIN, thaw=thaw, freeze=freeze)

    @pytest.mark.parametrize("times", [{"thaw": 4}, {"thaw": "99%"}, {"thaw": 2, "freeze": "40%"}])
    def test_at_no_step_of_the_run_is_refused(
        self, small: SmallRun, tmp_path: Path, times: dict[str, Any]
    ) -> None:
        model = small.model(timed({}, times, {}, {}))
        with pytest.raises(
            PlanError,
            match=r"s1 \(layers 1\) would train at no step of this run of 4 epochs: it thaws",
        ):
            small.fit(model, out=tmp_path / "run")
        assert not (tmp_path / "run" / "run.json").exists()
        assert layers_that_train(model) == "0123"

    @pytest.mark.parametrize("part", ["embeddings", "pooler"])
    def test_of_what_follows_a_frozen_stratum_too(self, small: SmallRun, part: str) -> None:
        times: dict[str, Any] = {"thaw": 50} if part == "embeddings" else {"freeze": 0.001}
        low, high = ("a", "b") if part == "embeddings" else ("b", "a")
        both: dict[str, dict[str, Any]] = {"a": times, "b": {}}
        strata = [Stratum(low, 0, 1, **both[low]), Stratum(high, 2, 3, **both[high])]
        model = small.model(Plan("p", 4, strata, **{part: "full"}))
        with pytest.raises(PlanError, match=r"a \(layers \d-\d\) would train at no step"):
            small.fit(model)

    def test_nothing_at_all_is_refused(self, small: SmallRun) -> None:
        model = small.model(timed({"thaw": 1}, {"thaw": 1}, {"thaw": 1}, {"thaw": 1}))
        model.classifier.requires_grad_(False)
        with pytest.raises(PlanError, match="nothing trains after step 0"):
            small.fit(model)


class TestWhatTrains:
    @ALL
    def test_is_what_the_plan_says(self, small: SmallRun, watched: list[Any], name: str) -> None:
        """What is frozen stays as it is, bit for bit; what trains moves in every step."""
        model = small.model(PLANS[name])
        small.fit(model, learning_rate=1e-2)
        starts = STARTS[name]
        for step, layers, _ in watched:
            assert layers == starts[max(start for start in starts if start <= step)], step
        for (_, layers, before), (_, _, after) in itertools.pairwise(watched):
            for parameter, value in before.items():
                stays = ".layer." in parameter and parameter.split(".")[3] not in layers
                if stays or not parameter.endswith("lora_A"):  # A waits for B's first step
                    assert torch.equal(value, after[parameter]) == stays, parameter
        assert layers_that_train(model) == "0123"

    def test_moments_begin_at_the_thaw(self) -> None:
        """A loop in plain torch: an AdamW that is made when the stratum thaws."""
        plan = Plan("t", L, [Stratum("a", 0, 3, TRAIN, thaw=1), Stratum("b", 4, L - 1, TRAIN)])
        ours, theirs = tiny_bert(), tiny_bert()
        for model in (ours, theirs):
            spafit.adapt(model, plan)
            for module in model.modules():
                if hasattr(module, "dropout") and isinstance(module.dropout, float):
                    module.dropout = 0.0
        optimizer = torch.optim.AdamW(spafit.parameter_groups(ours, 1e-2))
        assert ours.adaptation is not None
        early = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
        late = {
            n: early.pop(n)
            for n in list(early)
            if n[:20] in {f"bert.encoder.layer.{k}" for k in range(4)}
        }
        for each in late.values():
            each.requires_grad_(False)
        decays = [0.01 if p.dim() > 1 else 0.0 for p in early.values()]
        optimizers = [
            torch.optim.AdamW(
                [
                    {"params": [p], "weight_decay": d}
                    for p, d in zip(early.values(), decays, strict=True)
                ],
                lr=1e-2,
            )
        ]
        for step, (inputs, labels) in enumerate(batches(6)):
            for name, how in ours.adaptation.trained.items():
                ours.get_parameter(name).requires_grad_(how.trains_at(step, 3, 6))
            if step == 3:
                for each in late.values():
                    each.requires_grad_(True)
                groups = [
                    {"params": [p], "weight_decay": 0.01 if p.dim() > 1 else 0.0}
                    for p in late.values()
                ]
                optimizers.append(torch.optim.AdamW(groups, lr=1e-2))
            for model, steps in ((ours, [optimizer]), (theirs, optimizers)):
                model.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(**inputs), labels)
                torch.autograd.backward(loss)
                for each_optimizer in steps:
                    each_optimizer.step()
        for name, value in trained(ours).items():
            assert (value - theirs.get_parameter(name)).abs().max() < 1e-12, name

    def test_what_the_user_froze_stays_frozen(self, small: SmallRun) -> None:
        model = small.model(FROM_ABOVE)
        frozen = "bert.encoder.layer.2.attention.self.query.lora_A"
        model.get_parameter(frozen).requires_grad_(False)
        before = trained(model)[frozen]
        small.fit(model, epochs=4)
        assert torch.equal(model.get_parameter(frozen), before)
        assert not model.get_parameter(frozen).requires_grad

    def test_the_embeddings_follow_the_lowest_stratum(
        self, small: SmallRun, watched: list[Any]
    ) -> None:
        strata = [
            Stratum("low", 0, 1, {"key": [Full()]}, freeze=1),
            Stratum("high", 2, 3, {"key": [Full()]}),
        ]
        small.fit(small.model(Plan("e", 4, strata, embeddings="full", pooler="full")), epochs=2)
        name = "bert.embeddings.LayerNorm.weight"
        values = [values[name] for _, _, values in watched]
        moved = [not torch.equal(a, b) for a, b in itertools.pairwise(values)]
        assert moved == [True] * STEPS_AN_EPOCH + [False] * (STEPS_AN_EPOCH - 1)
        pooler = [values["bert.pooler.dense.bias"] for _, _, values in watched]
        assert not torch.equal(pooler[-1], pooler[-2])


class TestRuns:
    @ALL
    @pytest.mark.parametrize("changes", [{}, {"dropout_in_group_1": False, "warmup": 0.2}], ids=str)
    def test_fit_is_plain_bit_for_bit(
        self, small: SmallRun, name: str, changes: dict[str, Any]
    ) -> None:
        ours, theirs = small.model(PLANS[name]), small.model(PLANS[name])
        for model in (ours, theirs):
            spafit.set_impl(model, "reference")
        result = small.fit(ours, **changes)
        config = small.settings(**changes)
        losses, history = plain.fit(theirs, small.tokenizer, small.train, small.dev, config)
        assert list(result.losses) == losses
        assert list(result.history) == history
        expected = trained(theirs)
        assert all(torch.equal(value, expected[each]) for each, value in trained(ours).items())
        assert layers_that_train(theirs) == "0123"

    @ALL
    def test_resumed_in_every_phase(self, small: SmallRun, tmp_path: Path, name: str) -> None:
        """Also at its first and last step, and with the output of frozen layers kept."""
        settings = {
            "save_every": 3,
            "eval_every": 5,
            "accumulation": 2,
            "dropout_in_group_1": False,
            "cache_prefix": "memory",
        }
        small.fit(small.model(PLANS[name]), out=tmp_path / "whole", **settings)
        interrupted(
            small,
            tmp_path / "parts",
            [1, 5, 6, 10, 14, 18],
            lambda: small.model(PLANS[name]),
            **settings,
        )
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))

    def test_the_log_says_what_thaws_and_freezes(self, small: SmallRun, tmp_path: Path) -> None:
        small.fit(small.model(BOTH), out=tmp_path)
        assert [row["note"] for row in read_log(tmp_path, "note")] == [
            "epoch 2, after step 5: s0 (layers 0) begins to train",
            "epoch 2, after step 5: s2 (layers 2) begins to train",
            "epoch 2, after step 6: s1 (layers 1) is frozen",
            "epoch 3, after step 10: s0 (layers 0) is frozen",
            "epoch 4, after step 18: s2 (layers 2) is frozen",
        ]

    @ALL
    def test_captured_steps_are_recorded_anew(self, small: SmallRun, name: str) -> None:
        """Oracle: the eager step, with the same change of what trains.

        No graph of the phase before is replayed, and each gradient has its memory beforehand.
        """
        found = []
        recorder = Recorder()
        for make in (lambda model: captured(model, recorder), eager):
            model = small.model(PLANS[name])
            step, losses = make(model), []
            assert model.adaptation is not None
            torch.manual_seed(1)
            model.train()
            feed = make_feed(small, epochs=4)
            for number, fed in enumerate(feed.batches()):
                if number in STARTS[name]:
                    how = model.adaptation.trained
                    step.train_only({n for n in how if how[n].trains_at(number, 5, 20)})
                    before, first = recorder.recordings, len(recorder.replays)
                    has_gradients = all(each.grad is not None for each in step.trained)
                    assert has_gradients or make is eager
                losses.append(float(step(fed.micro_batches, 2.0**-7).loss))
                assert all(number > before for number in recorder.replays[first:])
            found.append((losses, trained(model)))
        assert found[0][0] == found[1][0]
        assert not differences(found[0][1], found[1][1])

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"step": "compiled"}, marks=pytest.mark.full),
            {"precision": "bf16", "frozen_weights": "half"},
            {"recompute": (1, 2)},
        ],
        ids=str,
    )
    def test_other_steps(
        self, small: SmallRun, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They train what is thawed, and restore all that is frozen for the run."""
        if "step" in changes:
            import spafit.training.make_step as making

            compiled = making.compiled_forward
            monkeypatch.setattr(
                making, "compiled_forward", lambda model: compiled(model, backend="eager")
            )
        model = small.model(FROM_BELOW)
        fingerprint = spafit.fingerprint(model)
        result = small.fit(model, **changes)
        assert all(value == value for value in result.losses)
        assert spafit.fingerprint(model) == fingerprint
        assert layers_that_train(model) == "0123"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int]]:
    """Collect, each time that frozen layers are computed, their number and that of the examples."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    counts: list[tuple[int, int]] = []
    prefix = BertModel.prefix

    def spy(self: BertModel, batch: Any) -> torch.Tensor:
        counts.append((self.frozen_depth, len(batch.layout.lengths)))
        return prefix(self, batch)

    monkeypatch.setattr(BertModel, "prefix", spy)
    return counts


class TestKept:
    SETTINGS: ClassVar[dict[str, Any]] = {"dropout_in_group_1": False, "cache_prefix": "memory"}

    def of_depths(self, kept: list[tuple[int, int]]) -> dict[int, int]:
        found: dict[int, int] = {}
        for depth, examples in kept:
            found[depth] = found.get(depth, 0) + examples
        return found

    @pytest.mark.parametrize(
        ("name", "depths"), [("from below", [1, 2, 3]), ("from above", [3, 2, 1])]
    )
    def test_grows_and_shrinks(
        self, small: SmallRun, kept: list[tuple[int, int]], name: str, depths: list[int]
    ) -> None:
        """Each example of train and dev is computed once a phase; none where nothing is frozen."""
        kept_losses = small.fit(small.model(PLANS[name]), **self.SETTINGS).losses
        examples = N + len(small.dev)
        assert self.of_depths(kept) == dict.fromkeys(depths, examples)
        assert list(dict.fromkeys(depth for depth, _ in kept)) == depths
        kept.clear()
        losses = small.fit(small.model(PLANS[name]), dropout_in_group_1=False).losses
        assert not kept
        assert max(abs(a - b) for a, b in zip(losses, kept_losses, strict=True)) < 1e-5

    def test_it_is_freed_before_more_is_kept(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At no time there is more than one cache of train and one of dev."""
        counts, begin, close = [0], PrefixCache.__init__, PrefixCache.close

        def beginning(self: PrefixCache, *given: Any, **settings: Any) -> None:
            begin(self, *given, **settings)
            counts.append(counts[-1] + 1)

        def closing(self: PrefixCache) -> None:
            close(self)
            counts.append(counts[-1] - 1)

        monkeypatch.setattr(PrefixCache, "__init__", beginning)
        monkeypatch.setattr(PrefixCache, "close", closing)
        small.fit(small.model(FROM_BELOW), **self.SETTINGS)
        assert counts.count(2) > 1 and max(counts) == 2
        assert counts[-1] == 0

    def test_of_trained_layers_nothing_is_on_disk(
        self, small: SmallRun, kept: list[tuple[int, int]], tmp_path: Path
    ) -> None:
        """Layer 0 is as pre-trained, and in later runs too; layer 1 was trained in this run."""
        still = Stratum("still", 0, 0)
        plan = Plan("p", 4, [still, Stratum("a", 1, 1, TRAIN, freeze=2), Stratum("b", 2, 3, TRAIN)])
        settings = {**self.SETTINGS, "cache_prefix": "disk"}
        first = small.fit(small.model(plan), **settings)
        examples = N + len(small.dev)
        assert self.of_depths(kept) == {1: examples, 2: examples}
        assert len(list((tmp_path / "cache" / "prefix").glob("*.prefix"))) == 2  # train and dev
        kept.clear()
        assert small.fit(small.model(plan), **settings).losses == first.losses
        assert self.of_depths(kept) == {2: examples}

    def test_too_large_for_memory_is_refused_before_the_first_step(self, small: SmallRun) -> None:
        with pytest.raises(spafit.ConfigError, match="the limit is"):
            small.fit(small.model(FROM_ABOVE), **self.SETTINGS, cache_limit_gib=1e-9)

    def test_too_large_later_it_is_computed_every_time(
        self, small: SmallRun, tmp_path: Path
    ) -> None:
        """Nothing can be kept at first, so that this is seen when layers freeze."""
        model = small.model(FROM_BELOW)
        result = small.fit(model, out=tmp_path, **self.SETTINGS, cache_limit_gib=1e-9)
        notes = [row["note"] for row in read_log(tmp_path, "note")]
        assert sum("is computed every time" in note for note in notes) == 3
        assert result.losses == small.fit(small.model(FROM_BELOW), dropout_in_group_1=False).losses

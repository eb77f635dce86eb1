"""Whether a run is the one that was asked for, and which settings may change when it is resumed."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spafit.errors import CheckpointError
from spafit.methods import plan
from spafit.runs.identity import FREE, changes, require_same_run, require_trained_with
from spafit.training.settings import TrainConfig

FOLDER = Path("runs/rte")


def record() -> dict[str, Any]:
    """Return a record as a run makes it, before it is written."""
    config = TrainConfig(
        out="runs/rte", seed=3, batch_size=6, recompute=(2, 3), dropout_in_group_1=True
    )
    data = {
        name: {
            "source": f"/data/RTE/{name}.tsv",
            "sha256": digit * 64,
            "rows": rows,
            "bad_rows": 0,
            "truncated": 2,
        }
        for name, digit, rows in (("train", "1", 25), ("dev", "2", 11))
    }
    return {
        "task": "rte",
        "method": "SPAFIT-0-1-II",
        "about": {"model": "tiny", "commit": None},
        "settings": {**dataclasses.asdict(config), "out": "runs/rte"},
        "plan": json.loads(plan("SPAFIT-0-1-II", 4, r=5, alpha=7.0).to_json()),
        "data": data,
        "base_fingerprint": "a" * 64,
        "tokenizer_fingerprint": "b" * 64,
        "trainable": 1234,
        "pretrained": 56789,
        "versions": {"spafit": "1.0", "torch": "2.6.0"},
        "machine": {"platform": "Linux", "cpus": 2},
    }


def as_written(record: dict[str, Any]) -> Any:
    return json.loads(json.dumps(record))


def changed(where: str, value: Any, of: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a record with another value at a dotted place."""
    found = copy.deepcopy(record() if of is None else of)
    *folders, last = where.split(".")
    place: Any = found
    for key in folders:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    return found


# Of every setting that is not free, and of all that a run starts from: another value, and the name
# by which it is refused.
REFUSED: list[tuple[str, Any, str]] = [
    ("task", "mrpc", "task is 'rte', asked for is 'mrpc'"),
    ("method", "Full LoRA-I", "method is 'SPAFIT-0-1-II', asked for is 'Full LoRA-I'"),
    ("plan.strata.1.layers.0", 0, r"stratum 2 of the plan, layers\.0, is 1, asked for is 0"),
    ("plan.num_layers", 5, r"plan\.num_layers is 4, asked for is 5"),
    ("loss", "own.focal", r"loss is None, asked for is 'own\.focal'"),
    ("base_fingerprint", "c" * 64, "base_fingerprint is 'a+', asked for is 'c+'"),
    ("tokenizer_fingerprint", "c" * 64, "tokenizer_fingerprint is 'b+', asked for is 'c+'"),
    ("data.train.sha256", "3" * 64, r"data\.train\.sha256 is '1+', asked for is '3+'"),
    ("data.dev.sha256", "3" * 64, r"data\.dev\.sha256 is '2+', asked for is '3+'"),
    ("data.train.rows", 24, r"data\.train\.rows is 25, asked for is 24"),
    ("data.dev.bad_rows", 1, r"data\.dev\.bad_rows is 0, asked for is 1"),
    ("settings.seed", 4, "seed is 3, asked for is 4"),
    ("settings.order_seed", 5, "order_seed is None, asked for is 5"),
    ("settings.dropout_seed", 0, "dropout_seed is None, asked for is 0"),
    ("settings.batch_size", 7, "batch_size is 6, asked for is 7"),
    ("settings.learning_rate", 1e-3, r"learning_rate is None, asked for is 0\.001"),
    ("settings.weight_decay", 0.5, r"weight_decay is 0\.01, asked for is 0\.5"),
    ("settings.decay_biases", True, "decay_biases is False, asked for is True"),
    ("settings.warmup", 0.5, r"warmup is 0\.0, asked for is 0\.5"),
    ("settings.max_grad_norm", 0.0, r"max_grad_norm is 1\.0, asked for is 0\.0"),
    ("settings.max_length", 20, "max_length is None, asked for is 20"),
    ("settings.precision", "bf16", "precision is 'auto', asked for is 'bf16'"),
    ("settings.dropout_in_group_1", False, "dropout_in_group_1 is True, asked for is False"),
    ("settings.metric", "f1", "metric is None, asked for is 'f1'"),
    ("settings.class_weights", "balanced", "class_weights is None, asked for is 'balanced'"),
    ("settings.label_smoothing", 0.1, r"label_smoothing is 0\.0, asked for is 0\.1"),
    ("settings.cache_dtype", "half", "cache_dtype is 'float32', asked for is 'half'"),
]
ALLOWED: list[tuple[str, Any]] = [
    ("settings.out", "elsewhere/rte"),
    ("settings.epochs", 20),
    ("settings.accumulation", 2),
    ("settings.eval_every", 7),
    ("settings.save_every", 4),
    ("settings.keep_checkpoints", 3),
    ("settings.early_stopping", 2),
    ("settings.cache_prefix", "disk"),
    ("settings.cache_limit_gib", 1.5),
    ("settings.recompute", (2,)),
    ("settings.frozen_weights", "half"),
    ("settings.step", "captured"),
    ("settings.device", "cuda:1"),
    ("settings.overwrite", True),
    ("settings.quiet", True),
]


class TestRequireSameRun:
    """Oracle: the two tables above, which together have every setting that there is."""

    def test_the_same(self) -> None:
        require_same_run(FOLDER, record(), record())
        require_same_run(FOLDER, as_written(record()), record())  # a tuple is a list there

    @pytest.mark.parametrize(("where", "value", "named"), REFUSED, ids=lambda each: f"{each!s:.30}")
    def test_refused_by_name(self, where: str, value: Any, named: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            require_same_run(FOLDER, as_written(record()), changed(where, value))
        advice = "another folder, the same settings, or overwrite (--overwrite) to replace it"
        form = rf"runs/rte holds another run: {named}\. Give {re.escape(advice)}"
        assert re.fullmatch(form, str(caught.value))

    @pytest.mark.parametrize(("where", "value"), ALLOWED, ids=lambda each: f"{each!s:.30}")
    def test_allowed(self, where: str, value: Any) -> None:
        require_same_run(FOLDER, as_written(record()), changed(where, value))

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            ("data.train.source", "/moved/train.tsv"),
            ("data.dev.source", "dev.tsv"),
            ("plan.name", "mine"),
            ("plan.strata.1.name", "biases"),
            ("about", {"model": "the same, elsewhere"}),
            ("versions.torch", "2.7.0"),
            ("machine", {"platform": "Darwin"}),
        ],
    )
    def test_where_things_lie_and_who_computes_is_no_part_of_it(
        self, where: str, value: Any
    ) -> None:
        require_same_run(FOLDER, as_written(record()), changed(where, value))

    def test_a_label_may_be_called_like_a_source(self) -> None:
        of = record()
        of["settings"]["class_weights"] = {"a.source": 1.0, "b": 2.0}
        changed_weight = copy.deepcopy(of)
        changed_weight["settings"]["class_weights"]["a.source"] = 3.0
        with pytest.raises(CheckpointError, match=r"a\.source is 1\.0, asked for is 3\.0"):
            require_same_run(FOLDER, as_written(of), changed_weight)

    def test_every_setting_is_in_one_of_the_tables(self) -> None:
        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        places = [where for where, *_ in (*REFUSED, *ALLOWED)]
        found = [where.partition("settings.")[2] for where in places if "settings." in where]
        assert sorted(found) == sorted(fields)
        assert {where.partition(".")[2] for where, _ in ALLOWED} == FREE

    @pytest.mark.parametrize("key", ["seed", "warmup"])
    def test_a_setting_that_one_of_them_lacks(self, key: str) -> None:
        """As an older version's record may."""
        lacking = record()
        del lacking["settings"][key]
        with pytest.raises(CheckpointError, match=rf"{key} is None, asked for is"):
            require_same_run(FOLDER, lacking, record())
        with pytest.raises(CheckpointError, match=rf"{key} is .*, asked for is None"):
            require_same_run(FOLDER, record(), lacking)

    def test_a_setting_that_came_later(self) -> None:
        """Oracle: the value that every run had before the setting came."""
        lacking = record()
        del lacking["settings"]["label_smoothing"]
        require_same_run(FOLDER, lacking, record())
        with pytest.raises(CheckpointError, match=r"label_smoothing is 0\.0, asked for is 0\.1"):
            require_same_run(FOLDER, lacking, changed("settings.label_smoothing", 0.1))

    def test_seeds_apart_that_came_later(self) -> None:
        """Oracle: an older record has one seed for everything; so has one that names it thrice."""
        lacking, thrice = record(), record()
        del lacking["settings"]["order_seed"], lacking["settings"]["dropout_seed"]
        thrice["settings"] |= {"order_seed": 3, "dropout_seed": 3}
        thrice["about"] = {**thrice["about"], "init_seed": 3}
        for one in (lacking, record(), thrice):
            for other in (lacking, record(), thrice):
                require_same_run(FOLDER, one, other)
            for name in ("order_seed", "dropout_seed"):
                with pytest.raises(CheckpointError, match=f"{name} is None, asked for is 4"):
                    require_same_run(FOLDER, one, changed(f"settings.{name}", 4))
            with pytest.raises(CheckpointError, match="init_seed is None, asked for is 4"):
                require_same_run(FOLDER, one, changed("about.init_seed", 4))
        with pytest.raises(CheckpointError, match=r"seed is 3, asked for is 4\. Give"):
            require_same_run(FOLDER, lacking, changed("settings.seed", 4))

    def test_the_definition_of_a_task(self) -> None:
        """Records of before definitions were written have the labels alone."""
        ours = {**record(), "definition": {"name": "tickets", "scale": [0.0, 1.0]}}
        require_same_run(FOLDER, record(), ours)
        require_same_run(FOLDER, as_written(ours), ours)
        with pytest.raises(CheckpointError, match=r"definition\.scale\.1 is 1\.0, asked for is 2"):
            require_same_run(FOLDER, ours, changed("definition.scale.1", 2.0, ours))

    def test_a_free_setting_that_one_of_them_lacks(self) -> None:
        lacking = record()
        del lacking["settings"]["save_every"]
        require_same_run(FOLDER, lacking, record())

    def test_another_plan_of_the_same_name(self) -> None:
        other = changed("plan", json.loads(plan("SPAFIT-0-1-II", 4, r=6, alpha=7.0).to_json()))
        with pytest.raises(
            CheckpointError, match=r"run: stratum 3 of the plan, \S+ is 5, asked for is 6"
        ):
            require_same_run(FOLDER, record(), other)

    def test_an_older_plan_file_without_a_name(self) -> None:
        """It was called custom, and is now called by its file; the plan still counts."""
        old = changed("method", "custom", changed("plan.name", "custom"))
        require_same_run(FOLDER, old, changed("method", "mine", changed("plan.name", "mine")))
        with pytest.raises(CheckpointError, match=r"run: plan\.num_layers is 4, asked for is 5"):
            require_same_run(FOLDER, old, changed("plan.num_layers", 5))

    def test_of_another_method_the_name_is_enough(self) -> None:
        other = changed("method", "Full LoRA-I")
        other["plan"] = json.loads(plan("lora-i", 4, r=9).to_json())
        with pytest.raises(CheckpointError) as caught:
            require_same_run(FOLDER, record(), other)
        assert "plan." not in str(caught.value)

    def test_the_gravest_come_first_and_four_are_named(self) -> None:
        other = record()
        for where, value, _ in REFUSED:
            if "plan" not in where and where != "settings.seed":
                other = changed(where, value, other)
        other = changed("settings.seed", 4, other)
        with pytest.raises(CheckpointError) as caught:
            require_same_run(FOLDER, record(), other)
        message = str(caught.value)
        names = ["task", "loss", "method", "base_fingerprint"]
        places = [message.index(f"{name} is ") for name in names]
        assert places == sorted(places)
        assert message.count(" asked for is ") == 4
        differing = sum("plan" not in where for where, *_ in REFUSED)
        assert f"; and {differing - 4} more. Give" in message


LOADED: dict[str, Any] = {
    "task": "rte",
    "labels": ["entailment", "not_entailment"],
    "base_fingerprint": "a" * 64,
    "base_config": {"layer_norm_eps": 1e-12, "pad_token_id": None},
    "tokenizer_fingerprint": "b" * 64,
}


class TestRequireTrainedWith:
    """Oracle: one entry changed at a time."""

    def test_the_same(self) -> None:
        require_trained_with(FOLDER, as_written({**record(), **LOADED}), LOADED)

    @pytest.mark.parametrize(
        ("where", "value", "named"),
        [
            ("task", "qnli", "task is 'rte', loaded is 'qnli'"),
            ("labels", ["a", "not_entailment"], "labels.0 is 'entailment', loaded is 'a'"),
            ("labels", None, "labels.0 is 'entailment', loaded is None"),
            ("labels", ["entailment"], "labels.1 is 'not_entailment', loaded is None"),
            ("base_fingerprint", "c" * 64, "base_fingerprint is 'a+', loaded is 'c+'"),
            ("base_config.layer_norm_eps", 0.05, "layer_norm_eps is 1e-12, loaded is 0.05"),
            ("base_config.pad_token_id", 0, "base_config.pad_token_id is None, loaded is 0"),
            ("tokenizer_fingerprint", "c" * 64, "tokenizer_fingerprint is 'b+', loaded is 'c+'"),
        ],
    )
    def test_refused_by_name(self, where: str, value: Any, named: str) -> None:
        found = changed(where, value, LOADED)
        with pytest.raises(CheckpointError, match=named) as caught:
            require_trained_with(FOLDER, as_written({**record(), **LOADED}), found)
        start = "runs/rte holds a run that was trained with something else: "
        assert str(caught.value).startswith(start)

    @pytest.mark.parametrize("key", ["initializer_range", "hidden_dropout_prob"])
    def test_what_no_score_depends_on_may_differ(self, key: str) -> None:
        trained = changed(f"base_config.{key}", 0.1, LOADED)
        require_trained_with(FOLDER, trained, changed(f"base_config.{key}", 0.2, LOADED))

    def test_a_label_more_is_refused_too(self) -> None:
        more = {**LOADED, "labels": ["entailment", "not_entailment", "neutral"]}
        with pytest.raises(CheckpointError, match=r"labels\.2 is None, loaded is 'neutral'"):
            require_trained_with(FOLDER, LOADED, more)

    def test_what_an_older_record_lacks_is_not_compared(self) -> None:
        older = {**LOADED, "base_config": {"pad_token_id": None}}
        for key in ("labels", "tokenizer_fingerprint"):
            del older[key]
        require_trained_with(FOLDER, older, LOADED)
        require_trained_with(FOLDER, {}, LOADED)

    @pytest.mark.parametrize("value", [None, 7, "x" * 10**6, [1], {"a\nb": {}}])
    def test_a_hostile_record_is_one_line(self, value: Any) -> None:
        for key in ("task", "labels", "base_fingerprint", "tokenizer_fingerprint"):
            with pytest.raises(CheckpointError) as caught:
                require_trained_with(FOLDER, {**LOADED, key: value}, LOADED)
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 1100

    @pytest.mark.parametrize("kind", [list, dict])
    def test_a_nested_one(self, kind: type) -> None:
        with pytest.raises(CheckpointError, match="record is damaged"):
            require_trained_with(FOLDER, {"task": nested(kind, 900)}, LOADED)


class TestHostileRecords:
    """Oracle: one line of a length that can be read, whatever a file holds."""

    @pytest.mark.parametrize("old", [None, [], "rte", 7, True, float("nan")])
    def test_no_object(self, old: Any) -> None:
        with pytest.raises(CheckpointError, match=r"^runs/rte holds a run whose record is damaged"):
            require_same_run(FOLDER, old, record())

    @pytest.mark.parametrize(
        "change",
        [
            lambda old: old.clear(),
            lambda old: old.update(task="x" * 10**6),
            lambda old: old.update(task="a\nb"),
            lambda old: old.update(task=[[], {}, [None] * 1000]),
            lambda old: old.update(plan=None),
            lambda old: old.update(data=7),
            lambda old: old.update(data={"train": {"sha256": {}}}),
            lambda old: old.update(settings=None),
            lambda old: old.update(settings=[1]),
            lambda old: old["settings"].update(seed=10**4000),
            lambda old: old["settings"].update(seed={"seed": 3}),
            lambda old: old["settings"].update({"k" * 10**6: 1}),
            lambda old: old["settings"].update({"line\nfeed\x1b[2J": 1}),
            lambda old: old["settings"].update({"": 1, ".": 2, "\0": 3, "é": 4, "\ud800": 5}),
            lambda old: old["data"].update({f"{number}\n": {} for number in range(1000)}, x=1),
            lambda old: old.update(plan=nested(list, 900)),
            lambda old: old.update(plan=nested(dict, 900)),
        ],
    )
    def test_one_readable_line(self, change: Callable[[Any], object]) -> None:
        old = as_written(record())
        change(old)
        with pytest.raises(CheckpointError) as caught:
            require_same_run(FOLDER, old, record())
        message = str(caught.value)
        assert message.startswith("runs/rte holds ")
        assert message.isprintable()
        assert len(message) < 1100


def nested(kind: type, depth: int) -> Any:
    """Nest lists or objects, deeper than Python's functions may call each other."""
    found: Any = 1
    for _ in range(max(depth, sys.getrecursionlimit() + 10)):
        found = [found] if kind is list else {"k": found}
    return found


class TestChanges:
    """Oracle: the tables above, with both values."""

    def test_nothing(self) -> None:
        assert changes(as_written(record()), record()) == {}

    @pytest.mark.parametrize(("where", "value"), ALLOWED, ids=lambda each: f"{each!s:.30}")
    def test_every_free_setting(self, where: str, value: Any) -> None:
        name = where.partition(".")[2]
        before = as_written(record())["settings"][name]
        after = list(value) if isinstance(value, tuple) else value
        assert changes(as_written(record()), changed(where, value)) == {name: [before, after]}

    def test_versions_and_the_machine(self) -> None:
        other = changed("versions.torch", "2.7.0")
        other["machine"] = {"platform": "Linux", "cpus": 8, "gpu": "Tesla V100"}
        assert changes(as_written(record()), other) == {
            "machine.cpus": [2, 8],
            "machine.gpu": [None, "Tesla V100"],
            "versions.torch": ["2.6.0", "2.7.0"],
        }

    def test_the_library_of_products(self) -> None:
        """It rounds otherwise; a record that lacks it may have had any."""
        old, new = {**record(), "products": "mkl"}, {**record(), "products": "onednn"}
        assert changes(as_written(old), new) == {"products": ["mkl", "onednn"]}
        assert changes(as_written(record()), new) == {"products": [None, "onednn"]}

    def test_nothing_else(self) -> None:
        """What makes another run is refused, not listed; and where data lie is nobody's matter."""
        other = changed("settings.seed", 4, changed("data.train.source", "elsewhere"))
        other["about"] = {}
        assert changes(record(), other) == {}

    def test_json_has_it(self) -> None:
        found = changes(record(), changed("settings.recompute", (1, 2)))
        assert json.loads(json.dumps(found)) == found == {"recompute": [[2, 3], [1, 2]]}

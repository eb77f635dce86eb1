"""Plans as JSON: round trips, files written by hand, and everything that can be wrong in one.

The oracle is the plan that was written; and for a damaged file, that it is refused with a PlanError
that says what is wrong and where, or is a sound plan all the same.
"""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spafit.adapters import BiasDelta, DirectBias, Full, LoRA, SeriesAdapter
from spafit.errors import PlanError
from spafit.methods import METHODS, plan
from spafit.plans import MODULES, PLACES, Plan, Stratum
from spafit.techniques import TECHNIQUES, Technique

LORAS = st.builds(
    LoRA,
    r=st.integers(1, 99),
    alpha=st.floats(1e-3, 1e3) | st.integers(1, 512),
    dropout=st.just(0.0) | st.floats(0, 1, exclude_max=True),
)
BIASES = st.sampled_from([BiasDelta(), DirectBias()])


def tables() -> Any:
    """Any possible table of a stratum."""
    lone = st.sampled_from([[BiasDelta()], [DirectBias()], [Full()]])
    on_linear = lone | LORAS.map(lambda lora: [lora]) | st.tuples(LORAS, BIASES).map(list)
    norms = {module for module in MODULES if module.endswith("LayerNorm")}
    return st.fixed_dictionaries(
        {},
        optional={module: lone if module in norms else on_linear for module in MODULES},
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan of 1 to 6 strata."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    strata, first = [], 0
    for length in lengths:
        strata.append(Stratum(draw(st.text()), first, first + length - 1, draw(tables())))
        first += length
    modes = st.sampled_from(["frozen", "full"])
    return Plan(draw(st.text()), first, strata, embeddings=draw(modes), pooler=draw(modes))


BY_HAND = """
{
  "format": "spafit-plan-1",
  "num_layers": 6,
  "strata": [
    {"layers": [0, 1]},
    {"layers": [2, 2], "name": "middle", "train": {"layer.output.LayerNorm": "bias-direct"}},
    {"layers": [3, 5], "train": {
        "query": "lora",
        "attention.self.key": {"lora": {"r": 8, "alpha": 24}},
        "attention.output.dense": ["bias-delta", {"lora": {"r": 3}}],
        "intermediate.dense": "full"
    }}
  ]
}
"""


def by_hand() -> dict[str, Any]:
    """Return a fresh copy of the terse plan, as entries."""
    entries: dict[str, Any] = json.loads(BY_HAND)
    return entries


def by_layer(plan: Plan) -> list[dict[str, tuple[Technique, ...]]]:
    """Write a plan out layer by layer."""
    return [
        {module: tuple(techniques) for module, techniques in stratum.train.items()}
        for stratum in plan.strata
        for _ in range(stratum.first, stratum.last + 1)
    ]


class TestJson:
    """Oracle: the plan that was written."""

    @pytest.mark.parametrize("numbering", ["table-2", "text"])
    @pytest.mark.parametrize("bias", ["delta", "direct"])
    @pytest.mark.parametrize("method", METHODS)
    def test_round_trip_of_every_method(
        self, method: str, bias: str, numbering: str, tmp_path: Path
    ) -> None:
        made = plan(method, 24, r=5, alpha=0.1, lora_dropout=1 / 3, bias=bias, numbering=numbering)
        assert Plan.from_json(made.to_json()) == made
        for name in ("mine.json", "MINE2.JSON"):
            path = tmp_path / name
            path.write_text(made.to_json(), encoding="utf-8")
            assert plan(path, 24) == plan(str(path), 24) == made

    @given(plans())
    @settings(max_examples=150, deadline=None)
    def test_round_trip_of_any_plan(self, made: Plan) -> None:
        text = made.to_json()
        again = Plan.from_json(text)
        assert again == made
        assert again.to_json() == text
        assert plan(again, made.num_layers) is again

    def test_a_plan_file_written_by_hand(self, tmp_path: Path) -> None:
        path = tmp_path / "by_hand"  # a Path needs no suffix
        path.write_text(BY_HAND, encoding="utf-8")
        made = plan(path, 6)
        late: dict[str, tuple[Technique, ...]] = {
            "layer.attention.self.query": (LoRA(64, 128.0, 0.0),),
            "layer.attention.self.key": (LoRA(8, 24.0, 0.0),),
            "layer.attention.output.dense": (BiasDelta(), LoRA(3, 128.0, 0.0)),
            "layer.intermediate.dense": (Full(),),
        }
        assert by_layer(made) == [
            {},
            {},
            {"layer.output.LayerNorm": (DirectBias(),)},
            late,
            late,
            late,
        ]
        assert (made.embeddings, made.pooler) == ("frozen", "frozen")
        assert made.strata[1].name == "middle"

    def test_settings_beside_a_plan_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.json"
        path.write_text(BY_HAND, encoding="utf-8")
        for method in (path, str(path), Plan.from_json(BY_HAND)):
            for setting in (
                {"r": 8},
                {"alpha": 16.0},
                {"lora_dropout": 0.0},
                {"bias": "delta"},
                {"numbering": "table-2"},
            ):
                with pytest.raises(PlanError, match="states its own"):
                    plan(method, 6, **setting)
            with pytest.raises(PlanError, match="is for 6 layers, the model has 7"):
                plan(method, 7)

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "folder.json").mkdir()
        (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\xff")
        for name in ("missing.json", "folder.json", "bytes.json"):
            with pytest.raises(PlanError, match=f"the plan file .*{name} cannot be read"):
                plan(tmp_path / name, 6)

    def test_errors_name_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.json"
        for text in ("{", BY_HAND.replace("query", "ouput.dense")):
            path.write_text(text, encoding="utf-8")
            with pytest.raises(PlanError, match=re.escape(str(path))):
                plan(path, 6)


#: In short, and what it means.
SHORT: list[tuple[dict[str, Any], Plan]] = [
    ({"strata": [{"layers": "0-23", "train": {"all": "bias-direct"}}]},
     plan("bitfit", 24, bias="direct")),
    ({"strata": [{"layers": "0-11", "train": {"query,key , value": "lora"}}]}, plan("lora-i", 12)),
    ({"strata": [{"layers": "0", "train": {"all": "full"}}],
      "embeddings": "full", "pooler": "full"}, plan("full", 1)),
    ({"strata": [{"layers": "0-4"}, {"layers": "5 - 9", "train": {"all": "bias-delta"}},
                 {"layers": [10, 23], "train": {
                     "query, key, value, attention.output.dense": {"lora": {"r": 8}},
                     "intermediate.dense, layer.output.dense, layer.output.LayerNorm":
                         "bias-delta"}}]}, plan("SPAFIT-4-9-II", 24, r=8)),
    ({"strata": [{"layers": "0-5", "train": {"attention.output, layer.output": "series"}}]},
     plan("houlsby", 6)),
    ({"strata": [{"layers": "0-5", "train": {
        "key, value": "ia3", "layer.output.dense": {"ia3": {"of": "input"}}}}]}, plan("ia3", 6)),
]  # fmt: skip


class TestShort:
    """Oracle: the plans of the methods, and tables written out."""

    @pytest.mark.parametrize(
        ("entries", "meant"), SHORT, ids=lambda each: getattr(each, "name", "")
    )
    def test_methods(self, entries: dict[str, Any], meant: Plan) -> None:
        made = Plan.from_json(json.dumps(entries))
        assert by_layer(made) == by_layer(meant)
        assert (made.embeddings, made.pooler) == (meant.embeddings, meant.pooler)
        assert Plan.from_json(made.to_json()) == made

    def test_all_and_a_module_add_up(self) -> None:
        """In whatever order; the ends of the sub-layers hold no parameters and are not of all."""
        train = {"query": {"lora": {"r": 8}}, "all": "bias-delta", "layer.output": "series"}
        for order in (train, dict(reversed(train.items()))):
            made = Plan.from_json(json.dumps({"strata": [{"layers": "0", "train": order}]}))
            expected: dict[str, tuple[Technique, ...]] = dict.fromkeys(MODULES, (BiasDelta(),))
            expected[MODULES[0]] = (BiasDelta(), LoRA(8))
            assert by_layer(made) == [{**expected, "layer.output": (SeriesAdapter(),)}]

    def test_in_python_too(self) -> None:
        train = {"query, key": [LoRA(8)], "all": [BiasDelta()]}
        made = Stratum("mine", 0, 0, train).train
        assert made["layer.attention.self.key"] == (BiasDelta(), LoRA(8))
        assert list(made) == list(MODULES)

    def test_names(self, tmp_path: Path) -> None:
        text = '{"strata": [{"layers": "0"}, {"layers": "1", "name": "top"}, {"layers": "2"}]}'
        path = tmp_path / "my own.json"
        path.write_text(text, encoding="utf-8")
        made = plan(path, 3)
        assert made.name == "my own"
        assert [stratum.name for stratum in made.strata] == ["group 1", "top", "group 3"]
        assert Plan.from_json(text).name == "custom"

    def test_settings(self) -> None:
        text = """{"rate_decay": 0.9, "strata": [{"layers": "0", "rate": 0.5, "dropout": 0,
            "train": {"all": {"bias-delta": {"rate": 2}}}}]}"""
        made = Plan.from_json(text)
        [stratum] = made.strata
        assert (made.rate_decay, stratum.rate, stratum.dropout) == (0.9, 0.5, 0)
        assert {each[0].rate for each in stratum.train.values()} == {2}
        assert Plan.from_json(made.to_json()) == made


Where = tuple[str | int, ...]
TRAIN: Where = ("strata", 2, "train")


#: What is wrong in the third of three strata -> what the message says after the file's name.
PLACED: list[tuple[str, Any, str]] = [
    ("trian", {}, "stratum 3: a stratum has no setting trian (did you mean train?); there are "),
    ("weight-decay", 0.1, "stratum 3: a stratum has no setting weight-decay (did you mean wei"),
    ("name", 3, "stratum 3: a name must be text"),
    ("layers", "2..3", 'stratum 3, group 3: "layers" must be'),
    ("layers", "3-2", "stratum 3, group 3: layers 3-2 are none at all"),
    ("rate", 0, "stratum 3, group 3: rate, a factor of the learning rate, must be"),
    ("dropout", 1, "stratum 3, group 3: dropout must be"),
    ("freeze", "half", "stratum 3, group 3: freeze must be"),
    ("train", [], 'stratum 3, group 3: "train" must map'),
    ("train", {"qery": "lora"}, "stratum 3, group 3: the entry 'qery' matches no module of a layer"
        " (did you mean query?)"),
    ("train", {"key, attention.output.dens": "lora"}, "stratum 3, group 3: the entry"
        " 'attention.output.dens' matches no module of a layer (did you mean attention.output.d"),
    ("train", {"All": "lora"}, "stratum 3, group 3: the entry 'All' matches no module of a layer "
        "(did you mean all?)"),
    ("train", {"dens": "lora"}, "stratum 3, group 3: the entry 'dens' matches no module of a layer;"
        " there are"),
    ("train", {"query,": "lora"}, "stratum 3, group 3: the entry '' matches no module"),
    ("train", {"query, key": "LORA"}, "stratum 3, group 3, query, key: \"LORA\" is no technique "
        "(did you mean lora?)"),
    ("train", {"query": [{"lora": {}}, {"bias_delta": {}}]}, "stratum 3, group 3, query: "
        '"bias_delta" is no technique (did you mean bias-delta?)'),
    ("train", {"query": {"lora": {"ranks": 8}}}, "stratum 3, group 3, query: the technique lora has"
        " no setting ranks"),
    ("train", {"layer.output": {"series": {"botleneck": 8}}}, "stratum 3, group 3, layer.output: "
        "the technique series has no setting botleneck (did you mean bottleneck?)"),
    ("train", {"layer.output": {"series": {"bottleneck": 0}}}, "stratum 3, group 3, layer.output: "
        "series: bottleneck must be"),
    ("train", {"key": {"ia3": {"of": "x"}}}, 'stratum 3, group 3, key: (IA)³ is of the "output"'),
    ("train", {"key": {"lora": {"rate": -1}}}, "stratum 3, group 3, layer.attention.self.key: lora:"
        " rate, a factor"),
    ("train", {"all": "lora"}, "stratum 3, group 3, layer.attention.output.LayerNorm: LoRA needs a "
        "Linear, found a LayerNorm"),
    ("train", {"all": "bias-delta", "key": "bias-direct"}, "stratum 3, group 3, "
        "layer.attention.self.key: bias-delta and bias-direct cannot be attached"),
    ("train", {"all": "bias-delta", "key": "bias-delta"}, "stratum 3, group 3, "
        "layer.attention.self.key: bias-delta is named twice for the same module"),
    ("train", {"query, key": "lora", "key": "bias-delta"}, "stratum 3, group 3: 'key' names "
        "layer.attention.self.key a second time"),
    ("train", {"key, self.key": "lora"}, "stratum 3, group 3: 'self.key' names "
        "layer.attention.self.key a second time"),
    ("layers", "3", "mine: stratum 3, group 3, begins at layer 3, but layer 2 comes next"),
]  # fmt: skip


class TestErrorsNameThePlace:
    """Oracle: the beginning of each message, as a person would look for the place."""

    @pytest.mark.parametrize(("key", "value", "message"), PLACED)
    def test_by_number_and_name(self, key: str, value: Any, message: str, tmp_path: Path) -> None:
        path = tmp_path / "mine.json"
        strata: list[dict[str, Any]] = [{"layers": "0"}, {"layers": "1"}, {"layers": "2-3"}]
        strata[2][key] = value
        path.write_text(json.dumps({"strata": strata}), encoding="utf-8")
        with pytest.raises(PlanError) as raised:
            plan(path, 4)
        assert str(raised.value).startswith(f"{path}: {message}")
        assert str(raised.value).isprintable()

    def test_a_name_of_its_own(self) -> None:
        strata = [{"layers": "0", "name": "top\n", "train": {"key": "x"}}]
        with pytest.raises(PlanError, match=r"stratum 1, top\\n, key: \"x\" is no technique"):
            Plan.from_json(json.dumps({"strata": strata}))

    def test_of_the_plan(self) -> None:
        wrong = {"strata": [{"layers": "0"}], "embedings": "full"}
        with pytest.raises(PlanError, match=r"no setting embedings \(did you mean embeddings\?\)"):
            Plan.from_json(json.dumps(wrong))


class TestDamagedJson:
    """Oracle: a plan that says one thing wrongly is refused with a PlanError that says which."""

    @pytest.mark.parametrize(
        ("where", "value", "reason"),
        [
            (("format",), "spafit-plan-2", '"format" must be "spafit-plan-1"'),
            (("format",), None, '"format" must be'),
            (("format",), "", '"format" must be'),
            (("format",), ["spafit-plan-1"], '"format" must be'),
            (("name",), 5, "name"),
            (("name",), None, "name"),
            (("name",), {"a": 1}, "name"),
            (("num_layers",), 7, "the last of 7 layers is 6"),
            (("num_layers",), 6.0, "num_layers must be a whole number"),
            (("num_layers",), "6", "num_layers must be a whole number"),
            (("num_layers",), True, "num_layers must be a whole number"),
            (("num_layers",), None, "num_layers must be a whole number"),
            (("num_layers",), [6], "num_layers must be a whole number"),
            (("embeddings",), "bias-delta", "embeddings must be"),
            (("embeddings",), None, "embeddings must be"),
            (("embeddings",), {}, "embeddings must be"),
            (("pooler",), True, "pooler must be"),
            (("pooler",), ["full"], "pooler must be"),
            (("speed",), "fast", "a plan has no setting speed"),
            (("strata",), None, '"strata" must be a list'),
            (("strata",), {"layers": [0, 5]}, '"strata" must be a list'),
            (("strata",), [], "must be a list of one stratum or more"),
            (("strata", 0), None, "a stratum must be a JSON object"),
            (("strata", 0), [0, 1], "a stratum must be a JSON object"),
            (("strata", 1, "name"), 7, "name"),
            (("strata", 0, "layer"), [0, 1], "a stratum has no setting layer"),
            *(
                (("strata", 0, "layers"), value, '"layers" must be the first and the last')
                for value in (None, 1, True, 0.5, {}, [], [0], [0, 1, 1], [[0, 1]], "", "-", "0-")
            ),
            *(
                (("strata", 0, "layers"), value, '"layers" must be the first and the last')
                for value in ("-1", "0,1", "0:1", "0-1-1", "0.0-1", "0--1", "٠-1", "0-20%", "all")
            ),
            (("strata", 0, "layers"), "1-0", "layers 1-0 are none at all"),
            (("strata", 0, "layers"), "0-2", "begins at layer 2, but layer 3 comes next"),
            (("strata", 2, "layers"), "3-99999", "end at layer 99999, but the last of 6"),
            (("strata", 0, "layers"), ["0", "1"], "numbered from 0"),
            (("strata", 0, "layers"), [0, 1.0], "numbered from 0"),
            (("strata", 0, "layers"), [False, True], "numbered from 0"),
            (("strata", 0, "layers"), [None, 1], "numbered from 0"),
            (("strata", 0, "layers"), [1, 1], "begins at layer 1"),
            (("strata", 2, "layers"), [3, 6], "end at layer 6"),
            (TRAIN, None, '"train" must map modules to techniques'),
            (TRAIN, ["query"], '"train" must map modules to techniques'),
            (TRAIN, "lora", '"train" must map modules to techniques'),
            ((*TRAIN, "qery"), "lora", "'qery' matches no module"),
            ((*TRAIN, "output.dense"), "bias-delta", "write the one that is meant"),
            ((*TRAIN, "self.query"), "lora", "a second time"),
            ((*TRAIN, "layer.output.LayerNorm"), "lora", "LoRA needs a Linear"),
            ((*TRAIN, "value"), "LoRA", '"LoRA" is no technique'),
            ((*TRAIN, "value"), "frozen", '"frozen" is no technique'),
            ((*TRAIN, "value"), None, "null is no technique"),
            ((*TRAIN, "value"), 8, "8 is no technique"),
            ((*TRAIN, "value"), True, "true is no technique"),
            ((*TRAIN, "value"), {}, "{} is no technique"),
            ((*TRAIN, "value"), {"lora": {}, "bias-delta": {}}, "names 2 techniques; write a list"),
            ((*TRAIN, "value"), {"lora": 8}, "or its settings as an object"),
            ((*TRAIN, "value"), {"lora": None}, "or its settings as an object"),
            ((*TRAIN, "value"), [], "no technique is named"),
            ((*TRAIN, "value"), [["lora"]], "is no technique"),
            ((*TRAIN, "value"), [{"lora": {}}, None], "null is no technique"),
            ((*TRAIN, "value"), ["lora", "lora"], "lora is named twice for the same module"),
            ((*TRAIN, "value"), ["full", "bias-delta"], "cannot be attached to the same module"),
            (
                (*TRAIN, "value"),
                ["bias-direct", "bias-delta"],
                "cannot be attached to the same module",
            ),
            ((*TRAIN, "value"), {"lora": {"rank": 8}}, "the technique lora has no setting rank"),
            ((*TRAIN, "value"), {"bias-delta": {"r": 8}}, "bias-delta has no setting r"),
            (
                (*TRAIN, "value"),
                {"full": {"lr": 1}},
                "full has no setting lr; there are rate",
            ),
            ((*TRAIN, "value"), {"lora": {"r": 0}}, "rank r must be"),
            ((*TRAIN, "value"), {"lora": {"r": 8.0}}, "rank r must be"),
            ((*TRAIN, "value"), {"lora": {"r": "8"}}, "rank r must be"),
            ((*TRAIN, "value"), {"lora": {"r": None}}, "rank r must be"),
            ((*TRAIN, "value"), {"lora": {"r": [8]}}, "rank r must be"),
            ((*TRAIN, "value"), {"lora": {"alpha": "16"}}, "alpha must be"),
            ((*TRAIN, "value"), {"lora": {"alpha": None}}, "alpha must be"),
            ((*TRAIN, "value"), {"lora": {"alpha": True}}, "alpha must be"),
            ((*TRAIN, "value"), {"lora": {"alpha": math.nan}}, "alpha must be"),
            ((*TRAIN, "value"), {"lora": {"alpha": math.inf}}, "alpha must be"),
            ((*TRAIN, "value"), {"lora": {"alpha": 10**400}}, "alpha must be"),
            ((*TRAIN, "value"), {"lora": {"dropout": 1}}, "dropout must be"),
            ((*TRAIN, "value"), {"lora": {"dropout": False}}, "dropout must be"),
            ((*TRAIN, "value"), {"lora": {"dropout": {}}}, "dropout must be"),
        ],
    )
    def test_one_thing_wrong(self, where: Where, value: Any, reason: str) -> None:
        entries = by_hand()
        place: Any = entries
        for step in where[:-1]:
            place = place[step]
        place[where[-1]] = value
        with pytest.raises(PlanError) as raised:
            Plan.from_json(json.dumps(entries), source="mine.json")
        assert str(raised.value).startswith("mine.json: ")
        assert reason in str(raised.value)

    @pytest.mark.parametrize("where", [("strata",), ("strata", 1, "layers")], ids=str)
    def test_something_missing(self, where: Where) -> None:
        entries: Any = by_hand()
        place = entries
        for step in where[:-1]:
            place = place[step]
        del place[where[-1]]
        with pytest.raises(PlanError, match=f'"{where[-1]}" must be .* it is missing'):
            Plan.from_json(json.dumps(entries))

    @pytest.mark.parametrize("last", ["1024", "999999999"])
    def test_more_layers_than_a_model_has(self, last: str) -> None:
        """Where nothing else says how many there are."""
        with pytest.raises(PlanError, match="num_layers must be a whole number from 1 to 1024"):
            Plan.from_json(json.dumps({"strata": [{"layers": f"0-{last}"}]}))

    @pytest.mark.parametrize(
        ("written", "instead"),
        [
            ('"query": "lora"', '"query": "full", "query": "lora"'),
            ('"num_layers": 6', '"num_layers": 5, "num_layers": 6'),
            ('{"r": 8, ', '{"r": 4, "r": 8, '),
        ],
        ids=["module", "plan", "technique"],
    )
    def test_the_same_key_twice(self, written: str, instead: str) -> None:
        """JSON's readers keep the last silently; a plan would train something else than it says."""
        damaged = BY_HAND.replace(written, instead)
        assert damaged != BY_HAND
        with pytest.raises(PlanError, match="twice"):
            Plan.from_json(damaged)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "null",
            "[]",
            '"lora-i"',
            BY_HAND + "}",
            "\ufeff" + BY_HAND,
            "[" * 100_000,
            '{"num_layers": ' + "1" * 5000 + "}",
        ],
        ids=lambda text: repr(text[:12]),
    )
    def test_no_plan_at_all(self, text: str) -> None:
        with pytest.raises(PlanError):
            Plan.from_json(text)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.sampled_from([10**30, 10**400, -(10**400), math.nan, math.inf, -math.inf, -0.0, 1e-320])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([*TECHNIQUES, *MODULES, "query", "full", "frozen", "output.dense"])
    | st.sampled_from(["all", "query, key", "0-1", "2", "3-5", "30%"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=4)
            | st.sampled_from(["lora", "r", "alpha", "layers", "train", "key", "all", "rate"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def places(node: Any) -> list[tuple[Any, Any]]:
    """List every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
        found = [(node, key) for key in node]
    elif isinstance(node, list):
        found = [(node, index) for index in range(len(node))]
    return found + [place for container, key in found for place in places(container[key])]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """Return a plan's JSON with one to three values replaced, removed, doubled or swapped."""
    entries = by_hand() if draw(st.booleans()) else json.loads(draw(plans()).to_json())
    for _ in range(draw(st.integers(1, 3))):
        found = places(entries)
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        action = draw(st.sampled_from(["replace", "replace", "remove", "double", "swap"]))
        if action == "replace":
            container[key] = draw(JSON)
        elif action == "remove":
            del container[key]
        elif action == "double":
            if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            else:
                container[draw(st.text(max_size=6) | st.sampled_from(MODULES))] = container[key]
        else:
            other, other_key = draw(st.sampled_from(found))
            value = copy.deepcopy(other[other_key])
            container[key] = value
    return json.dumps(entries)


class TestFuzz:
    """Oracle: only a PlanError ever comes out; what is accepted is a plan that round-trips."""

    @staticmethod
    def check(text: str) -> None:
        try:
            made = Plan.from_json(text)
        except PlanError:
            return
        assert Plan.from_json(made.to_json()) == made
        # Whatever was accepted covers every layer once and holds nothing of a wrong type.
        assert len(by_layer(made)) == made.num_layers
        assert isinstance(made.name, str)
        for table in by_layer(made):
            assert set(table) <= set(PLACES)
            for techniques in table.values():
                for technique in techniques:
                    assert type(technique) in TECHNIQUES.values()
                    if isinstance(technique, LoRA):
                        assert type(technique.r) is int
                        assert type(technique.alpha) is float

    @given(mutated())
    @settings(max_examples=300, deadline=None)
    def test_mutated_values(self, text: str) -> None:
        self.check(text)

    @given(st.data())
    @settings(max_examples=250, deadline=None)
    def test_mutated_text(self, data: st.DataObject) -> None:
        """Cut, repeat, or overwrite a stretch of the text itself."""
        start = data.draw(st.integers(0, len(BY_HAND)))
        length = data.draw(st.integers(0, 20))
        put = data.draw(st.text(max_size=3) | st.sampled_from(['"', "{", "]", "NaN", "1e999"]))
        put *= data.draw(st.sampled_from([1, 1, 1, 2, 5000]))
        self.check(BY_HAND[:start] + put + BY_HAND[start + length :])

    @given(JSON)
    @settings(max_examples=200, deadline=None)
    def test_any_json(self, value: Any) -> None:
        self.check(json.dumps(value))

"""Plans: names, numberings, percents, settings, refusals, and JSON.

The oracle is the paper's Table 1 spelled out below module by module, sets of layers written as set
comprehensions, and exact arithmetic with fractions; nothing here asks the code what it should do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spafit.adapters import BiasDelta, DirectBias, Full, LoRA
from spafit.errors import PlanError, SpafitError
from spafit.methods import METHODS, plan
from spafit.plans import MODULES, Plan, Stratum, resolve
from spafit.techniques import Technique

ALL_EIGHT = {
    "layer.attention.self.query",
    "layer.attention.self.key",
    "layer.attention.self.value",
    "layer.attention.output.dense",
    "layer.attention.output.LayerNorm",
    "layer.intermediate.dense",
    "layer.output.dense",
    "layer.output.LayerNorm",
}
QKV = {f"layer.attention.self.{name}" for name in ("query", "key", "value")}
LATE_BIASES = {"layer.intermediate.dense", "layer.output.dense", "layer.output.LayerNorm"}
ATTENTION_DENSE = {"layer.attention.output.dense"}

Table = dict[str, tuple[Technique, ...]]


def same(modules: set[str], technique: Technique) -> Table:
    """Give every module the one technique."""
    return dict.fromkeys(modules, (technique,))


def expected_groups(style: str, lora: Technique, bias: Technique) -> list[Table]:
    """Table 1's three groups."""
    matrices = QKV if style == "I" else QKV | ATTENTION_DENSE
    return [{}, same(ALL_EIGHT, bias), {**same(matrices, lora), **same(LATE_BIASES, bias)}]


def by_layer(plan: Plan) -> list[Table]:
    """Write a plan out layer by layer."""
    return [
        {module: tuple(techniques) for module, techniques in stratum.train.items()}
        for stratum in plan.strata
        for _ in range(stratum.first, stratum.last + 1)
    ]


class TestResolve:
    """Oracle: an entry is a module path or the end of one, cut at a dot, and names one module."""

    @pytest.mark.parametrize("module", sorted(ALL_EIGHT))
    def test_whole_paths(self, module: str) -> None:
        assert module in MODULES
        assert resolve(module) == module

    @pytest.mark.parametrize(
        ("entry", "module"),
        [
            ("query", "layer.attention.self.query"),
            ("self.key", "layer.attention.self.key"),
            ("attention.self.value", "layer.attention.self.value"),
            ("attention.output.dense", "layer.attention.output.dense"),
            ("attention.output.LayerNorm", "layer.attention.output.LayerNorm"),
            ("intermediate.dense", "layer.intermediate.dense"),
            ("layer.output.dense", "layer.output.dense"),
            ("layer.output.LayerNorm", "layer.output.LayerNorm"),
        ],
    )
    def test_ends(self, entry: str, module: str) -> None:
        assert resolve(entry) == module

    @pytest.mark.parametrize(
        "entry", ["", ".", "uery", ".query", "query.", "Query", "layer", "attention", "classifier"]
    )
    def test_nothing(self, entry: str) -> None:
        with pytest.raises(PlanError, match=rf"{re.escape(repr(entry))} matches no module"):
            resolve(entry)

    @pytest.mark.parametrize(
        ("entry", "matches"),
        [
            ("output.dense", 2),
            ("output.LayerNorm", 2),
            ("LayerNorm", 2),
            ("dense", 3),
        ],
    )
    def test_more_than_one(self, entry: str, matches: int) -> None:
        with pytest.raises(PlanError, match="write the one that is meant") as raised:
            resolve(entry)
        assert sum(module in str(raised.value) for module in ALL_EIGHT) == matches


# What names are made of, and what they might be made of by mistake.
WORDS = ("spafit", "full", "lora", "bitfit", "i", "ii", "II")
SIGNS = ("-", "_", " ", "%", ".", "\0", "\ud800")
DIGITS = ("0", "4", "9", "23", "٣", "9" * 5000)


class TestNames:
    """Oracle: Table 1, spelled out."""

    @pytest.mark.parametrize("method", [*METHODS, "Linear probing"])
    @pytest.mark.parametrize(
        "spell",
        [
            str,
            str.lower,
            str.upper,
            str.swapcase,
            lambda name: f"  {name}\n",
            lambda name: name.replace("-", "_").replace(" ", "_"),
            lambda name: name.replace("-", " "),
        ],
        ids=["as printed", "lower", "upper", "swapped", "blanks", "underscores", "spaces"],
    )
    def test_any_case_and_separator(self, method: str, spell: Callable[[str], str]) -> None:
        made = plan(spell(method), 24)
        assert made == plan(method, 24)
        assert made.name == method

    @pytest.mark.parametrize(
        ("alias", "method"),
        [
            ("full", "Full Fine-tuning"),
            ("fine-tuning", "Full Fine-tuning"),
            ("bitfit", "Full BitFit"),
            ("lora-i", "Full LoRA-I"),
            ("lora-ii", "Full LoRA-II"),
            ("LoRA II", "Full LoRA-II"),
            ("linear-probe", "Linear probing"),
            ("Linear probe", "Linear probing"),
        ],
    )
    def test_alias(self, alias: str, method: str) -> None:
        assert plan(alias, 5) == plan(method, 5)

    @pytest.mark.parametrize(
        ("method", "table", "outside"),
        [
            ("full", same(ALL_EIGHT, Full()), "full"),
            ("bitfit", same(ALL_EIGHT, BiasDelta()), "frozen"),
            ("lora-i", same(QKV, LoRA(64, 128.0)), "frozen"),
            ("lora-ii", same(QKV | ATTENTION_DENSE, LoRA(64, 128.0)), "frozen"),
        ],
    )
    @pytest.mark.parametrize("L", [1, 7])
    def test_methods_of_one_stratum(self, method: str, table: Table, outside: str, L: int) -> None:
        made = plan(method, L)
        assert by_layer(made) == [table] * L
        assert (made.embeddings, made.pooler) == (outside, outside)
        assert made.writes_pretrained == (method == "full")

    @pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("SPAFIT")])
    def test_spafit(self, method: str) -> None:
        N1, N2, style = method.split("-")[1:]
        made = plan(method, 24)
        frozen, biases, late = expected_groups(style, LoRA(64, 128.0), BiasDelta())
        group_2 = int(N2) - int(N1)
        assert by_layer(made) == (
            [frozen] * (int(N1) + 1) + [biases] * group_2 + [late] * (24 - int(N2) - 1)
        )
        assert [stratum.name for stratum in made.strata] == ["group 1", "group 2", "group 3"]
        assert (made.embeddings, made.pooler) == ("frozen", "frozen")
        assert not made.writes_pretrained

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "  ",
            "-",
            "full-",
            "full-full",
            "full-spafit-4-9-i",
            "lora",
            "lora-iii",
            "bit-fit",
            "spafit",
            "spafit-4-9",
            "spafit-4-9-iii",
            "spafit-4-9-2",
            "spafit-4.5-9-i",
            "spafit--4-9-i",
            "spafit-4-9-i-x",
            "spafit-4-9-ii.txt",
            "SPAFIT-٤-٩-II",  # digits, but not ours
            "adapter",
        ],
    )
    def test_unknown_names(self, name: str) -> None:
        with pytest.raises(PlanError, match="there is no method") as raised:
            plan(name, 24)
        assert repr(name) in str(raised.value)
        assert all(method in str(raised.value) for method in (*METHODS, "linear-probe"))

    @pytest.mark.parametrize("name", [None, 5, ["bitfit"], {"lora": {}}])
    def test_a_name_is_text(self, name: Any) -> None:
        with pytest.raises(PlanError):
            plan(name, 24)

    @pytest.mark.parametrize("L", [0, -1, 2.0, "24", True, None])
    def test_number_of_layers(self, L: Any) -> None:
        with pytest.raises(PlanError, match=f"num_layers must be .*, found {re.escape(repr(L))}"):
            plan("bitfit", L)

    @given(
        st.lists(st.sampled_from(WORDS + SIGNS + DIGITS), max_size=9).map("".join),
        st.integers(1, 30),
    )
    @example("spafit-4-" + "9" * 5000 + "-i", 24)
    @example("spafit-4-" + "9" * 400 + "%-i", 24)
    @settings(max_examples=300, deadline=None)
    def test_a_name_gives_a_plan_or_a_plan_error(self, name: str, L: int) -> None:
        try:
            made = plan(name, L)
        except PlanError:
            return
        assert len(by_layer(made)) == L


class TestNumbering:
    """Oracle: sets of layers. Exhaustive over all N1, N2 for the numbers of layers below."""

    LAYERS = (1, 2, 3, 4, 7)

    @pytest.mark.parametrize("L", LAYERS)
    @pytest.mark.parametrize("numbering", ["table-2", "text"])
    def test_every_pair(self, L: int, numbering: str) -> None:
        first = 0 if numbering == "table-2" else 1
        numbers = range(first, first + L)
        for N1 in range(L + 3):
            for N2 in range(L + 3):
                group_1 = {n - first for n in numbers if n <= N1}
                group_2 = {n - first for n in numbers if N1 < n <= N2}
                group_3 = {n - first for n in numbers if n > N2}
                name = f"SPAFIT-{N1}-{N2}-II"
                if group_1 and group_2 and group_3:
                    made = plan(name, L, numbering=numbering)
                    ranges = [set(range(s.first, s.last + 1)) for s in made.strata]
                    assert ranges == [group_1, group_2, group_3]
                else:
                    with pytest.raises(PlanError, match=re.escape(name)):
                        plan(name, L, numbering=numbering)

    def test_the_default_is_table_2(self) -> None:
        assert plan("SPAFIT-4-9-II", 24) == plan("SPAFIT-4-9-II", 24, numbering="table-2")
        # The same layers, as the two numberings name them.
        literal = plan("SPAFIT-5-10-II", 24, numbering="text")
        assert literal.strata == plan("SPAFIT-4-9-II", 24).strata

    @pytest.mark.parametrize(
        ("name", "numbering", "reason"),
        [
            ("SPAFIT-4-24-I", "table-2", "N2 = 24 is beyond the last layer, 23"),
            ("SPAFIT-4-25-I", "text", "N2 = 25 is beyond the last layer, 24"),
            ("SPAFIT-4-23-I", "table-2", "N2 = 23 leaves no layer for group 3"),
            ("SPAFIT-4-24-I", "text", "N2 = 24 leaves no layer for group 3"),
            ("SPAFIT-9-9-I", "table-2", "N1 = 9 must end before N2 = 9, or group 2 has no layer"),
            ("SPAFIT-9-4-I", "text", "N1 = 9 must end before N2 = 4, or group 2 has no layer"),
            ("SPAFIT-0-4-I", "text", "N1 = 0 leaves no layer for group 1"),
            ("SPAFIT-1%-40%-I", "table-2", "N1 = 1% leaves no layer for group 1"),
            ("SPAFIT-20%-100%-I", "table-2", "N2 = 100% leaves no layer for group 3"),
            ("SPAFIT-20%-140%-I", "text", "N2 = 140% is beyond the last layer, 24"),
        ],
    )
    def test_reasons(self, name: str, numbering: str, reason: str) -> None:
        with pytest.raises(PlanError) as raised:
            plan(name, 24, numbering=numbering)
        assert reason in str(raised.value)
        assert f"{name} on 24 layers" in str(raised.value)

    @pytest.mark.parametrize("numbering", ["", "Table-2", "table-1", 2])
    def test_unknown_numbering(self, numbering: Any) -> None:
        with pytest.raises(PlanError, match='numbering must be "table-2" or "text"'):
            plan("SPAFIT-4-9-II", 24, numbering=numbering)


class TestPercents:
    """Oracle: exact arithmetic; that share of the layers, rounded to whole layers, halves up."""

    @staticmethod
    def share(percent: str, L: int) -> int:
        return math.floor(Fraction(percent) / 100 * L + Fraction(1, 2))

    @pytest.mark.parametrize(
        ("percents", "numbers", "L"),
        [
            ("20%-40%", "4-9", 24),  # 4.8 and 9.6: 5 and 10 layers
            ("20%-40%", "1-4", 12),  # 2.4 and 4.8: 2 and 5
            ("50%-70%", "2-3", 5),  # 2.5 up to 3, 3.5 up to 4
            ("12.5%-37.5%", "1-4", 12),  # 1.5 up to 2, 4.5 up to 5
            ("58%-70%", "14-17", 25),  # 14.5, which is 14.499999999999998 in floating point
        ],
    )
    def test_equal_to_the_numbered_plan(self, percents: str, numbers: str, L: int) -> None:
        assert plan(f"SPAFIT-{percents}-II", L).strata == plan(f"SPAFIT-{numbers}-II", L).strata

    @given(
        st.integers(3, 100),
        st.integers(1, 99).map(str) | st.decimals(1, 99, places=1).map(str),
        st.integers(1, 99).map(str),
        st.sampled_from(["table-2", "text"]),
    )
    @settings(max_examples=300, deadline=None)
    def test_rounding(self, L: int, first: str, second: str, numbering: str) -> None:
        end_1, end_2 = self.share(first, L), self.share(second, L)
        name = f"spafit-{first}%-{second}%-i"
        if 1 <= end_1 < end_2 < L:
            made = plan(name, L, numbering=numbering)
            assert [stratum.last + 1 for stratum in made.strata] == [end_1, end_2, L]
        else:
            with pytest.raises(PlanError):
                plan(name, L, numbering=numbering)

    def test_a_number_and_a_percent(self) -> None:
        assert plan("SPAFIT-4-40%-I", 24).strata == plan("SPAFIT-4-9-I", 24).strata


class TestSettings:
    """Oracle: each setting lands where it belongs, and only there."""

    @pytest.mark.parametrize("style", ["I", "II"])
    def test_all(self, style: str) -> None:
        made = plan(f"SPAFIT-1-3-{style}", 6, r=7, alpha=21, lora_dropout=0.25, bias="direct")
        groups = expected_groups(style, LoRA(7, 21.0, 0.25), DirectBias())
        assert by_layer(made) == [group for group in groups for _ in range(2)]
        assert made.writes_pretrained

    @pytest.mark.parametrize(
        ("setting", "lora"),
        [
            ({"r": 7}, LoRA(7, 128.0)),
            ({"alpha": 7}, LoRA(64, 7.0)),
            ({"lora_dropout": 0.5}, LoRA(64, 128.0, 0.5)),
            ({"lora_dropout": 0}, LoRA(64, 128.0)),
        ],
    )
    def test_one_alone(self, setting: dict[str, Any], lora: LoRA) -> None:
        made = plan("lora-ii", 3, **setting)
        assert by_layer(made) == [same(QKV | ATTENTION_DENSE, lora)] * 3

    def test_bias_delta_is_the_default(self) -> None:
        assert plan("bitfit", 3) == plan("bitfit", 3, bias="delta")
        assert plan("bitfit", 3) != plan("bitfit", 3, bias="direct")

    @pytest.mark.parametrize(
        ("setting", "reason"),
        [
            ({"r": 0}, "rank r must be a whole number of at least 1"),
            ({"r": -3}, "rank r must be .* found -3"),
            ({"r": 8.0}, "rank r must be .* found 8.0"),
            ({"r": True}, "rank r must be .* found True"),
            ({"r": "8"}, "rank r must be .* found '8'"),
            ({"alpha": 0}, "alpha must be a positive number, found 0"),
            ({"alpha": -1.0}, "alpha must be .* found -1.0"),
            ({"alpha": math.nan}, "alpha must be .* found nan"),
            ({"alpha": math.inf}, "alpha must be .* found inf"),
            ({"alpha": 10**400}, "alpha must be "),
            ({"alpha": True}, "alpha must be .* found True"),
            ({"alpha": "16"}, "alpha must be .* found '16'"),
            ({"lora_dropout": 1}, r"dropout must be a rate in \[0, 1\), found 1"),
            ({"lora_dropout": -0.1}, "dropout must be .* found -0.1"),
            ({"lora_dropout": math.nan}, "dropout must be .* found nan"),
            ({"lora_dropout": False}, "dropout must be .* found False"),
            ({"lora_dropout": "0"}, "dropout must be .* found '0'"),
            ({"bias": "none"}, 'bias must be "delta" or "direct", found \'none\''),
            ({"bias": True}, 'bias must be "delta" or "direct", found True'),
        ],
    )
    def test_out_of_range(self, setting: dict[str, Any], reason: str) -> None:
        with pytest.raises(PlanError, match=reason):
            plan("SPAFIT-4-9-II", 24, **setting)


class TestImpossible:
    """Oracle: the rules of a plan, each broken once in Python and named in the message."""

    @pytest.mark.parametrize(
        ("table", "reason"),
        [
            ({"query": (LoRA(),), "attention.self.query": (LoRA(),)}, "query a second time"),
            ({"output.dense": (BiasDelta(),)}, "layer.attention.output.dense and layer.output."),
            ({"classifier": (Full(),)}, "'classifier' matches no module"),
            ({"layer.output.LayerNorm": (LoRA(),)}, "LoRA needs a Linear"),
            ({"attention.output.LayerNorm": (BiasDelta(), LoRA())}, "LoRA needs a Linear"),
            ({"key": (BiasDelta(), DirectBias())}, "bias-delta and bias-direct cannot be attached"),
            ({"key": (Full(), LoRA())}, "full and lora cannot be attached to the same module"),
            (
                {"key": (BiasDelta(), Full())},
                "bias-delta and full cannot be attached to the same module",
            ),
            ({"key": (LoRA(4), LoRA(8))}, "lora is named twice for the same module"),
            ({"key": ()}, "no technique is named; leave the entry out"),
            ({"key": LoRA()}, "key"),
            ({"key": ("lora",)}, "key"),
        ],
    )
    def test_entries(self, table: Any, reason: str) -> None:
        with pytest.raises(PlanError) as raised:
            Stratum("the third", 0, 1, table)
        assert reason in str(raised.value)

    @pytest.mark.parametrize(
        ("first", "last", "reason"),
        [
            (-1, 2, "numbered from 0"),
            (3, 2, "are none at all"),
            (0, 2.0, "numbered from 0"),
            (False, 2, "numbered from 0"),
            ("0", 2, "numbered from 0"),
        ],
    )
    def test_ranges(self, first: Any, last: Any, reason: str) -> None:
        with pytest.raises(PlanError, match=f"the third: .*{reason}"):
            Stratum("the third", first, last)

    @pytest.mark.parametrize(
        ("ranges", "reason"),
        [
            ([(0, 1), (3, 5)], "begins at layer 3, but layer 2 comes next"),
            ([(0, 2), (2, 5)], "begins at layer 2, but layer 3 comes next"),
            ([(1, 5)], "begins at layer 1, but layer 0 comes next"),
            ([(3, 5), (0, 2)], "begins at layer 3, but layer 0 comes next"),
            ([(0, 2), (3, 4)], "end at layer 4, but the last of 6 layers is 5"),
            ([(0, 2), (3, 6)], "end at layer 6, but the last of 6 layers is 5"),
            ([], "the last of 6 layers is 5"),
        ],
    )
    def test_gaps_and_overlaps(self, ranges: list[tuple[int, int]], reason: str) -> None:
        strata = [Stratum(f"s{i}", *ends) for i, ends in enumerate(ranges)]
        with pytest.raises(PlanError, match=f"mine: .*{reason}"):
            Plan("mine", 6, strata)

    @pytest.mark.parametrize("part", ["embeddings", "pooler"])
    @pytest.mark.parametrize("mode", ["Full", "bias-delta", None, True, ["full"]])
    def test_parts_outside_the_layers(self, part: str, mode: Any) -> None:
        with pytest.raises(PlanError, match=f'{part} must be "frozen" or "full"'):
            Plan("mine", 1, [Stratum("all", 0, 0)], **{part: mode})

    def test_a_plan_for_another_model(self) -> None:
        with pytest.raises(PlanError, match="SPAFIT-4-9-II is for 24 layers, the model has 12"):
            plan(plan("SPAFIT-4-9-II", 24), 12)

    def test_refusals_are_of_the_family_and_value_errors(self) -> None:
        assert issubclass(PlanError, SpafitError)
        assert issubclass(PlanError, ValueError)


class TestAsData:
    """Oracle: two plans are equal exactly if the same trains in the same layers, by name."""

    def test_lora_stands_last_and_modules_in_the_order_of_the_data(self) -> None:
        stratum = Stratum(
            "s", 0, 0, {"layer.output.dense": [LoRA(), BiasDelta()], "query": [BiasDelta(), LoRA()]}
        )
        assert list(stratum.train) == ["layer.attention.self.query", "layer.output.dense"]
        assert all(both == (BiasDelta(), LoRA()) for both in stratum.train.values())

    def test_equal_however_it_is_written(self) -> None:
        one = Stratum("s", 0, 2, {"query": (LoRA(8, 16),), "key": (BiasDelta(), LoRA(4, 2))})
        two = Stratum(
            "s", 0, 2, {"self.key": [LoRA(4, 2.0), BiasDelta()], "self.query": [LoRA(8, 16.0)]}
        )
        assert Plan("p", 3, [one]) == Plan("p", 3, (two,))

    @pytest.mark.parametrize(
        "other",
        [
            Plan("q", 3, [Stratum("s", 0, 2, {"key": [BiasDelta()]})]),
            Plan("p", 3, [Stratum("t", 0, 2, {"key": [BiasDelta()]})]),
            Plan("p", 3, [Stratum("s", 0, 2, {"key": [DirectBias()]})]),
            Plan("p", 3, [Stratum("s", 0, 2, {"query": [BiasDelta()]})]),
            Plan("p", 3, [Stratum("s", 0, 2, {"key": [BiasDelta()]})], pooler="full"),
            Plan("p", 3, [Stratum("s", 0, 2, {"key": [BiasDelta()]})], embeddings="full"),
            Plan("p", 2, [Stratum("s", 0, 1, {"key": [BiasDelta()]})]),
            Plan("p", 3, [Stratum("s", 0, 2, {"key": [LoRA(64, 64.0)]})]),
        ],
    )
    def test_unequal(self, other: Plan) -> None:
        assert Plan("p", 3, [Stratum("s", 0, 2, {"key": [BiasDelta()]})]) != other

    def test_layers_in_print(self) -> None:
        assert Stratum("s", 3, 3).layers == "3"
        assert Stratum("s", 3, 12).layers == "3-12"
        assert len(Stratum("s", 3, 12)) == 10

    @pytest.mark.parametrize(
        ("technique", "writes"),
        [(BiasDelta(), False), (LoRA(), False), (DirectBias(), True), (Full(), True)],
    )
    def test_which_plans_write_to_pretrained_tensors(
        self, technique: Technique, writes: bool
    ) -> None:
        strata = [Stratum("a", 0, 1), Stratum("b", 2, 2, {"value": [technique]})]
        assert Plan("p", 3, strata).writes_pretrained == writes
        assert Plan("p", 3, strata, pooler="full").writes_pretrained
        assert Plan("p", 3, strata, embeddings="full").writes_pretrained

"""Tables 1 and 2 of the SPAFIT paper, by actual count.

The oracles are the figures that the paper prints, in millions with two decimals, and closed
formulas for the numbers that train in one layer. What is held against them is counted from
``requires_grad`` on a model, never from the plan. BERT-large lies on the meta device: it has shapes
and no values.

Legend: D hidden, F intermediate, L layers, C labels, r rank.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest
import torch

from spafit.adapters import BiasDelta
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.methods import METHODS, plan
from spafit.plans import ATTENTION_NORM, MODULES, Plan, Stratum
from spafit.strata import adapt
from spafit.summary import Summary

# method -> (numbers that train, what Table 2 prints, in millions); r = 64, C = 3.
TABLE_2 = {
    "Full Fine-tuning": (333_582_339, 333.58),
    "Full LoRA-I": (9_440_259, 9.44),
    "Full LoRA-II": (12_585_987, 12.59),
    "SPAFIT-8-12-I": (4_441_091, 4.44),
    "SPAFIT-8-12-II": (5_882_883, 5.88),
    "SPAFIT-8-16-II": (3_806_211, 3.81),
    "SPAFIT-4-9-I": (5_650_435, 5.65),
    "SPAFIT-4-9-II": (7_485_443, 7.49),
    "SPAFIT-4-14-II": (4_889_603, 4.89),
    "Full BitFit": (273_411, 31.52),
}
MATCHING = [method for method in TABLE_2 if method != "Full BitFit"]
STRATIFIED = [method for method in TABLE_2 if method.startswith("SPAFIT")]

LARGE = BertConfig()  # bert-large-cased
SMALL = BertConfig(
    vocab_size=53,
    hidden_size=20,
    num_hidden_layers=9,
    num_attention_heads=5,
    intermediate_size=37,
    max_position_embeddings=17,
)
BASE = BertConfig(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=8, intermediate_size=3000
)


def adapted(
    config: BertConfig, plan: Plan | str, num_labels: int
) -> tuple[BertForSequenceClassification, Summary]:
    """Build a model without values and adapt it."""
    with torch.device("meta"):
        model = BertForSequenceClassification(config, num_labels=num_labels)
    return model, adapt(model, plan)


@functools.cache
def large(method: str) -> tuple[BertForSequenceClassification, Summary]:
    """Adapt a BERT-large with three labels; the tests only count in it."""
    return adapted(LARGE, method, num_labels=3)


def trainable(model: BertForSequenceClassification) -> dict[str, int]:
    """Count what trains, by name."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def per_layer(model: BertForSequenceClassification) -> list[int]:
    """Count what trains in each encoder layer, by the number in the names."""
    counts: Counter[int] = Counter()
    for name, count in trainable(model).items():
        if match := re.match(r"bert\.encoder\.layer\.(\d+)\.", name):
            counts[int(match[1])] += count
    return [counts[layer] for layer in range(model.config.num_hidden_layers)]


def in_millions(count: int) -> float:
    """Round as Table 2 does."""
    return round(count / 1e6, 2)


class TestTable2:
    """Oracle: the ten printed figures, and the exact counts behind them."""

    def test_the_rows_are_those_of_table_1(self) -> None:
        assert sorted(TABLE_2) == sorted(METHODS)

    @pytest.mark.parametrize("method", TABLE_2)
    def test_exact_count(self, method: str) -> None:
        model, summary = large(method)
        count = sum(trainable(model).values())
        assert count == TABLE_2[method][0]
        assert summary.trainable == count
        assert sum(group.trainable for group in summary.groups) == count

    @pytest.mark.parametrize("method", MATCHING)
    def test_printed_figure(self, method: str) -> None:
        model, _ = large(method)
        assert in_millions(sum(trainable(model).values())) == TABLE_2[method][1]

    def test_full_fine_tuning_trains_the_whole_model(self) -> None:
        model, summary = large("full")
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert summary.pretrained == summary.trainable == 333_579_264 + 3 * 1024 + 3
        assert summary.percent == 100.0


class TestLinearProbing:
    """Oracle: C·D + C, the head of bert-large-cased with C = 3."""

    def test_the_head_alone_trains(self) -> None:
        model, summary = large("linear-probe")
        assert trainable(model) == {"classifier.weight": 3 * 1024, "classifier.bias": 3}
        assert (summary.plan.name, summary.trainable) == ("Linear probing", 3_075)
        assert [(each.name, each.trains[0], each.trainable) for each in summary.groups] == [
            ("embeddings", "frozen", 0),
            ("all layers", "frozen", 0),
            ("pooler", "frozen", 0),
            ("classifier", "full", 3_075),
        ]
        assert model.bert.is_frozen
        assert not large("bitfit")[0].bert.is_frozen


class TestFullBitFit:
    """Oracle: arithmetic. The printed 31.52 is not the count of the biases; it is explained so."""

    def test_all_encoder_biases_and_the_head_are_not_the_printed_figure(self) -> None:
        model, _ = large("Full BitFit")
        by_kind = Counter(name.split(".")[0] for name in trainable(model))
        assert by_kind == {"bert": 24 * 8, "classifier": 2}
        D, F, L, C = 1024, 4096, 24, 3
        assert L * (7 * D + F) == 270_336
        count = sum(trainable(model).values())
        assert count == 270_336 + C * D + C == 273_411
        assert in_millions(count) == 0.27 != TABLE_2["Full BitFit"][1]

    def test_with_embeddings_and_pooler_it_comes_near(self) -> None:
        """28996 + 512 + 2 rows of D and a LayerNorm, and the pooler's D·D + D: 31.54."""
        D = 1024
        embeddings, pooler = (28_996 + 512 + 2 + 2) * D, D * D + D
        assert (in_millions(embeddings), in_millions(pooler)) == (30.22, 1.05)
        biases = dict.fromkeys(MODULES, (BiasDelta(),))
        model, summary = adapted(LARGE, self._with_embeddings_and_pooler(biases), num_labels=3)
        count = sum(trainable(model).values())
        assert count == 273_411 + embeddings + pooler == 31_543_299
        assert in_millions(count) == 31.54
        counts = {group.name: group.trainable for group in summary.groups}
        assert (counts["embeddings"], counts["pooler"]) == (embeddings, pooler)

    def test_and_without_one_layer_norm_bias_a_layer_it_is_the_printed_figure(self) -> None:
        biases = dict.fromkeys((m for m in MODULES if m != ATTENTION_NORM), (BiasDelta(),))
        model, _ = adapted(LARGE, self._with_embeddings_and_pooler(biases), num_labels=3)
        count = sum(trainable(model).values())
        assert count == 31_543_299 - 24 * 1024 == 31_518_723
        assert in_millions(count) == TABLE_2["Full BitFit"][1]

    @staticmethod
    def _with_embeddings_and_pooler(biases: dict[str, tuple[BiasDelta]]) -> Plan:
        stratum = Stratum("all layers", 0, 23, biases)
        return Plan("as printed", 24, [stratum], embeddings="full", pooler="full")


class TestNumbering:
    """Oracle: Table 2. Layers 0 .. L-1 with both ends give it; the words of the text do not."""

    @pytest.mark.parametrize("method", STRATIFIED)
    def test_literal_reading_gives_none_of_the_printed_figures(self, method: str) -> None:
        literal = plan(method, 24, numbering="text")
        model, _ = adapted(LARGE, literal, num_labels=3)
        count = sum(trainable(model).values())
        # One layer more has LoRA and one less is frozen; group 2 is as long as before.
        D, F, r = 1024, 4096, 64
        matrices = 4 if method.endswith("II") else 3
        assert count == TABLE_2[method][0] + matrices * 2 * D * r + F + 2 * D
        assert all(in_millions(count) != printed for _, printed in TABLE_2.values())

    def test_by_default_group_1_of_spafit_4_9_has_five_layers(self) -> None:
        model, _ = large("SPAFIT-4-9-II")
        assert per_layer(model) == [0] * 5 + [11_264] * 5 + [530_432] * 14

    def test_in_text_numbering_it_has_four(self) -> None:
        model, _ = adapted(LARGE, plan("SPAFIT-4-9-II", 24, numbering="text"), num_labels=3)
        assert per_layer(model) == [0] * 4 + [11_264] * 5 + [530_432] * 15


class TestPerLayer:
    """Oracle: 7D + F in group 2; 3·2Dr + F + 2D (FT-I) and 4·2Dr + F + 2D (FT-II) in group 3."""

    @pytest.mark.parametrize("bias", ["delta", "direct"])
    @pytest.mark.parametrize("numbering", ["table-2", "text"])
    @pytest.mark.parametrize("style", ["I", "II"])
    @pytest.mark.parametrize(
        ("config", "ends", "r", "C"),
        [(SMALL, (2, 5), 3, 7), (SMALL, (1, 2), 11, 1), (BASE, (3, 7), 10, 5)],
        ids=["small r=3", "small r=11", "base r=10"],
    )
    def test_spafit(
        self,
        config: BertConfig,
        ends: tuple[int, int],
        r: int,
        C: int,
        style: str,
        numbering: str,
        bias: str,
    ) -> None:
        D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        N1, N2 = ends
        made = plan(f"SPAFIT-{N1}-{N2}-{style}", L, r=r, alpha=5.0, bias=bias, numbering=numbering)
        model, summary = adapted(config, made, num_labels=C)
        matrices = {"I": 3, "II": 4}[style]
        first = 0 if numbering == "table-2" else 1
        group_1, group_2 = N1 - first + 1, N2 - N1
        group_3 = L - group_1 - group_2
        late = matrices * 2 * D * r + F + 2 * D
        assert per_layer(model) == [0] * group_1 + [7 * D + F] * group_2 + [late] * group_3
        outside = sum(trainable(model).values()) - sum(per_layer(model))
        assert outside == C * D + C
        assert [group.trainable for group in summary.groups] == [
            0,
            0,
            group_2 * (7 * D + F),
            group_3 * late,
            0,
            C * D + C,
        ]

    @pytest.mark.parametrize(("method", "matrices"), [("lora-i", 3), ("lora-ii", 4)])
    @pytest.mark.parametrize("r", [1, 13])
    def test_lora_alone_trains_no_bias(self, method: str, matrices: int, r: int) -> None:
        model, _ = adapted(SMALL, plan(method, 9, r=r), num_labels=2)
        assert per_layer(model) == [matrices * 2 * SMALL.hidden_size * r] * 9
        assert {name.rpartition(".")[2] for name in trainable(model)} == {
            "lora_A",
            "lora_B",
            "weight",  # the head's two
            "bias",
        }

    def test_full(self) -> None:
        model, summary = adapted(SMALL, "full", num_labels=2)
        D, F = SMALL.hidden_size, SMALL.intermediate_size
        matrices, biases, norms = 4 * D * D + 2 * D * F, 5 * D + F, 2 * 2 * D
        assert per_layer(model) == [matrices + biases + norms] * 9
        assert summary.trainable == summary.pretrained

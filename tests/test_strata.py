"""Plans at work on a model: what is frozen, attached, enabled, drawn, counted and printed.

The oracle of what a plan does is its set of parameter names, built below from the words of the
paper; what training does afterwards stands in test_strata_trained.py.

The golden drawings are made anew by ``python tests/test_strata.py > tests/golden/summary.txt``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_bert import (
    CONFIG,
    HEAD,
    INTERMEDIATE,
    MODULES,
    ROWS,
    C,
    D,
    L,
    R,
    added,
    logits,
    short,
    tiny_bert,
)
from torch.nn.utils import parametrize

import spafit
from spafit.adapters import BiasDelta, LoRA, ParallelAdapter, SeriesAdapter
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import PlanError
from spafit.methods import METHODS, plan
from spafit.plans import Plan, Stratum
from spafit.strata import adapt, summarise
from spafit.summary import Summary


def snapshot(model: BertForSequenceClassification) -> dict[str, Any]:
    """Record all that adapting may change."""
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "objects": [id(parameter) for parameter in model.parameters()],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "adaptation": model.adaptation,
    }


def assert_unchanged(model: BertForSequenceClassification, before: dict[str, Any]) -> None:
    now = snapshot(model)
    values, expected = now.pop("values"), dict(before)
    kept = expected.pop("values")
    assert now == expected
    assert list(values) == list(kept)
    assert all(torch.equal(values[name], kept[name]) for name in kept)


@pytest.mark.parametrize("row", ROWS)
class TestAdapt:
    """Oracle: the names above, and the model as it was before."""

    def test_trains_what_is_declared_and_nothing_else(self, row: str) -> None:
        plan, declared = ROWS[row]
        model = tiny_bert()
        adapt(model, plan)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == declared | HEAD
        assert model.adaptation is not None
        assert len(model.adaptation.trainable) == len(trainable)
        assert set(model.adaptation.trainable) == trainable
        assert model.adaptation.plan == plan

    def test_pretrained_keys_and_tensors_stay(self, row: str) -> None:
        model = tiny_bert()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        objects = {name: id(parameter) for name, parameter in model.named_parameters()}
        adapt(model, ROWS[row][0])
        after = model.state_dict()
        assert [name for name in after if not added(name)] == list(before)
        assert {name for name in after if added(name)} == {n for n in ROWS[row][1] if added(n)}
        for name, parameter in model.named_parameters():
            if name in before:
                assert id(parameter) == objects[name], "taken over, not copied"
                assert torch.equal(parameter, before[name])

    def test_a_checkpoint_of_the_base_still_loads(self, row: str) -> None:
        other = tiny_bert(seed=9)
        model = tiny_bert()
        adapt(model, ROWS[row][0])
        result = model.load_state_dict(other.state_dict(), strict=False)
        assert result.unexpected_keys == []
        assert set(result.missing_keys) == {name for name in ROWS[row][1] if added(name)}
        assert torch.equal(logits(model), logits(other))

    def test_training_begins_at_the_pretrained_function(self, row: str) -> None:
        model = tiny_bert(torch.float32)
        before = logits(model)
        adapt(model, ROWS[row][0])
        assert torch.equal(logits(model), before)

    @pytest.mark.parametrize("training", [True, False])
    def test_training_mode_stays(self, row: str, training: bool) -> None:
        model = tiny_bert().train(training)
        adapt(model, ROWS[row][0])
        assert {module.training for module in model.modules()} == {training}

    def test_dtype_and_device_stay(self, row: str) -> None:
        model = tiny_bert(torch.float16)
        adapt(model, ROWS[row][0])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}

    def test_adapting_twice_is_refused(self, row: str) -> None:
        model = tiny_bert()
        adapt(model, ROWS[row][0])
        before = snapshot(model)
        with pytest.raises(PlanError, match=f"adapted already, by {ROWS[row][0].name}; load it"):
            adapt(model, "bitfit")
        assert_unchanged(model, before)

    def test_nothing_is_allocated_on_meta(self, row: str) -> None:
        with torch.device("meta"):
            model = BertForSequenceClassification(CONFIG, C)
        summary = adapt(model, ROWS[row][0])
        assert all(parameter.is_meta for parameter in model.parameters())
        assert summary == adapt(tiny_bert(), ROWS[row][0])


class TestRefusals:
    """Oracle: the model as it was."""

    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            (plan("SPAFIT-4-9-II", 24), "is for 24 layers, the model has 6"),
            (plan("bitfit", 5), "is for 5 layers, the model has 6"),
            ("SPAFIT-1-5-II", "leaves no layer for group 3"),
            ("SPAFIT-4-9-II", "N2 = 9 is beyond the last layer, 5"),
            ("bitfat", r"there is no method 'bitfat' \(did you mean bitfit\?\); there are"),
            (Path("missing.json"), "cannot be read"),
        ],
    )
    def test_a_plan_that_does_not_fit(self, wrong: Any, reason: str) -> None:
        model = tiny_bert()
        before = snapshot(model)
        with pytest.raises(PlanError, match=reason):
            adapt(model, wrong)
        assert_unchanged(model, before)
        adapt(model, "bitfit")  # and it can still be adapted

    def test_names_and_files_are_taken_too(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.json"
        path.write_text(short("SPAFIT-0-2-II").to_json(), encoding="utf-8")
        for given in (path, str(path), short("SPAFIT-0-2-II")):
            model = tiny_bert()
            adapt(model, given)
            assert model.adaptation is not None
            assert model.adaptation.plan == short("SPAFIT-0-2-II")


EVERY_LINEAR = Plan(
    "every linear",
    L,
    [Stratum("all", 0, L - 1, {f"layer.{m}": [LoRA(R)] for m in MODULES if "Norm" not in m})],
)


def drawn_a(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Give every A that adapting draws."""
    model = tiny_bert(dtype)
    adapt(model, EVERY_LINEAR, seed=seed)
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith("lora_A")}


class TestDraws:
    """Oracle: uniform numbers in ±1/√in for A, zeros for B and δ, from the seed alone."""

    def test_a_seed_gives_the_same_numbers(self) -> None:
        first, again, other = drawn_a(seed=5), drawn_a(seed=5), drawn_a(seed=6)
        assert len(first) == 36
        for name in first:
            assert torch.equal(first[name], again[name])
            assert not torch.equal(first[name], other[name])

    def test_the_global_generator_has_no_part_in_it(self) -> None:
        model = tiny_bert(torch.float32)
        torch.manual_seed(1234)
        before = torch.get_rng_state()
        adapt(model, EVERY_LINEAR, seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        expected = drawn_a(seed=5)
        assert all(torch.equal(model.get_parameter(name), A) for name, A in expected.items())

    def test_layers_and_modules_are_independent(self) -> None:
        for (one, A1), (two, A2) in itertools.combinations(drawn_a().items(), 2):
            size = min(A1.numel(), A2.numel())
            pair = torch.stack([A1.flatten()[:size], A2.flatten()[:size]])
            # Of 160 and more independent numbers; 630 pairs stay below 5 standard deviations.
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(size), (one, two)

    def test_kaiming_uniform(self) -> None:
        drawn = drawn_a()
        for name, A in drawn.items():
            in_features = INTERMEDIATE if ".output.dense" in name and "attention" not in name else D
            assert A.shape == (R, in_features)
            assert float(A.abs().max()) <= 1 / math.sqrt(in_features)
        unit = torch.cat([(A * math.sqrt(A.shape[1])).flatten() for A in drawn.values()])
        assert float(unit.abs().max()) > 0.99
        # Variance 1/3 of 6,576 numbers; its own standard deviation is 0.0037.
        assert abs(float(unit.square().mean()) - 1 / 3) < 0.02
        assert abs(float(unit.mean())) < 0.04

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_the_same_numbers_in_every_type(self, dtype: torch.dtype) -> None:
        in_float32 = drawn_a()
        for name, A in drawn_a(dtype).items():
            assert torch.equal(A, in_float32[name].to(dtype))

    @pytest.mark.parametrize("row", ROWS)
    def test_b_and_delta_are_zero(self, row: str) -> None:
        model = tiny_bert()
        adapt(model, ROWS[row][0])
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "bias_delta.delta")):
                assert torch.count_nonzero(parameter) == 0, name
            elif name.endswith("lora_A"):
                assert torch.count_nonzero(parameter) > 0, name


def large(plan: Plan) -> Summary:
    """Adapt a BERT of BERT-large's sizes, without values, and with as many layers as the plan."""
    with torch.device("meta"):
        config = BertConfig(num_hidden_layers=plan.num_layers)
        return adapt(BertForSequenceClassification(config, num_labels=3), plan)


def notes(plan: Plan) -> list[str]:
    """Return the lines under the table."""
    lines = str(large(plan)).splitlines()
    return lines[[line[0] for line in lines].index("└") + 1 :]


GOLDEN = Path(__file__).parent / "golden" / "summary.txt"


def drawings() -> str:
    """Draw Figure 2 for a plan of the paper and for one unlike any of the paper's."""
    return "\n".join(f"{adapt(tiny_bert(), ROWS[row][0])}\n" for row in ("spafit ii", "mixed"))


class TestSummary:
    """Oracle: the counts of ``requires_grad``, and drawings that were looked at by eye."""

    @pytest.mark.parametrize("row", ROWS)
    def test_counts(self, row: str) -> None:
        model = tiny_bert()
        size = sum(parameter.numel() for parameter in model.parameters())
        summary = adapt(model, ROWS[row][0])
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert summary.trainable == count == sum(group.trainable for group in summary.groups)
        assert summary.pretrained == size
        assert summary.percent == pytest.approx(100 * count / size)
        assert summarise(model) == summary
        assert summary.plan == ROWS[row][0]

    @pytest.mark.parametrize("row", ROWS)
    def test_groups(self, row: str) -> None:
        model = tiny_bert()
        plan, declared = ROWS[row]
        summary = adapt(model, plan)
        prefixes = [["bert.embeddings."]]
        prefixes += [
            [f"bert.encoder.layer.{i}." for i in range(stratum.first, stratum.last + 1)]
            for stratum in plan.strata
        ]
        prefixes += [["bert.pooler."], ["classifier."]]
        for group, starts in zip(summary.groups, prefixes, strict=True):
            members = [n for n in declared | HEAD if n.startswith(tuple(starts))]
            assert group.trainable == sum(model.get_parameter(n).numel() for n in members)

    def test_drawings(self) -> None:
        assert drawings() == GOLDEN.read_text(encoding="utf-8")

    @pytest.mark.parametrize("row", ROWS)
    def test_the_drawing_adds_up(self, row: str) -> None:
        summary = adapt(tiny_bert(), ROWS[row][0])
        lines = [line for line in str(summary).splitlines() if line[0] in "┌│├└"]
        assert len({len(line) for line in lines}) == 1, "a straight right edge"
        cells = [re.split(r"\s*│\s*", line) for line in lines if "│" in line]
        first = [row for row in cells[1:] if row[1]]  # of each group
        counts = [int(row[4].replace(",", "")) for row in first]
        assert sum(counts[:-1]) == counts[-1] == summary.trainable
        shares = [float(row[5]) for row in first]
        for count, share in zip(counts, shares, strict=True):
            assert abs(share - 100 * count / summary.pretrained) <= 0.005

    @pytest.mark.parametrize(
        ("name", "layers"),
        [
            *((name, 24) for name in (*METHODS, "linear-probe")),
            *((name, 6) for name in ("lora-ii", "SPAFIT-1-3-I", "SPAFIT-20%-40%-II")),
            *((name, 48) for name in ("full", "SPAFIT-8-16-II", "SPAFIT-20%-40%-I")),
        ],
    )
    def test_fits_80_columns(self, name: str, layers: int) -> None:
        """And every sub-layer has one line; oracle: the groups, at BERT-large's sizes."""
        summary = large(plan(name, layers))
        lines = str(summary).splitlines()
        assert max(map(len, lines)) <= 80, str(summary)
        assert len({len(line) for line in lines[1:]}) == 1
        sublayers = sum(4 if len(set(group.trains)) > 1 else 1 for group in summary.groups)
        assert len(lines) == 1 + 4 + 2 + sublayers, "none takes two lines"

    def test_absurd_plans_fit_80_columns(self) -> None:
        """Oracle: the words are all there, and each line of the table is as long as the others."""
        every = "query key value attention.output.dense attention.output.LayerNorm".split()
        every += ["intermediate.dense", "layer.output.dense", "layer.output.LayerNorm"]
        strata = [
            Stratum(
                f"stratum {'of a long name ' * (i == 3)}{i}", i, i, {every[i % 8]: [LoRA(r=7777)]}
            )
            if i % 8 not in (4, 7)
            else Stratum(f"{'x' * 300}", i, i, {every[i % 8]: [BiasDelta()]})
            for i in range(11)
        ]
        strata += [
            Stratum("both", 11, 11, {"query": [LoRA(r=9), BiasDelta()], "value": [BiasDelta()]}),
            Stratum("  ", 12, 12, {}),
        ]
        summary = large(Plan("a plan of a long name " * 9, 13, strata, embeddings="full"))
        lines = str(summary).splitlines()
        assert max(map(len, lines)) <= 80, str(summary)
        table = [line for line in lines if line[0] in "┌│├└"]
        assert len({len(line) for line in table}) == 1
        assert lines[-len(table) :] == table
        assert "".join(lines[: -len(table)]).startswith("a plan of a long name a plan")
        for words in ("LoRA r=7777 (dense)", "bias + LoRA r=9 (query)", "bias (value)"):
            assert words in str(summary), str(summary)

    @pytest.mark.parametrize(
        ("setting", "note"),
        [
            ({"rate": 0.5}, "low: learning rate × 0.5"),
            ({"weight_decay": 0}, "low: weight decay 0"),
            ({"dropout": 0, "rate": 2}, "low: learning rate × 2, dropout 0"),
        ],
    )
    def test_notes_of_a_stratum(self, setting: dict[str, Any], note: str) -> None:
        strata = [Stratum("low", 0, 1, {"key": [LoRA(3)]}, **setting), Stratum("high", 2, 3)]
        assert notes(Plan("mine", 4, strata)) == [note]

    @pytest.mark.parametrize(
        ("train", "expected"),
        [
            ({"key": [LoRA(3, 4, 0.25)]}, ["low, LoRA r=3: dropout 0.25, alpha 4"]),
            (
                {"key": [LoRA(3, b_rate=16)], "all": [BiasDelta()]},
                ["low, LoRA r=3: B at 16 times A's rate"],
            ),
            (
                {"all": [dataclasses.replace(BiasDelta(), rate=2, weight_decay=0.5)]},
                ["low, bias: learning rate × 2, weight decay 0.5"],
            ),
            (
                {"key, query": [LoRA(3, rate=2)], "value": [LoRA(3)]},
                ["low, LoRA r=3 (attention.self.query attention.self.key): learning rate × 2"],
            ),
            ({"key": [LoRA(3, rank_stabilised=True)], "layer.output": [SeriesAdapter(64)]}, []),
            (
                {"layer.output": [SeriesAdapter(activation="gelu"), ParallelAdapter(scaling=1)]},
                ["low, Series m=D/16: activation gelu", "low, Parallel m=D/16: scaled by 1"],
            ),
        ],
    )
    def test_notes_of_a_technique(self, train: Any, expected: list[str]) -> None:
        """Its modules are named where another has the same caption."""
        plan = Plan("mine", 4, [Stratum("low", 0, 3, train)])
        assert notes(plan) == expected

    def test_a_note_of_the_plan_and_long_ones(self) -> None:
        strata = [Stratum("a long name " * 9, 0, 3, {"key": [BiasDelta()]}, rate=2)]
        made = notes(Plan("mine", 4, strata, rate_decay=0.9))
        assert made[0] == "each layer learns at 0.9 of the rate of the one above it"
        assert made[1].startswith("a long name") and made[2].startswith("  ")
        assert max(map(len, made)) <= 80

    @pytest.mark.parametrize("name", [*METHODS, "houlsby", "pfeiffer", "parallel", "ia3"])
    def test_methods_have_no_notes(self, name: str) -> None:
        assert notes(plan(name, 24)) == []

    @pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel", "ia3"])
    def test_others_methods_fit_80_columns(self, name: str) -> None:
        """Oracle: what was looked at by eye: the words of each sub-layer, and the width."""
        lines = str(large(plan(name, 24))).splitlines()
        assert max(map(len, lines)) <= 80
        words = {
            "houlsby": ("attention.output Series m=D/16", "output           Series m=D/16"),
            "pfeiffer": ("attention.output frozen ", "output           Pfeiffer m=D/16"),
            "parallel": ("attention.output Parallel m=D/", "output           Parallel m=D/"),
            "ia3": ("attention.self   (IA)³ (key value)", "  (IA)³ of input (dense)"),
        }
        assert all(any(word in line for line in lines) for word in words[name])

    def test_what_takes_more_lines_fills_them(self) -> None:
        adapters = [SeriesAdapter(), ParallelAdapter(64)]
        train = {"query": [LoRA(777)], "all": [BiasDelta()], "layer.output": adapters}
        text = str(large(Plan("mine", 24, [Stratum("all layers", 0, 23, train)])))
        lines = [line.split("│")[3].strip() for line in text.splitlines() if line[0] == "│"]
        assert lines[lines.index("output") + 1 :][:2] == [
            "bias, Series m=D/16,",
            "Parallel m=64",
        ]

    def test_a_model_that_was_not_adapted(self) -> None:
        with pytest.raises(PlanError, match="not adapted"):
            summarise(tiny_bert())

    def test_summaries_are_data(self) -> None:
        one, two = adapt(tiny_bert(), "bitfit"), adapt(tiny_bert(seed=8), "bitfit")
        assert one == two
        assert one != adapt(tiny_bert(), plan("bitfit", L, bias="direct"))
        assert json.loads(one.plan.to_json())["name"] == "Full BitFit"


class Twice(torch.nn.Module):
    """A parametrization: the tensor in effect is twice the stored one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class TestMergedOfAChangedModel:
    """Oracle: the name of what is in the way, and of the call that mends it."""

    @pytest.mark.parametrize("adapted", [True, False])
    @pytest.mark.parametrize(
        ("place", "name"),
        [
            ("bert.encoder.layer.3.output.dense", "weight"),
            ("bert.encoder.layer.5.output.LayerNorm", "bias"),
            ("bert.embeddings.word_embeddings", "weight"),
            ("classifier", "weight"),
        ],
    )
    def test_a_parametrization(self, place: str, name: str, adapted: bool) -> None:
        model = tiny_bert()
        if adapted:
            adapt(model, short("SPAFIT-1-3-II"))
        module = model.get_submodule(place)
        parametrize.register_parametrization(module, name, Twice())
        match = (
            rf"^{place}\.parametrizations\.{name}.*; remove it \(torch.*remove_parametrizations\)"
        )
        with pytest.raises(PlanError, match=match):
            spafit.merged_state_dict(model)
        parametrize.remove_parametrizations(module, name)
        spafit.merged_state_dict(model)

    @pytest.mark.parametrize("name", ["classifier.weight", "bert.pooler.dense.weight"])
    def test_what_is_no_longer_there(self, name: str) -> None:
        """A parameter that became a buffer, or a module that was taken out."""
        model = tiny_bert()
        module = model.get_submodule(name.removesuffix(".weight"))
        values = module.weight.detach()
        del module.weight
        module.register_buffer("weight", values)
        with pytest.raises(PlanError, match=f"^the model lacks {name}, which its merged form"):
            spafit.merged_state_dict(model)
        model.bert.pooler = None
        with pytest.raises(PlanError, match=r"^the model lacks bert\.pooler\.dense\.weight, "):
            spafit.merged_state_dict(model)


if __name__ == "__main__":
    print(drawings(), end="")


def test_what_is_attached_by_hand_is_no_part_of_the_base() -> None:
    """Oracle: the fingerprint from before; a LoRALinear with δ is put in without a plan."""
    model = tiny_bert()
    before = spafit.fingerprint(model)
    attention = model.bert.encoder.layer[1].attention.self
    attention.query = spafit.LoRALinear(attention.query, r=2, alpha=3.0)
    spafit.BiasDelta().attach(attention.query, None)
    assert spafit.fingerprint(model) == before


TIMED = """
in time     █ trains ░ frozen, drawn for 10 epochs
still       ░░░░░░░░░░░░░░░░░░░░  frozen
low         ██████████░░░░░░░░░░  freezes after 50 %
the one...  ░░░░██████████████░░  thaws after 2 epochs, freezes after 9 epochs
top         ████████████████████  trains throughout
"""


def test_times_are_drawn_under_the_table() -> None:
    """A bar for each stratum, of 20 columns, in at most 80; none for a plan without times."""
    train = {"key": [BiasDelta()]}
    strata = [
        Stratum("still", 0, 0),
        Stratum("low", 1, 1, train, freeze="50%"),
        Stratum("the one above", 2, 3, train, thaw=2, freeze=9),
        Stratum("top", 4, L - 1, train),
    ]
    drawn = str(adapt(tiny_bert(), Plan("timed", L, strata)))
    assert drawn.endswith(TIMED.rstrip())
    assert max(map(len, drawn.splitlines())) <= 80
    shares = [Stratum("still", 0, 0), Stratum("rest", 1, L - 1, train, thaw="33%")]
    lines = str(adapt(tiny_bert(), Plan("shares", L, shares))).splitlines()[-3:]
    assert lines[0] == "in time  █ trains ░ frozen"
    assert lines[2] == f"rest     {'░' * 7}{'█' * 13}  thaws after 33 %"
    assert "in time" not in str(adapt(tiny_bert(), short("SPAFIT-1-3-II")))
    long = Plan("long", L, [Stratum("all", 0, L - 1, train, thaw=19)])
    assert "drawn for 20 epochs" in str(adapt(tiny_bert(), long))
    assert f"{'░' * 19}█  thaws after 19 epochs" in str(adapt(tiny_bert(), long))
    in_38 = adapt(tiny_bert(), long).drawn(epochs=38)
    assert "drawn for 38 epochs" in in_38 and f"{'░' * 10}{'█' * 10}  thaws" in in_38


@pytest.mark.parametrize("part", ["embeddings", "pooler"])
@pytest.mark.parametrize(
    "setting", [{"rate": 2}, {"weight_decay": 0.5}, {"thaw": 1}, {"freeze": 2}], ids=str
)
def test_settings_of_a_frozen_stratum_are_refused(part: str, setting: dict[str, Any]) -> None:
    """But for the times that the embeddings or the pooler follow."""
    strata = [Stratum("low", 0, 1, **setting), Stratum("top", 2, 3)]
    if part == "pooler":
        strata = [Stratum("top", 0, 1), Stratum("low", 2, 3, **setting)]
    with pytest.raises(
        PlanError, match=r"nothing trains in low \(layers \d-\d\), so that its \w+ "
    ):
        Plan("p", 4, strata)
    if setting.keys() & {"thaw", "freeze"}:
        Plan("p", 4, strata, **{part: "full"})  # type: ignore[arg-type]


def test_a_small_share_is_not_nothing() -> None:
    drawn = str(Summary(plan("bitfit", 4), (), 2, 10**6))
    assert "2 of 1,000,000 numbers train (0.0002 %)" in drawn

"""Loading pre-trained weights: all spellings, types and faults, on tiny checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spafit.adapters import BiasDelta
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import WeightsError, one_line
from spafit.plans import Plan, Stratum
from spafit.strata import adapt, fingerprint
from spafit.trunk.merging import merged_state_dict
from spafit.weights.pretrained import apply_rules, load_pretrained, load_report, load_weights
from weights_tools import make_tiny

Tensors = dict[str, torch.Tensor]
L, D = 4, 24  # make_tiny's
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Write a folder's weights again, changed."""
    tensors = change(load_file(folder / "model.safetensors"))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")
    return folder


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def in_dtype(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def assert_holds(model: BertForSequenceClassification, expected: Tensors) -> None:
    """Compare the model's encoder, and no more, with tensors under the model's own names."""
    found = {name: t for name, t in model.state_dict().items() if name.startswith("bert.")}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "tiny")


@pytest.fixture
def values(tiny: Path) -> Tensors:
    """Return the numbers that every spelling of the checkpoint holds, under the model's names."""
    return load_file(tiny / "model.safetensors")


class TestSpellings:
    """The oracle is the style whose names are the model's own, read by the safetensors library."""

    def test_the_models_own_names(self, tiny: Path, values: Tensors) -> None:
        model = load_pretrained(tiny)
        assert_holds(model, values)
        report = load_report(model)
        assert report.loaded == len(values) == 16 * L + 7
        assert report.loaded_numbers == sum(tensor.numel() for tensor in values.values())
        assert (report.renamed, report.dropped, report.revision) == ((), (), None)
        assert report.files == (tiny / "model.safetensors",)
        assert report.dtypes == {"F32": len(values)}

    def test_old(self, tmp_path: Path, values: Tensors) -> None:
        """bert., gamma and beta, cls.*."""
        model = load_pretrained(make_tiny(tmp_path / "old", style="old"))
        assert_holds(model, values)
        report = load_report(model)
        assert len(report.renamed) == 2 * (2 * L + 1)
        assert ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight") in (
            report.renamed
        )
        assert len(report.dropped) == 8
        assert all(name.startswith("cls.") for name, _ in report.dropped)

    def test_bare(self, tmp_path: Path, values: Tensors) -> None:
        """No prefix, and position_ids."""
        model = load_pretrained(make_tiny(tmp_path / "bare", style="bare"))
        assert_holds(model, values)
        report = load_report(model)
        assert len(report.renamed) == len(values)
        assert [name for name, _ in report.dropped] == ["embeddings.position_ids"]

    def test_all_at_once(self, tmp_path: Path, values: Tensors) -> None:
        """No prefix, gamma and beta, cls.*, and position_ids."""
        folder = make_tiny(tmp_path / "mixed", style="old")
        edit(folder, lambda old: {name.removeprefix("bert."): t for name, t in old.items()})
        edit(folder, lambda old: {**old, "embeddings.position_ids": torch.arange(53)[None]})
        assert_holds(load_pretrained(folder), values)

    def test_several_files(self, tiny: Path, values: Tensors) -> None:
        names = sorted(values)
        places = {name: f"model-{1 + names.index(name) % 3}-of-3.safetensors" for name in names}
        for file in set(places.values()):
            part = {name: values[name] for name in names if places[name] == file}
            save_file(part, tiny / file)
        index = tiny / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (tiny / "model.safetensors").unlink()
        model = load_pretrained(tiny)
        assert_holds(model, values)
        assert len(load_report(model).files) == 3

    @pytest.mark.parametrize("name", ["embeddings.gamma", "encoder.layer.0.MyLayerNorm.gamma"])
    def test_gamma_elsewhere_is_not_renamed(self, tiny: Path, name: str) -> None:
        assert apply_rules(f"bert.{name}") == (f"bert.{name}", "")
        edit(tiny, lambda tensors: {**tensors, name: torch.zeros(D)})
        with pytest.raises(WeightsError, match=f"unexpected: {name}"):
            load_pretrained(tiny)

    def test_position_ids_that_count_otherwise(self, tmp_path: Path) -> None:
        folder = make_tiny(tmp_path / "bare", style="bare")
        for dtype in (torch.int64, torch.int32, torch.bfloat16):
            counted = torch.arange(1, 54)[None].to(dtype)
            edit(folder, lambda old, counted=counted: {**old, "embeddings.position_ids": counted})
            with pytest.raises(WeightsError, match=r"position_ids is not 0, 1, 2 \.\.\., so"):
                load_pretrained(folder)

    @pytest.mark.parametrize(
        "dtype", [torch.int32, torch.uint8, torch.float16, torch.float64, torch.bfloat16]
    )
    def test_position_ids_of_any_type(self, tmp_path: Path, dtype: torch.dtype) -> None:
        """Also rounded ones: bfloat16 has 8 bits, so that 257 becomes 256."""
        count = 301 if dtype.is_floating_point else 53
        folder = make_tiny(tmp_path / "bare", style="bare", max_position_embeddings=count)
        cast = torch.arange(count)[None].to(dtype)
        edit(folder, lambda old: {**old, "embeddings.position_ids": cast})
        assert ("embeddings.position_ids", "the constant 0, 1, 2 ...") in (
            load_report(load_pretrained(folder)).dropped
        )
        cast[0, 7] += 1
        edit(folder, lambda old: {**old, "embeddings.position_ids": cast})
        with pytest.raises(WeightsError, match="position_ids is not"):
            load_pretrained(folder)

    def test_position_ids_of_several_rows_are_refused_for_their_shape(self, tmp_path: Path) -> None:
        folder = make_tiny(tmp_path / "bare", style="bare")
        rows = torch.arange(53).repeat(2, 1)
        edit(folder, lambda old: {**old, "embeddings.position_ids": rows})
        with pytest.raises(WeightsError, match=r"has the shape \[2, 53\], expected one row; leave"):
            load_pretrained(folder)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16])
    def test_token_type_ids_that_are_0(self, tiny: Path, dtype: torch.dtype) -> None:
        ids = torch.zeros(1, 53, dtype=dtype)
        name = "bert.embeddings.token_type_ids"
        edit(tiny, lambda old: {**old, name: ids})
        assert load_report(load_pretrained(tiny)).dropped == ((name, "the constant 0"),)
        ids[0, 7] = 1
        edit(tiny, lambda old: {**old, name: ids})
        with pytest.raises(WeightsError, match="token_type_ids is not 0 everywhere"):
            load_pretrained(tiny)

    def test_integers_that_wrap_are_not_0_1_2(self, tmp_path: Path) -> None:
        folder = make_tiny(tmp_path / "bare", style="bare", max_position_embeddings=301)
        wrapped = torch.arange(301)[None].to(torch.uint8)
        edit(folder, lambda old: {**old, "embeddings.position_ids": wrapped})
        with pytest.raises(WeightsError, match="position_ids is not"):
            load_pretrained(folder)


class TestTypes:
    """The oracle is torch's own conversion of the values that were written."""

    @pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("loaded", [torch.float32, torch.float64, torch.bfloat16])
    def test_stored_and_loaded(
        self, tiny: Path, values: Tensors, stored: torch.dtype, loaded: torch.dtype
    ) -> None:
        edit(tiny, in_dtype(stored))
        model = load_pretrained(tiny, dtype=loaded)
        expected = {name: tensor.to(stored).to(loaded) for name, tensor in values.items()}
        assert_holds(model, expected)
        assert {parameter.dtype for parameter in model.parameters()} == {loaded}

    def test_two_types_in_one_file(self, tiny: Path) -> None:
        edit(tiny, lambda tensors: {**tensors, POOLER[0]: tensors[POOLER[0]].half()})
        assert load_report(load_pretrained(tiny)).dtypes == {"F32": 16 * L + 6, "F16": 1}

    def test_a_type_that_no_model_has(self, tiny: Path) -> None:
        with pytest.raises(WeightsError, match=r"not as torch\.int64"):
            load_pretrained(tiny, dtype=torch.int64)

    def test_fingerprint_of_a_half_file(self, tiny: Path) -> None:
        """The same whether loaded as float16 or as float32; another for other values."""
        single = fingerprint(load_pretrained(tiny))
        edit(tiny, in_dtype(torch.float16))
        half = {
            fingerprint(load_pretrained(tiny, dtype=dtype))
            for dtype in (torch.float16, torch.float32, torch.float64)
        }
        assert len(half) == 1
        assert single not in half

    def test_fingerprint_of_every_spelling(self, tmp_path: Path) -> None:
        folders = [make_tiny(tmp_path / s, style=s, num_labels=5) for s in ("new", "old", "bare")]
        assert len({fingerprint(load_pretrained(folder)) for folder in folders}) == 1
        assert len({fingerprint(load_pretrained(folders[0], num_labels=n)) for n in (1, 5)}) == 1


class TestWithoutBiases:
    """Oracle: the same file with biases of 0."""

    @pytest.mark.parametrize("module", ["attention.self.key", "output.LayerNorm"])
    def test_a_bias_that_no_layer_has_is_0_and_can_be_trained(
        self, tiny: Path, tmp_path: Path, values: Tensors, module: str
    ) -> None:
        names = [f"bert.encoder.layer.{layer}.{module}.bias" for layer in range(L)]
        edit(tiny, lambda tensors: without(tensors, *names))
        model = load_pretrained(tiny)
        assert_holds(model, values | {name: torch.zeros(D) for name in names})
        report = load_report(model)
        assert report.newly_drawn[-L:] == tuple(
            (name, "no layer of the file has this bias, so it is 0") for name in sorted(names)
        )
        entry = f"layer.{module}"
        plan = Plan("biases", L, [Stratum("all", 0, L - 1, {entry: [BiasDelta()]})])
        assert adapt(model, plan).trainable == L * D + 2 * D + 2
        model.get_parameter(names[1].removesuffix("bias") + "bias_delta.delta").data.fill_(0.5)
        merged = merged_state_dict(model)
        assert torch.equal(merged[names[1]], torch.full((D,), 0.5))
        assert not merged[names[0]].any()

    def test_one_layer_without_its_bias_is_damage(self, tiny: Path) -> None:
        edit(tiny, lambda tensors: without(tensors, "bert.encoder.layer.1.output.dense.bias"))
        with pytest.raises(
            WeightsError, match=r"missing: bert\.encoder\.layer\.1\.output\.dense\.b"
        ):
            load_pretrained(tiny)

    def test_under_another_name_it_is_unexpected(self, tiny: Path) -> None:
        edit(
            tiny,
            lambda tensors: {
                name.replace("intermediate.dense.bias", "intermediate.dense.b"): tensor
                for name, tensor in tensors.items()
            },
        )
        with pytest.raises(WeightsError, match=r"unexpected: .*intermediate\.dense\.b "):
            load_pretrained(tiny)


class TestHeadAndPooler:
    """What the file lacks is drawn from the seed alone, N(0, initializer_range²), and reported."""

    def test_a_head_that_fits_is_loaded(self, tmp_path: Path) -> None:
        folder = make_tiny(tmp_path / "headed", num_labels=5)
        stored = load_file(folder / "model.safetensors")
        model = load_pretrained(folder, num_labels=5)
        assert torch.equal(model.classifier.weight, stored["classifier.weight"])
        assert torch.equal(model.classifier.bias, stored["classifier.bias"])
        assert load_report(model).newly_drawn == ()

    def test_a_head_that_does_not_fit_is_left_out(self, tmp_path: Path) -> None:
        folder = make_tiny(tmp_path / "headed", num_labels=5)
        model = load_pretrained(folder, num_labels=3)
        report = load_report(model)
        assert [name for name, _ in report.dropped] == ["classifier.weight", "classifier.bias"]
        assert [name for name, _ in report.newly_drawn] == ["classifier.weight", "classifier.bias"]
        assert "classifier.weight [5, 24]" in report.dropped[0][1]
        assert "[3, 24]" in report.dropped[0][1]
        assert "left out classifier.weight" in str(report)
        assert "newly drawn classifier.weight" in str(report)
        assert torch.equal(model.classifier.weight, load_pretrained(
            make_tiny(tmp_path / "headless"), num_labels=3).classifier.weight)  # fmt: skip

    def test_half_a_head_is_left_out(self, tmp_path: Path) -> None:
        folder = make_tiny(tmp_path / "headed", num_labels=5)
        edit(folder, lambda tensors: without(tensors, "classifier.bias"))
        report = load_report(load_pretrained(folder, num_labels=5))
        assert [name for name, _ in report.dropped] == ["classifier.weight"]
        assert len(report.newly_drawn) == 2

    @pytest.mark.parametrize("architectures", [None, ["BertForSequenceClassification"]])
    def test_a_head_without_a_pooler_is_left_out(
        self, tmp_path: Path, architectures: list[str] | None
    ) -> None:
        """As one of tokens has it, which has the same names and shapes."""
        folder = make_tiny(tmp_path / "headed", num_labels=2)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        edit(folder, lambda tensors: without(tensors, *POOLER))
        report = load_report(load_pretrained(folder))
        assert [name for name, _ in report.dropped] == ["classifier.weight", "classifier.bias"]
        assert str(report).count("no pooler, so its classifier reads other hidden states") == 4
        assert report.head == ""

    @pytest.mark.parametrize(
        "name", ["crf.transitions", "bilstm.weight_ih_l0", "model_crf.x", "conv1d.weight"]
    )
    def test_a_head_behind_something_else_is_left_out(self, tmp_path: Path, name: str) -> None:
        folder = make_tiny(tmp_path / "headed", num_labels=2)
        edit(folder, lambda tensors: {**tensors, name: torch.zeros(2, 2)})
        report = load_report(load_pretrained(folder))
        assert report.head == ""
        assert f"newly drawn classifier.weight: the file has {name}: its classifier" in str(report)

    @pytest.mark.parametrize("name", ["crffit.x", "qa_outputs.weight", "loss_fct.weight"])
    def test_a_head_beside_something_else_is_taken(self, tmp_path: Path, name: str) -> None:
        folder = make_tiny(tmp_path / "headed", num_labels=2)
        edit(folder, lambda tensors: {**tensors, name: torch.zeros(2, 2)})
        assert load_report(load_pretrained(folder)).head != ""

    def test_the_draw(self, tmp_path: Path) -> None:
        folder = make_tiny(tmp_path / "wide", hidden_size=300, intermediate_size=11)
        edit(folder, lambda tensors: without(tensors, *POOLER))
        model = load_pretrained(folder, num_labels=7)
        assert [name for name, _ in load_report(model).newly_drawn] == [
            *("classifier.weight", "classifier.bias"),
            *POOLER,
        ]
        for linear, count in ((model.classifier, 7 * 300), (model.bert.pooler.dense, 300 * 300)):
            weight = linear.weight.detach()
            sigma = model.config.initializer_range
            assert abs(float(weight.mean())) < 4 * sigma / math.sqrt(count)
            assert float(weight.std()) == pytest.approx(sigma, rel=4 / math.sqrt(2 * count))
            assert not linear.bias.any()

    def test_the_draw_depends_on_the_seed_alone(self, tiny: Path) -> None:
        def head(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            model = load_pretrained(tiny, num_labels=3, seed=seed, dtype=dtype)
            return model.classifier.weight.detach()

        state = torch.get_rng_state()
        with_pooler = head(4)
        assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
        torch.manual_seed(99)
        assert torch.equal(with_pooler, head(4))
        assert not torch.equal(with_pooler, head(5))
        assert torch.equal(with_pooler.half(), head(4, torch.float16))
        edit(tiny, lambda tensors: without(tensors, *POOLER))
        assert torch.equal(with_pooler, head(4))

    def test_half_a_pooler_is_an_error(self, tiny: Path) -> None:
        edit(tiny, lambda tensors: without(tensors, POOLER[1]))
        with pytest.raises(WeightsError, match=rf"missing: {POOLER[1]} \[24\]"):
            load_pretrained(tiny)


class TestForeignHeads:
    """Oracle: the same file without the further tensors, and BERT's classes of transformers."""

    NAMES = (
        *("cls.predictions.bias", "qa_outputs.weight", "lm_head.decoder.weight", "crf.transitions"),
        *("classifiers.0.weight", "classifier.out_proj.weight", "classifier.0.bias", "log_vars"),
        *("dense.linear.weight", "lstm.weight_ih_l0", "a\nb.c", "", "bert", "embeddings"),
    )

    @pytest.mark.parametrize("name", NAMES, ids=repr)
    def test_outside_of_the_encoder_is_left_out(
        self, tiny: Path, values: Tensors, name: str
    ) -> None:
        edit(tiny, lambda tensors: {**tensors, name: torch.full((2, D), math.nan)})
        model = load_pretrained(tiny)
        assert_holds(model, values)
        [(left_out, reason)] = load_report(model).dropped
        assert left_out == name
        assert "head" in reason
        assert f"left out {one_line(name)}: outside of" in str(load_report(model)) or "cls" in name

    @pytest.mark.parametrize(
        "name",
        [
            *("bert.encoder.layer.0.adapter.down.weight", "encoder.layer.1.lora_A", "bert.x"),
            *("module.bert.encoder.layer.0.output.dense.bias", "teacher.embeddings.LayerNorm.bias"),
            *("bert2.pooler.dense.bias", "a\n.encoder.x", "pooler.dense.extra"),
            # What is added to an encoder from outside of it, such as by P-tuning.
            *("prefix_encoder.embedding.weight", "prompt_encoder.default.x", "soft_prompt"),
            *("adapters.0.down.weight", "lora_A", "embeddings_project.weight"),
        ],
        ids=repr,
    )
    def test_what_may_be_of_an_encoder_is_refused(self, tiny: Path, name: str) -> None:
        edit(tiny, lambda tensors: {**tensors, name: torch.zeros(3)})
        with pytest.raises(WeightsError, match="1 unexpected"):
            load_pretrained(tiny)

    def test_another_model_altogether(self, tiny: Path) -> None:
        """Where the encoder is missing, it may lie under a name that would be left out."""
        edit(tiny, lambda tensors: {"h.0.attn.weight": torch.zeros(3)})
        with pytest.raises(WeightsError, match=r"69 missing, 1 unexpected.*weights_tools inspect"):
            load_pretrained(tiny)

    @pytest.mark.parametrize(
        "kind", ["QuestionAnswering", "TokenClassification", "MultipleChoice", "PreTraining"]
    )
    def test_what_transformers_saves(self, tmp_path: Path, kind: str) -> None:
        """Every head is left out, whatever its shape; the encoder is transformers' own."""
        transformers = pytest.importorskip("transformers")
        sizes = {
            "vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 17, "max_position_embeddings": 19,
        }  # fmt: skip
        theirs = getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**sizes))
        theirs.save_pretrained(tmp_path)
        model = load_pretrained(tmp_path, num_labels=1 if kind == "MultipleChoice" else 2)
        for name, value in theirs.bert.state_dict().items():
            assert torch.equal(model.bert.state_dict()[name], value), name
        report = load_report(model)
        assert report.dropped
        assert report.head == ""
        assert [n for n, _ in report.newly_drawn[:2]] == ["classifier.weight", "classifier.bias"]
        assert not model.classifier.bias.any()


class TestFaults:
    """Each fault is put in by hand, and must be named in the one error."""

    def test_all_are_listed_in_one_error(self, tiny: Path) -> None:
        def spoil(tensors: Tensors) -> Tensors:
            first, second = "bert.encoder.layer.0.", "bert.encoder.layer.1."
            return {
                **without(tensors, first + "output.dense.bias", POOLER[0]),
                first + "attention.self.query.weight": torch.zeros(D, D + 1),
                second + "attention.self.key.bias": torch.zeros(D, dtype=torch.int32),
                second + "output.LayerNorm.gamma": torch.ones(D),
                "encoder.layer.1.output.dense.bias": torch.ones(D),
                "bert.encoder.layer.4.output.dense.bias": torch.ones(D),
                "qa_outputs.weight": torch.ones(2, D),
            }

        edit(tiny, spoil)
        with pytest.raises(WeightsError) as caught:
            load_pretrained(tiny)
        summary, *faults = str(caught.value).split("\n  ")
        for count in (
            *("2 twice", "2 missing", "2 unexpected"),
            *("1 of the wrong shape", "1 of the wrong type"),
        ):
            assert count in summary
        assert "weights_tools inspect" in summary
        assert len(faults) == 8
        for fault in (
            "missing: bert.encoder.layer.0.output.dense.bias [24]",
            "missing: bert.pooler.dense.weight [24, 24]",
            "unexpected: bert.encoder.layer.4.output.dense.bias [24]",
            "unexpected: qa_outputs.weight [2, 24]",
            "of the wrong shape: bert.encoder.layer.0.attention.self.query.weight is [24, 25], "
            "the configuration asks for [24, 24]",
            "of the wrong type: bert.encoder.layer.1.attention.self.key.bias is I32, "
            "expected one of F64, F32, F16, BF16",
        ):
            assert fault in faults
        twice = [fault for fault in faults if fault.startswith("twice: ")]
        assert len(twice) == 2
        assert any("output.LayerNorm.gamma" in f and "output.LayerNorm.weight" in f for f in twice)
        assert any(" encoder.layer.1.output.dense.bias" in f for f in twice)

    def test_a_part_of_the_encoder_without_the_prefix(self, tiny: Path, values: Tensors) -> None:
        """Prefixes may differ within a file, as long as no tensor stands there twice."""
        name = "bert.encoder.layer.0.output.dense.bias"
        bare = {name.removeprefix("bert."): values[name]}
        edit(tiny, lambda tensors: {**without(tensors, name), **bare})
        assert_holds(load_pretrained(tiny), values)

    def test_values_that_are_not_finite(self, tiny: Path) -> None:
        """All such tensors are named, each with its count."""
        query = "bert.encoder.layer.2.attention.self.query.weight"
        norm = "bert.embeddings.LayerNorm.bias"

        def spoil(tensors: Tensors) -> Tensors:
            tensors[query][1, 2:5] = float("nan")
            tensors[norm][7] = -float("inf")
            return tensors

        edit(tiny, spoil)
        with pytest.raises(WeightsError) as caught:
            load_pretrained(tiny)
        assert f"{query} holds NaN or infinite values: 3 of 576" in str(caught.value)
        assert f"{norm} holds NaN or infinite values: 1 of 24" in str(caught.value)

    def test_nan_in_what_is_left_out_does_not_matter(self, tmp_path: Path) -> None:
        folder = make_tiny(tmp_path / "old", style="old")
        edit(folder, lambda old: {**old, "cls.predictions.bias": torch.full((176,), math.nan)})
        load_pretrained(folder)

    def test_another_number_of_layers(self, tiny: Path) -> None:
        config = json.loads((tiny / "config.json").read_text())
        (tiny / "config.json").write_text(json.dumps({**config, "num_hidden_layers": L + 1}))
        with pytest.raises(WeightsError, match=f"{16} missing"):
            load_pretrained(tiny)

    def test_only_a_pickle(self, tiny: Path) -> None:
        (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
        with pytest.raises(WeightsError, match="python -m weights_tools convert"):
            load_pretrained(tiny)

    def test_a_failed_load_leaves_the_model_as_it_was(self, tiny: Path) -> None:
        model = load_pretrained(tiny)
        before = fingerprint(model), load_report(model)
        other = make_tiny(tiny.parent / "other", seed=1)
        edit(other, lambda tensors: {**tensors, "bert.x": torch.zeros(1)})
        with pytest.raises(WeightsError, match=r"unexpected: bert\.x"):
            load_weights(model, other)
        assert (fingerprint(model), load_report(model)) == before

    def test_a_model_that_was_not_loaded_has_no_report(self, tiny: Path) -> None:
        model = BertForSequenceClassification(BertConfig.from_json(tiny), num_labels=2)
        with pytest.raises(WeightsError, match="not loaded by load_pretrained"):
            load_report(model)
        assert load_weights(model, tiny) == load_report(model)


def test_the_loaded_model_is_ready(tiny: Path) -> None:
    """In evaluation mode, with values, every parameter free to train."""
    model = load_pretrained(tiny, num_labels=3)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    ids = torch.arange(12).reshape(3, 4)
    logits = model(ids)
    assert logits.shape == (3, 3)
    logits.sum().backward()
    assert model.bert.embeddings.LayerNorm.weight.grad.any()

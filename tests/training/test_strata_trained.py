"""Models that were trained under a plan: what moved, what did not, and what can be restored.

The oracle is the model before it was adapted, bit for bit, and Hugging Face's BERT for what is
merged. The plans and the names that train under each stand in tiny_bert.py.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_bert import CONFIG, HEAD, ROWS, C, batches, logits, some_steps, tiny_bert

from spafit.adapters import LoRALinear
from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError, WeightsError
from spafit.strata import adapt, adapters_disabled, fingerprint
from spafit.trunk.merging import merged_state_dict

# Those that write to nothing pre-trained; to biases at most; and to whole modules.
DELTA_ROWS = ("bitfit", "lora-i", "lora-ii", "spafit i", "spafit ii")
DIRECT_ROWS = ("bitfit direct", "spafit direct")
FULL_ROWS = ("full", "mixed")


ALSO_IN_64 = ("spafit ii", "spafit direct", "mixed")


def rows_and_dtypes(rows: Iterable[str]) -> list[Any]:
    """Return all rows in float32, some in float64 too, and the other pairs for the full set."""
    return [
        pytest.param(
            row,
            dtype,
            id=f"{row}-{str(dtype).removeprefix('torch.')}",
            marks=() if dtype == torch.float32 or row in ALSO_IN_64 else pytest.mark.full,
        )
        for row in rows
        for dtype in (torch.float32, torch.float64)
    ]


def trained(row: str, dtype: torch.dtype = torch.float64) -> BertForSequenceClassification:
    """Return a model that was adapted and trained, to do with as a test likes."""
    return copy.deepcopy(_trained(row, dtype))


@functools.cache
def _trained(row: str, dtype: torch.dtype) -> BertForSequenceClassification:
    model = tiny_bert(dtype)
    adapt(model, ROWS[row][0])
    some_steps(model)
    return model


class TestTraining:
    """Oracle: every tensor before training; a tensor moves exactly if the plan declares it.

    In float64 even the key biases move: adding the same number to all scores of a query changes
    nothing, so their gradient is rounding noise, of which AdamW makes steps of 1e-11.
    """

    def test_the_rows_are_what_their_plans_say(self) -> None:
        assert {*DELTA_ROWS, *DIRECT_ROWS, *FULL_ROWS} == ROWS.keys()
        writing = {row for row, (plan, _) in ROWS.items() if plan.writes_pretrained}
        assert writing == {*DIRECT_ROWS, *FULL_ROWS}

    @pytest.mark.parametrize("row", ROWS)
    def test_what_is_declared_moves_and_nothing_else(self, row: str) -> None:
        model = tiny_bert()
        adapt(model, ROWS[row][0])
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        some_steps(model)
        after = model.state_dict()
        moved = {name for name in before if not torch.equal(after[name], before[name])}
        assert moved == ROWS[row][1] | HEAD

    @pytest.mark.parametrize(("row", "dtype"), rows_and_dtypes(DELTA_ROWS))
    def test_pretrained_tensors_are_bit_identical(self, row: str, dtype: torch.dtype) -> None:
        base, model = tiny_bert(dtype), trained(row, dtype)
        for name, tensor in base.bert.state_dict().items():
            as_bytes = tensor.numpy().tobytes()
            assert model.bert.get_parameter(name).detach().numpy().tobytes() == as_bytes, name


@pytest.mark.parametrize(("row", "dtype"), rows_and_dtypes([*DELTA_ROWS, *DIRECT_ROWS]))
class TestAdaptersDisabled:
    """Oracle: the logits of the base and of the trained model, bit for bit."""

    def test_inside_the_base_and_after_it_the_trained_model(
        self, row: str, dtype: torch.dtype
    ) -> None:
        base, model = logits(tiny_bert(dtype)), trained(row, dtype)
        learned = logits(model)
        assert (learned - base).abs().max() > 1e-3
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        places = [parameter.data_ptr() for parameter in model.parameters()]
        with adapters_disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), learned)
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
        assert [parameter.data_ptr() for parameter in model.parameters()] == places

    def test_the_head_is_the_bases(self, row: str, dtype: torch.dtype) -> None:
        base, model = tiny_bert(dtype), trained(row, dtype)
        for name in HEAD:
            assert not torch.equal(model.get_parameter(name), base.get_parameter(name))
            with adapters_disabled(model):
                assert torch.equal(model.get_parameter(name), base.get_parameter(name))

    def test_after_an_exception(self, row: str, dtype: torch.dtype) -> None:
        model = trained(row, dtype)
        learned = logits(model)
        with pytest.raises(ZeroDivisionError), adapters_disabled(model):
            raise ZeroDivisionError
        assert torch.equal(logits(model), learned)

    def test_nested(self, row: str, dtype: torch.dtype) -> None:
        base, model = logits(tiny_bert(dtype)), trained(row, dtype)
        learned = logits(model)
        with adapters_disabled(model):
            with adapters_disabled(model):
                assert torch.equal(logits(model), base)
            assert torch.equal(logits(model), base)
            with pytest.raises(ZeroDivisionError), adapters_disabled(model):
                raise ZeroDivisionError
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), learned)

    def test_training_goes_on_as_if_it_had_not_been(self, row: str, dtype: torch.dtype) -> None:
        one, two = trained(row, dtype), trained(row, dtype)
        with adapters_disabled(one):
            logits(one)
        some_steps(one, 2)
        some_steps(two, 2)
        assert torch.equal(logits(one), logits(two))


class TestAdaptersDisabledRefusals:
    """Oracle: where no second copy of what was trained is kept, an error and no change."""

    @pytest.mark.parametrize("row", FULL_ROWS)
    def test_whole_modules(self, row: str) -> None:
        model = trained(row)
        learned = logits(model)
        with (
            pytest.raises(PlanError, match=f"{ROWS[row][0].name} writes to pre-trained tensors"),
            adapters_disabled(model),
        ):
            pytest.fail("the block must not run")
        assert torch.equal(logits(model), learned)

    def test_not_adapted(self) -> None:
        with pytest.raises(PlanError, match="not adapted"), adapters_disabled(tiny_bert()):
            pytest.fail("the block must not run")


class TestMerged:
    """Oracle: the adapted model's logits, from plain BERTs that know of no technique."""

    def same(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Compare logits, which are of the order of 1, to the tolerance of their type."""
        assert ours.abs().max() < 5
        tolerance = 1e-12 if ours.dtype == torch.float64 else 1e-6
        assert (ours - theirs).abs().max() <= tolerance

    @pytest.mark.parametrize(("row", "dtype"), rows_and_dtypes(ROWS))
    def test_in_hugging_face(self, row: str, dtype: torch.dtype) -> None:
        transformers = pytest.importorskip("transformers")
        model = trained(row, dtype)
        theirs = transformers.BertForSequenceClassification(
            transformers.BertConfig(**CONFIG.to_json_dict(), num_labels=C)
        ).to(dtype)
        theirs.load_state_dict(merged_state_dict(model), strict=True)
        self.same(logits(model), logits(theirs.eval()))

    @pytest.mark.parametrize(("row", "dtype"), rows_and_dtypes(ROWS))
    def test_in_a_fresh_model(self, row: str, dtype: torch.dtype) -> None:
        model, fresh = trained(row, dtype), tiny_bert(dtype, seed=9)
        merged = merged_state_dict(model)
        assert list(merged) == list(fresh.state_dict())
        fresh.load_state_dict(merged, strict=True)
        self.same(logits(model), logits(fresh))

    @pytest.mark.parametrize("row", ROWS)
    def test_the_model_is_not_changed_and_merging_twice_is_merging_once(self, row: str) -> None:
        model = trained(row)
        learned = logits(model)
        once, twice = merged_state_dict(model), merged_state_dict(model)
        assert torch.equal(logits(model), learned)
        assert all(torch.equal(once[name], twice[name]) for name in once)
        assert not any(tensor.requires_grad for tensor in once.values())

    @pytest.mark.parametrize("row", ROWS)
    def test_in_half_precision_it_is_rounded_to_the_nearest(self, row: str) -> None:
        """W + s·BA in float64, then float16; the scale is 12/8, and 12/9 in one module.

        Torch goes from float64 to float16 by way of float32, which may add 2^-13 to half a unit.
        """
        model = trained(row).to(torch.float16)
        merged = merged_state_dict(model)
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                W, A, B = (
                    getattr(module, key).detach().numpy().astype(np.float64)
                    for key in ("weight", "lora_A", "lora_B")
                )
                found = merged[f"{name}.weight"].numpy()
                error = np.abs(found - (W + 12.0 / A.shape[0] * (B @ A)))
                unit = np.spacing(np.abs(found)).astype(np.float64)
                assert (error <= (0.5 + 2**-13) * unit).all()
            elif getattr(module, "bias_delta", None) is not None:
                b, delta = module.bias.detach().numpy(), module.bias_delta.delta.detach().numpy()
                assert np.array_equal(merged[f"{name}.bias"].numpy(), b + delta)


@pytest.mark.parametrize("row", ROWS)
class TestDeepcopy:
    """Oracle: the original, which its copy leaves alone."""

    def test_a_copy_is_the_same_model_and_another_object(self, row: str) -> None:
        model = trained(row)
        learned = logits(model)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), learned)
        assert twin.adaptation is not model.adaptation
        assert twin.adaptation is not None
        assert twin.adaptation.plan == ROWS[row][0]
        some_steps(twin, 1)
        assert not torch.equal(logits(twin), learned)
        assert torch.equal(logits(model), learned)

    def test_a_copy_can_be_disabled_alone(self, row: str) -> None:
        if row in FULL_ROWS:
            return
        model = trained(row)
        learned = logits(model)
        twin = copy.deepcopy(model)
        with adapters_disabled(twin):
            assert torch.equal(logits(twin), logits(tiny_bert()))
            assert torch.equal(logits(model), learned)


class TestFingerprint:
    """Oracle: SHA-256 over what is written out here in numpy."""

    # Of arithmetic(); adapter files hold such numbers, so this one must not change.
    # Its generator is expected(), below.
    GOLDEN = "01899cf820e96c467e14ea0d826436dd9bda449af0c73aebb383a2b8f941b9d6"

    @staticmethod
    def arithmetic() -> BertForSequenceClassification:
        """Fill a model with numbers that no generator of random numbers has a part in."""
        model = tiny_bert(torch.float32)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                size = parameter.numel()
                parameter.copy_((torch.arange(size) % 97 - number).reshape(parameter.shape) / 64)
        return model

    @staticmethod
    def expected(model: BertForSequenceClassification) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(model.bert.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(np.ascontiguousarray(tensor.numpy(), dtype="<f4").tobytes())
        return digest.hexdigest()

    def test_is_the_hash(self) -> None:
        model = self.arithmetic()
        assert fingerprint(model) == self.expected(model) == self.GOLDEN

    @pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
    def test_low_precision_values_have_one_fingerprint(self, low: torch.dtype) -> None:
        model = tiny_bert(low)
        in_float32 = copy.deepcopy(model).float()
        assert fingerprint(model) == fingerprint(in_float32)
        assert fingerprint(model) != fingerprint(tiny_bert(torch.float32))

    @pytest.mark.parametrize("row", DELTA_ROWS)
    def test_survives_adapting_and_training(self, row: str) -> None:
        model = tiny_bert(torch.float32)
        before = fingerprint(model)
        adapt(model, ROWS[row][0])
        assert fingerprint(model) == before
        some_steps(model)
        assert fingerprint(model) == before
        assert model.adaptation is not None
        assert model.adaptation.base_fingerprint is None

    @pytest.mark.parametrize("row", [*DIRECT_ROWS, *FULL_ROWS])
    def test_is_kept_where_training_changes_it(self, row: str) -> None:
        model = tiny_bert(torch.float32)
        before = fingerprint(model)
        adapt(model, ROWS[row][0])
        some_steps(model)
        assert fingerprint(model) != before
        assert model.adaptation is not None
        assert model.adaptation.base_fingerprint == before

    def test_one_flipped_bit_in_any_tensor_changes_it(self) -> None:
        model = tiny_bert(torch.float32)
        seen = {fingerprint(model)}
        for number, (name, tensor) in enumerate(model.bert.state_dict().items()):
            bits = tensor.view(torch.int32).flatten()
            place, bit = (number * 7919) % bits.numel(), number % 32
            bits[place] ^= torch.tensor(1).bitwise_left_shift(torch.tensor(bit)).to(torch.int32)
            assert fingerprint(model) not in seen, f"bit {bit} of {name}[{place}]"
            seen.add(fingerprint(model))

    def test_the_head_does_not_count(self) -> None:
        model = tiny_bert()
        before = fingerprint(model)
        with torch.no_grad():
            model.classifier.weight.add_(1)
            model.classifier.bias.add_(1)
        assert fingerprint(model) == before
        other_head = BertForSequenceClassification(CONFIG, C + 4).double()
        other_head.bert.load_state_dict(model.bert.state_dict())
        assert fingerprint(other_head) == before

    def test_same_numbers_at_other_names_or_in_other_shapes_are_another_base(self) -> None:
        model = tiny_bert(torch.float32)
        before = fingerprint(model)
        first, second = model.bert.encoder.layer[0], model.bert.encoder.layer[1]
        model.bert.encoder.layer[0], model.bert.encoder.layer[1] = second, first
        assert fingerprint(model) != before

    def test_a_model_without_values(self) -> None:
        with torch.device("meta"):
            model = BertForSequenceClassification(CONFIG, C)
        with pytest.raises(WeightsError, match="no values"):
            fingerprint(model)


class TestTheseTestsCanFail:
    """Oracle: none; the batches must have padding and both token types, and all labels."""

    def test_batches(self) -> None:
        made = batches(5)
        padded = [inputs["attention_mask"].min(dim=1).values == 0 for inputs, _ in made]
        assert all(bool(rows.any()) and not bool(rows.all()) for rows in padded)
        assert {int(label) for _, labels in made for label in labels} == set(range(C))
        assert all(int(inputs["token_type_ids"].max()) == 1 for inputs, _ in made)

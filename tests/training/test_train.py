"""The arithmetic of training, compared with a plain loop and transformers' schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.small_runs import (
    BATCH,
    LEARNING_RATE,
    METHODS,
    STEPS_AN_EPOCH,
    N,
    SmallRun,
    make_dataset,
    read_log,
    trained,
)
from support.tensors import is_freed
from torch import nn
from torch.profiler import profile

from spafit import glue
from spafit.bert import BertForSequenceClassification
from spafit.methods import plan
from spafit.strata import adapt
from spafit.tasks.glue import Dataset, Example
from spafit.text.tokenization import Encodings, Tokenizer, load_tokenizer
from spafit.training.fit import Result, fit
from spafit.training.inference import predict
from spafit.training.optimisation import (
    epoch_order,
    learning_rate_factor,
    loss_function,
    make_optimizer,
)
from spafit.training.settings import TrainConfig
from spafit.weights.adapter_files import read_adapter_header
from spafit.weights.pretrained import load_pretrained

EPOCHS = 3
MATRICES = (
    *("query.weight", "key.weight", "value.weight", "dense.weight", "classifier.weight"),
    *("lora_A", "lora_B", "embeddings.weight"),
)


def plain_loop(
    model: BertForSequenceClassification,
    small: SmallRun,
    *,
    weight_decay: float,
    decay_all: bool,
    warmup_steps: int,
    max_norm: float | None,
) -> tuple[list[float], list[float], list[dict[str, torch.Tensor]]]:
    """Train as a textbook does; gives losses, gradient norms and the values after each epoch."""
    transformers = pytest.importorskip("transformers")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if name.endswith(MATRICES)]
    vectors = [p for name, p in named if not name.endswith(MATRICES)]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": weight_decay if decay_all else 0.0},
        ],
        lr=LEARNING_RATE,
    )
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, warmup_steps, STEPS_AN_EPOCH * EPOCHS
    )
    names = small.train.task.labels
    losses, norms, after = [], [], []
    torch.manual_seed(3)
    model.train()
    for epoch in range(1, EPOCHS + 1):
        order = epoch_order(N, 3, epoch).tolist()
        while order:
            rows, order = order[:BATCH], order[BATCH:]
            examples = [small.train.examples[row] for row in rows]
            examples.sort(key=lambda each: tokens_of(small.tokenizer, each))  # stable
            targets = torch.tensor([names.index(str(each.label)) for each in examples])
            loss = F.cross_entropy(model(*padded(small.tokenizer, examples)), targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            gradients = [p.grad for _, p in named if p.grad is not None]
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            if max_norm is not None and norm > max_norm:
                for gradient in gradients:
                    gradient *= max_norm / (norm + 1e-6)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            norms.append(norm.item())
        after.append(trained(model))
    return losses, norms, after


def tokens_of(tokenizer: Tokenizer, example: Example) -> int:
    """Count the tokens of one example, frame included."""
    return tokenizer.encode([example.text_a], [example.text_b], max_length=53).lengths[0]


def padded(tokenizer: Tokenizer, examples: list[Example]) -> torch.Tensor:
    """Encode one example at a time, and pad by hand; (3, B, T)."""
    encoded = [tokenizer.encode([e.text_a], [e.text_b], max_length=53) for e in examples]
    T = max(len(each.input_ids[0]) for each in encoded)
    inputs = torch.zeros(3, len(examples), T, dtype=torch.long)  # [PAD] is 0
    for row, each in enumerate(encoded):
        tokens = len(each.input_ids[0])
        inputs[0, row, :tokens] = torch.tensor(each.input_ids[0])
        inputs[1, row, :tokens] = 1
        inputs[2, row, :tokens] = torch.tensor(each.token_type_ids[0])
    return inputs


class TestAgainstAPlainLoop:
    """Oracle: ``plain_loop``: AdamW, transformers' schedule and clipping, all written anew.

    In float64. Dropout is on, with the same seed on both sides, so that no random number may be
    drawn too many.
    """

    @pytest.mark.parametrize(
        ("decay_biases", "max_norm", "method"),
        [
            (False, 1.0, "spafit"),
            (True, 0.0, "spafit"),
            (True, 0.0, "spafit-direct"),
            (False, 1.0, "full"),
            pytest.param(False, 1.0, "spafit-direct", marks=pytest.mark.full),
            pytest.param(True, 0.0, "full", marks=pytest.mark.full),
        ],
    )
    def test_losses_norms_and_final_values(
        self, small: SmallRun, tmp_path: Path, method: str, decay_biases: bool, max_norm: float
    ) -> None:
        ours = small.model(method, dtype=torch.float64)
        result = small.fit(
            ours,
            out=tmp_path,
            epochs=EPOCHS,
            warmup=0.15,
            weight_decay=0.3,
            decay_biases=decay_biases,
            max_grad_norm=max_norm,
        )
        losses, norms, after = plain_loop(
            small.model(method, dtype=torch.float64),
            small,
            weight_decay=0.3,
            decay_all=decay_biases,
            warmup_steps=3,
            max_norm=max_norm or None,
        )
        assert len(result.losses) == 15
        assert np.abs(np.subtract(result.losses, losses)).max() < 1e-11
        logged = [row["grad_norm"] for row in read_log(tmp_path, "loss")]
        assert np.abs(np.subtract(logged, norms)).max() < 1e-10
        assert max(norms) > 1.2, "clipping had nothing to clip"
        found = trained(ours)
        for name, tensor in after[result.best_epoch - 1].items():
            assert (found[name] - tensor).abs().max() < 1e-10, name
        assert not ours.training

    def test_these_losses_depend_on_dropout(self, small: SmallRun) -> None:
        """Otherwise the test above would not see a random number too many."""
        one, other = (
            small.fit(small.model(dropout=dropout), epochs=1).losses for dropout in (True, False)
        )
        assert abs(one[0] - other[0]) > 1e-3


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Collect the row numbers of every batch of training examples, in the order of the draw.

    Each is then made, and made once, of the same rows in the order of their lengths.
    """
    rows_seen: list[list[int]] = []
    to_be_made: list[list[int]] = []
    packed, by_length = Encodings.packed, Encodings.by_length

    def spy_on_draws(self: Encodings, rows: Any) -> list[int]:
        if len(self) == N:
            rows_seen.append(list(rows))
            to_be_made.append(list(rows))
        return by_length(self, rows)

    def spy_on_batches(self: Encodings, rows: list[int], bucketed: bool = False) -> Any:
        if len(self) == N:
            drawn = to_be_made.pop()
            assert not to_be_made
            assert list(rows) == sorted(drawn, key=lambda row: self.lengths[row])  # stable
        return packed(self, rows, bucketed)

    monkeypatch.setattr(Encodings, "by_length", spy_on_draws)
    monkeypatch.setattr(Encodings, "packed", spy_on_batches)
    yield rows_seen
    assert not to_be_made


class TestAccumulation:
    """Oracle: the same run in one part. Float64, dropout off: rounding alone may differ."""

    @pytest.mark.parametrize("accumulation", [pytest.param(2, marks=pytest.mark.full), 3, 7])
    def test_parts_make_the_same_steps(self, small: SmallRun, accumulation: int) -> None:
        models = [small.model(dtype=torch.float64, dropout=False) for _ in range(2)]
        whole, parts = (
            small.fit(model, accumulation=each, batch_size=7, epochs=2)
            for model, each in zip(models, (1, accumulation), strict=True)
        )
        assert np.abs(np.subtract(whole.losses, parts.losses)).max() < 1e-12
        assert whole.best_step == parts.best_step
        first, second = map(trained, models)
        assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-11

    def test_parts_are_as_equal_as_can_be(self, small: SmallRun, seen: list[list[int]]) -> None:
        small.fit(epochs=1, accumulation=3, batch_size=7)
        assert [len(rows) for rows in seen] == [3, 2, 2] * 3 + [2, 1, 1]


class TestOrder:
    """Oracle: a permutation an epoch, that nothing but (seed, epoch) changes."""

    def test_every_example_once_an_epoch_whatever_else_is_set(
        self, small: SmallRun, seen: list[list[int]]
    ) -> None:
        def epochs(run: Callable[[], Result]) -> list[tuple[int, ...]]:
            seen.clear()
            run()
            flat = [row for rows in seen for row in rows]
            return [tuple(flat[start : start + N]) for start in range(0, len(flat), N)]

        first = epochs(lambda: small.fit(epochs=2))
        assert len(first) == 2
        assert all(sorted(epoch) == list(range(N)) for epoch in first)
        assert first[0] != first[1]
        torch.manual_seed(99)
        np.random.seed(99)  # noqa: NPY002 - the global one must not matter
        other = {"batch_size": 10, "accumulation": 4, "eval_every": 2, "learning_rate": 1e-5}
        assert epochs(lambda: small.fit(small.model("full"), epochs=2, **other)) == first
        assert epochs(lambda: small.fit(epochs=3, batch_size=N))[:2] == first
        assert not set(epochs(lambda: small.fit(epochs=2, seed=4))) & set(first)

    @pytest.mark.parametrize(
        ("seed", "epoch", "order"),
        [
            (0, 1, [1, 3, 6, 0, 4, 2, 5]),
            (0, 2, [5, 2, 0, 6, 1, 4, 3]),
            (1, 1, [6, 1, 4, 0, 3, 2, 5]),
        ],
    )
    def test_golden(self, seed: int, epoch: int, order: list[int]) -> None:
        """Made by ``numpy.random.default_rng([seed, epoch]).permutation(7)`` of numpy 2.4."""
        assert epoch_order(7, seed, epoch).tolist() == order


class TestSchedule:
    """Oracle: transformers.get_linear_schedule_with_warmup."""

    @pytest.mark.parametrize("total", [1, 2, 7, 100])
    @pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5, 1.0])
    def test_every_step(self, total: int, warmup: float) -> None:
        transformers = pytest.importorskip("transformers")
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = transformers.get_linear_schedule_with_warmup(
            optimizer, math.ceil(warmup * total), total
        )
        for step in range(total):
            assert learning_rate_factor(step, total, warmup) == schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()

    def test_ends(self) -> None:
        assert learning_rate_factor(0, 10, 0.0) == 1.0
        assert learning_rate_factor(0, 10, 0.3) == 0.0
        assert learning_rate_factor(3, 10, 0.3) == 1.0
        assert learning_rate_factor(9, 10, 0.3) == pytest.approx(1 / 7)


class TestLoss:
    """Oracle: -log softmax and the square, written out."""

    def test_classes(self) -> None:
        logits = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.25, -3.0]], dtype=torch.float64)
        targets = torch.tensor([2, 0])
        shares = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        expected = -math.log(shares[0, 2]) - math.log(shares[1, 0])
        assert float(loss_function(logits, targets)) == pytest.approx(expected, abs=1e-12)

    def test_score(self) -> None:
        logits = torch.tensor([[0.5], [4.0]])
        assert float(loss_function(logits, torch.tensor([1.0, 2.0]))) == 4.25

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_logits_are_widened_first(self, dtype: torch.dtype) -> None:
        logits = torch.tensor([[300.0, -300.0]] * 7, dtype=dtype)
        loss = loss_function(logits, torch.ones(7, dtype=torch.int64))
        assert loss.dtype == torch.float32
        assert float(loss) == 4200.0  # which bfloat16 does not have


class TestWeightDecay:
    """Oracle: without gradient, a step of AdamW multiplies by 1 - rate x decay, or by 1."""

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("decay_biases", [False, True])
    def test_only_matrices_unless_told_otherwise(
        self, small: SmallRun, method: str, decay_biases: bool
    ) -> None:
        model = small.model(method)
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "bias_delta.delta")):
                parameter.data.fill_(2.0)
        before = trained(model)
        optimizer = make_optimizer(
            model, learning_rate=0.5, weight_decay=0.25, decay_biases=decay_biases
        )
        for name, tensor in before.items():
            model.get_parameter(name).grad = torch.zeros_like(tensor)
        optimizer.step()
        for name, tensor in trained(model).items():
            factor = 0.875 if decay_biases or name.endswith(MATRICES) else 1.0
            assert torch.equal(tensor, before[name] * factor), name

    @pytest.mark.parametrize(
        ("method", "name"), [("spafit", "bias_delta.delta"), ("spafit-direct", "bias")]
    )
    def test_a_delta_decays_towards_the_pretrained_bias(
        self, small: SmallRun, method: str, name: str
    ) -> None:
        """With a delta the bias in use goes back to the pre-trained one, a direct bias to 0."""
        module = (model := small.model(method)).bert.encoder.layer[1].output.dense
        pretrained = module.bias.detach().clone()
        module.get_parameter(name).data += 1.0
        optimizer = make_optimizer(model, learning_rate=1.0, weight_decay=0.5, decay_biases=True)
        for _ in range(40):
            module.get_parameter(name).grad = torch.zeros_like(pretrained)
            optimizer.step()
        used = module.bias + (0.0 if module.bias_delta is None else module.bias_delta.delta)
        goal = pretrained if name == "bias_delta.delta" else torch.zeros_like(pretrained)
        assert (used - goal).abs().max() < 1e-6


class TestOptimizer:
    """Oracle: the operations of PyTorch that run."""

    def test_one_call_updates_a_group_on_a_cpu_too(self, small: SmallRun) -> None:
        model = small.model()
        optimizer = make_optimizer(model, learning_rate=0.5, weight_decay=0.25)
        for each in model.parameters():
            each.grad = torch.zeros_like(each) if each.requires_grad else None
        with profile() as found:
            optimizer.step()
        calls = [each.name for each in found.events() if each.name == "aten::_fused_adamw_"]
        assert len(calls) == len(optimizer.param_groups) > 0


def test_a_trained_model_is_freed_with_its_last_reference(small: SmallRun) -> None:
    """Without a search for cycles, so that no run adds to the memory of the next."""

    def made() -> BertForSequenceClassification:
        model = small.model()
        small.fit(model, epochs=1, overwrite=True)
        return model

    assert is_freed(made)


class TestPretrainedTensors:
    """Oracle: the same folder, loaded a second time."""

    @pytest.mark.parametrize("method", ["spafit", "lora-ii", "bitfit", "bitfit-direct"])
    def test_are_bit_identical_after_training(self, small: SmallRun, method: str) -> None:
        plans = {
            "spafit": METHODS["spafit"],
            "lora-ii": plan("lora-ii", 4, r=5),
            "bitfit": plan("bitfit", 4),
            "bitfit-direct": plan("bitfit", 4, bias="direct"),
        }
        before = load_pretrained(small.folder).state_dict()
        model = small.model(plans[method])
        initial = trained(model)
        small.fit(model, epochs=2, weight_decay=0.5, decay_biases=True, eval_every=10)
        after = model.state_dict()
        may_change = {"classifier.weight", "classifier.bias"}
        if method == "bitfit-direct":
            may_change |= {name for name in before if ".layer." in name and name.endswith("bias")}
        assert {name for name in before if not torch.equal(before[name], after[name])} == may_change
        for name, tensor in initial.items():
            assert not torch.equal(after[name], tensor), f"{name} has learned nothing"


class TestRegression:
    """Oracle: the mean square of what the untrained model predicts; the variance of the scores."""

    def test_sts_b(self, small: SmallRun, tmp_path: Path) -> None:
        train = make_dataset("sts-b", N, seed=1)
        scores = np.array([float(str(example.label)) for example in train.examples])
        model = small.model(num_labels=1, dropout=False)
        predicted = np.array(predict(model, small.tokenizer, train).labels, dtype=np.float64)
        result = small.fit(
            model,
            data=(train, train),
            out=tmp_path,
            batch_size=N,
            epochs=30,
            learning_rate=2e-2,
            eval_every=10,
        )
        assert result.losses[0] == pytest.approx(np.mean((predicted - scores) ** 2), rel=1e-5)
        assert result.losses[-1] < 0.5 * scores.var()
        assert result.majority == {"pearson": 0.0, "spearman": 0.0}
        assert list(result.metrics) == ["pearson", "spearman"]
        assert result.metrics["pearson"] > 0.7
        assert read_adapter_header(tmp_path / "adapter.safetensors").labels == ()


class TestBfloat16:
    """Oracle: the same run in float32."""

    def test_is_near_float32(self, small: SmallRun) -> None:
        losses = []
        for precision in ("float32", "bf16"):
            model = small.model(dropout=False)
            losses.append(small.fit(model, precision=precision, epochs=2).losses)
            assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        difference = np.abs(np.subtract(*losses)).max()
        assert 1e-5 < difference < 0.03  # another precision, of 8 bits


class TestRealWeights:
    """Oracle: ln 2 at the start, for the head is new; far below it after a few passes."""

    def test_minilm_learns_32_rows_of_rte_by_heart(
        self, minilm_folder: Path, shared_data: Path
    ) -> None:
        rte = glue.load("rte", "train", shared_data / "glue")
        train: Dataset = dataclasses.replace(rte, examples=rte.examples[:32])
        model = load_pretrained(minilm_folder, num_labels=2)
        adapt(model, "SPAFIT-1-3-II")
        config = TrainConfig(
            epochs=4,
            batch_size=8,
            learning_rate=3e-3,
            max_length=24,
            eval_every=1000,
            device="cpu",
            quiet=True,
        )
        result = fit(model, load_tokenizer(minilm_folder), train, train, config)
        assert np.mean(result.losses[:2]) == pytest.approx(math.log(2), abs=0.1)
        assert np.mean(result.losses[-4:]) < 0.45
        assert result.metrics["accuracy"] > result.majority["accuracy"] + 0.2

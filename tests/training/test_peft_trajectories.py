"""Equal to PEFT where PEFT can do it: the same losses, step by step, and the same final weights.

The oracle is transformers' BERT with PEFT's LoRA, trained by a loop written here on its own: the
same initial weights, A, B and head, the same batches in the same order, dropout off, AdamW with
weight decay on the matrices alone, transformers' linear decay of the learning rate, and gradients
clipped at norm 1. PEFT has no stratum of biases: those are switched on by hand on its side.

What PEFT does that must be known here (seen in PEFT 0.21):

- ``modules_to_save=["classifier"]`` deep-copies the head. The copy, ``classifier.modules_to_save
  .default``, trains; ``classifier.original_module`` stays behind, frozen, and is also what
  ``disable_adapter`` shows. ``task_type="SEQ_CLS"`` would add the same by itself.
- A wrapped Linear moves to ``query.base_layer``; its A and B are ``query.lora_A.default.weight``.
- ``bias="none"`` freezes every bias; ``bias="all"`` would switch on those of all layers and of the
  frozen copy of the head, so it is of no use for strata.

Key biases have no gradient but rounding noise (they shift all scores of a query alike). AdamW
divides that noise by its own size plus 1e-8, so in float64 they wander by 1e-11 and in float32
visibly, without changing any logit. So only losses are compared in float32.

Measured here: losses differ by 4e-16 in float64 and 1e-7 in float32, weights by 4e-14.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny_bert import CONFIG, MODULES, Batch, C, L, batches, tiny_bert

from spafit.bert import BertForSequenceClassification
from spafit.methods import plan
from spafit.plans import Plan
from spafit.strata import adapt, adapters_disabled
from spafit.training.optimisation import learning_rate_factor, make_optimizer
from spafit.weights.pretrained import load_pretrained

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

R, ALPHA = 7, 21.0  # alpha / r = 3, not 1
STEPS = 20
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 3e-3, 0.1, 1.0

QKV = r"attention\.self\.(query|key|value)"
QKV_AND_DENSE = r"attention\.(self\.(query|key|value)|output\.dense)"
LATE = ("intermediate.dense", "output.dense", "output.LayerNorm")

# method -> (layers and modules with LoRA, as PEFT is told; biases that are switched on by hand)
THEIRS: dict[str, tuple[str, list[str]]] = {
    "lora-i": (rf"bert\.encoder\.layer\.\d+\.{QKV}", []),
    "lora-ii": (rf"bert\.encoder\.layer\.\d+\.{QKV_AND_DENSE}", []),
    "SPAFIT-1-3-I": (
        rf"bert\.encoder\.layer\.(4|5)\.{QKV}",
        [f"layer.{i}.{module}.bias" for i in (2, 3) for module in MODULES]
        + [f"layer.{i}.{module}.bias" for i in (4, 5) for module in LATE],
    ),
    "SPAFIT-1-3-II": (
        rf"bert\.encoder\.layer\.(4|5)\.{QKV_AND_DENSE}",
        [f"layer.{i}.{module}.bias" for i in (2, 3) for module in MODULES]
        + [f"layer.{i}.{module}.bias" for i in (4, 5) for module in LATE],
    ),
}


def their_name(name: str) -> str:
    """Return the name that one of our parameters has after PEFT has wrapped the model."""
    name = re.sub(r"\.(lora_[AB])$", r".\1.default.weight", name)
    name = re.sub(r"^classifier\.", "classifier.modules_to_save.default.", name)
    return f"base_model.model.{name}"


def their_model(
    ours: BertForSequenceClassification, method: str, r: int, alpha: float
) -> torch.nn.Module:
    """Build transformers + PEFT with our weights, A, B and head, and switch its biases on."""
    targets, biases = THEIRS[method]
    hf_config = transformers.BertConfig(
        **ours.config.to_json_dict(), num_labels=ours.num_labels, attn_implementation="eager"
    )
    base = transformers.BertForSequenceClassification(hf_config).to(ours.classifier.weight.dtype)
    state = {name: p for name, p in ours.state_dict().items() if not name.endswith(("_A", "_B"))}
    base.load_state_dict(state, strict=True)
    wrapped: torch.nn.Module = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=targets,
            modules_to_save=["classifier"],
        ),
    )
    parameters = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                parameters[their_name(name)].copy_(parameter)
    for name in biases:
        parameters[f"base_model.model.bert.encoder.{name}"].requires_grad_(True)
    return wrapped


def our_losses(
    model: BertForSequenceClassification, data: Iterable[tuple[Batch, torch.Tensor]], steps: int
) -> tuple[list[float], list[float]]:
    """Train as spafit does; give each step's loss and gradient norm."""
    optimizer = make_optimizer(model, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses, norms = [], []
    for step, (inputs, labels) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, steps, 0.0)
        loss = F.cross_entropy(model(**inputs), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def their_losses(
    model: torch.nn.Module, data: Iterable[tuple[Batch, torch.Tensor]], steps: int
) -> list[float]:
    """Train as a script for transformers and PEFT would."""
    decaying: list[torch.Tensor] = []
    other: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (other if name.endswith(".bias") or "LayerNorm" in name else decaying).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": other, "weight_decay": 0}],
        lr=LEARNING_RATE,
    )
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    losses = []
    for inputs, labels in data:
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def direct(method: str) -> Plan:
    """Make the plan under which we train the same numbers as PEFT with biases switched on."""
    return plan(method, L, r=R, alpha=ALPHA, bias="direct")


@pytest.mark.parametrize("method", THEIRS)
class TestTinyModelInFloat64:
    """Oracle: transformers + PEFT; every loss to 1e-9 and every final weight to 1e-8."""

    def test_the_same_numbers_train(self, method: str) -> None:
        ours = tiny_bert()
        adapt(ours, direct(method))
        theirs = their_model(ours, method, R, ALPHA)
        mine = {their_name(name) for name, p in ours.named_parameters() if p.requires_grad}
        # PEFT's name of a bias whose Linear it has wrapped would be query.base_layer.bias; no
        # method trains such a bias, so the names are the same.
        assert mine == {name for name, p in theirs.named_parameters() if p.requires_grad}

    def test_twenty_steps(self, method: str) -> None:
        ours = tiny_bert()
        adapt(ours, direct(method), seed=11)
        theirs = their_model(ours, method, R, ALPHA)
        before = {name: p.detach().clone() for name, p in ours.named_parameters()}
        data = batches(STEPS, B=9, T=13, seed=5)
        losses, norms = our_losses(ours.train(), data, STEPS)
        assert largest_difference(losses, their_losses(theirs.train(), data, STEPS)) < 1e-9

        parameters = dict(theirs.named_parameters())
        wrapped = {name.replace(".base_layer", ""): p for name, p in parameters.items()}
        for name, parameter in ours.named_parameters():
            difference = (parameter - wrapped[their_name(name)]).abs().max()
            assert difference < 1e-8, f"{name}: {difference:.3g}"
        # It was a trajectory worth the name: everything moved, and clipping had its say.
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad and not name.endswith("key.bias"):
                assert (parameter - before[name]).abs().max() > 1e-3, name
        assert max(norms) > MAX_NORM > min(norms)
        # The frozen copy of the head is PEFT's own business, and is as it was.
        kept = parameters["base_model.model.classifier.original_module.weight"]
        assert torch.equal(kept, before["classifier.weight"])


def rte_batches(
    shared_data: Path, folder: Path, steps: int, size: int
) -> list[tuple[Batch, torch.Tensor]]:
    """Encode the first rows of RTE with transformers' tokenizer, padded to their longest."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    path = shared_data / "glue" / "RTE" / "train.tsv"
    with path.open(newline="\n", encoding="utf-8-sig") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1 : 1 + steps * size]
    made = []
    for start in range(0, steps * size, size):
        _, first, second, labels = zip(*rows[start : start + size], strict=True)
        encoded = tokenizer(
            list(first),
            list(second),
            truncation="longest_first",
            max_length=64,
            padding="longest",
            return_tensors="pt",
        )
        inputs = {key: encoded[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
        made.append((inputs, torch.tensor([label == "not_entailment" for label in labels]).long()))
    return made


class TestMiniLMOnRTE:
    """Oracle: transformers + PEFT on real weights and real rows, in float32; losses to 1e-4."""

    def test_eight_steps(self, shared_data: Path, minilm_folder: Path) -> None:
        steps, method = 8, "SPAFIT-1-3-II"
        # In eval mode on both sides, which is how dropout is off with the configuration as it is.
        ours = load_pretrained(minilm_folder, num_labels=2).eval()
        adapt(ours, plan(method, 6, r=16, alpha=40.0, bias="direct"))
        theirs = their_model(ours, method, 16, 40.0).eval()
        data = rte_batches(shared_data, minilm_folder, steps, 8)
        assert max(inputs["input_ids"].shape[1] for inputs, _ in data) == 64
        losses, _ = our_losses(ours, data, steps)
        assert largest_difference(losses, their_losses(theirs, data, steps)) < 1e-4
        inputs, _ = data[-1]
        with torch.no_grad():
            learned = ours(**inputs)
            with adapters_disabled(ours):
                shift = (learned - ours(**inputs)).abs().max()
        assert shift > 1e-2  # it has gone some way, a hundred times the tolerance


class TestBiasDeltaAndDirectBias:
    """Oracle: each other. Without weight decay, training δ from 0 in b + δ is training b.

    The gradients with respect to δ and b are the same number. b + δ and b differ by rounding
    alone, at most half an ulp of a number below 2 in each step: 20 · 1.1e-16 < 3e-15 in all. A
    gradient then differs by some 1e-14, and AdamW, whose step is a gradient divided by its own size
    plus 1e-8, makes at most 1e-6 of the learning rate of it, 3e-9, where a gradient is zero but for
    noise, as a key bias's is; elsewhere nearer 1e-12. Hence the bounds of the trajectories above.
    Measured: losses 4e-16, biases 5e-15, key biases 2e-11.
    """

    def train(
        self, method: str, bias: str, weight_decay: float
    ) -> tuple[list[float], BertForSequenceClassification]:
        model = tiny_bert()
        adapt(model, plan(method, L, r=R, alpha=ALPHA, bias=bias), seed=4)
        optimizer = make_optimizer(
            model, learning_rate=LEARNING_RATE, weight_decay=weight_decay, decay_biases=True
        )
        losses = []
        for inputs, labels in batches(STEPS, B=9, T=13, seed=6):
            loss = F.cross_entropy(model(**inputs), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return losses, model

    @pytest.mark.parametrize("method", ["bitfit", "SPAFIT-1-3-II"])
    def test_without_weight_decay_they_are_one(self, method: str) -> None:
        delta_losses, delta = self.train(method, "delta", 0.0)
        direct_losses, model = self.train(method, "direct", 0.0)
        assert largest_difference(delta_losses, direct_losses) < 1e-9
        base = tiny_bert()
        moved = 0
        for name, trained in model.named_parameters():
            if name.endswith(".bias") and name.startswith("bert.encoder"):
                module: Any = delta.get_submodule(name.removesuffix(".bias"))
                shift = 0.0 if module.bias_delta is None else module.bias_delta.delta
                assert torch.equal(module.bias, base.get_parameter(name))
                assert (module.bias + shift - trained).abs().max() < 1e-8, name
                moved += bool((trained - module.bias).abs().max() > 1e-3)
        assert moved == {"bitfit": 7 * 6, "SPAFIT-1-3-II": 7 * 2 + 3 * 2}[method]  # not the keys'

    def test_with_weight_decay_they_are_two(self) -> None:
        """A delta is pulled back to the pre-trained bias, a bias towards zero."""
        delta_losses, _ = self.train("bitfit", "delta", 1.0)
        direct_losses, _ = self.train("bitfit", "direct", 1.0)
        assert largest_difference(delta_losses, direct_losses) > 1e-5


def test_the_tiny_model_has_no_dropout() -> None:
    """Or the trajectories could not agree in training mode."""
    assert CONFIG.hidden_dropout_prob == CONFIG.attention_probs_dropout_prob == 0
    assert CONFIG.head_dropout_prob == 0
    assert C > 2

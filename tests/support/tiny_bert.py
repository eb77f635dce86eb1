"""A tiny BERT whose weights make every term matter, plans for it, and a few steps.

Shared by the tests of plans at work. All sizes are pairwise unequal, so that a swapped axis fails.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from spafit.adapters import BiasDelta, DirectBias, Full, LoRA
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.methods import plan
from spafit.plans import Plan, Stratum

L, D, A, INTERMEDIATE, C = 6, 20, 5, 37, 3
CONFIG = BertConfig(
    vocab_size=53,
    hidden_size=D,
    num_hidden_layers=L,
    num_attention_heads=A,  # Dh = 4
    intermediate_size=INTERMEDIATE,
    max_position_embeddings=17,
    type_vocab_size=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
MODULES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)

Batch = dict[str, torch.Tensor]


def tiny_bert(
    dtype: torch.dtype = torch.float64, seed: int = 0, config: BertConfig = CONFIG
) -> BertForSequenceClassification:
    """Build the model, in eval mode, with random weights far from their initial values."""
    model = BertForSequenceClassification(config, num_labels=C)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("LayerNorm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embeddings" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
    return model.to(dtype).eval()


def batches(count: int, B: int = 4, T: int = 11, seed: int = 1) -> list[tuple[Batch, torch.Tensor]]:
    """Return random padded batches with both token types, and labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        lengths = torch.randint(2, T + 1, (B, 1), generator=generator)
        lengths[0] = T
        mask = torch.arange(T) < lengths
        ids = torch.randint(1, CONFIG.vocab_size, (B, T), generator=generator)
        types = (torch.arange(T) >= lengths // 2) & mask
        inputs = {
            "input_ids": ids * mask,
            "attention_mask": mask.long(),
            "token_type_ids": types.long(),
        }
        made.append((inputs, torch.randint(C, (B,), generator=generator)))
    return made


def logits(model: torch.nn.Module, seed: int = 3) -> torch.Tensor:
    """Return the logits (B, C) of one batch."""
    [(inputs, _)] = batches(1, seed=seed)
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def some_steps(model: BertForSequenceClassification, steps: int = 5) -> None:
    """Train what trains by AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for inputs, labels in batches(steps):
        optimizer.zero_grad()
        loss: torch.Tensor = F.cross_entropy(model(**inputs), labels)
        torch.autograd.backward(loss)
        optimizer.step()


R = 8  # the rank in these tests; alpha is 12, so that the scale is 1.5
QKV = MODULES[:3]
LATE = ("intermediate.dense", "output.dense", "output.LayerNorm")
HEAD = {"classifier.weight", "classifier.bias"}


def names(layers: Iterable[int], modules: Iterable[str], *parameters: str) -> set[str]:
    """Write parameter names out."""
    return {
        f"bert.encoder.layer.{layer}.{module}.{parameter}"
        for layer, module, parameter in itertools.product(layers, modules, parameters)
    }


def short(method: str, **options: Any) -> Plan:
    """Make a method's plan for the tiny model."""
    return plan(method, L, r=R, alpha=12.0, **options)


def mixed() -> Plan:
    """Make a plan of strata unlike any method's, with two techniques on one module."""
    lora = LoRA(R, 12.0)
    return Plan(
        "mixed",
        L,
        [
            Stratum("first", 0, 0, {"query": [lora, BiasDelta()], "intermediate.dense": [Full()]}),
            Stratum("still", 1, 3),
            Stratum("norms", 4, 4, {"layer.output.LayerNorm": [BiasDelta()]}),
            Stratum("last", 5, 5, {"layer.output.dense": [DirectBias(), LoRA(R + 1, 12.0)]}),
        ],
        pooler="full",
    )


def all_names() -> set[str]:
    """Every parameter of a model as built."""
    return {name for name, _ in BertForSequenceClassification(CONFIG, C).named_parameters()}


# what it is -> (plan, the encoder's, embeddings' and pooler's parameters that train under it)
ROWS: dict[str, tuple[Plan, set[str]]] = {
    "full": (short("full"), all_names() - HEAD),
    "bitfit": (short("bitfit"), names(range(6), MODULES, "bias_delta.delta")),
    "bitfit direct": (short("bitfit", bias="direct"), names(range(6), MODULES, "bias")),
    "lora-i": (short("lora-i"), names(range(6), QKV, "lora_A", "lora_B")),
    "lora-ii": (short("lora-ii"), names(range(6), MODULES[:4], "lora_A", "lora_B")),
    "spafit i": (
        short("SPAFIT-1-3-I"),
        names([2, 3], MODULES, "bias_delta.delta")
        | names([4, 5], QKV, "lora_A", "lora_B")
        | names([4, 5], LATE, "bias_delta.delta"),
    ),
    "spafit ii": (
        short("SPAFIT-0-2-II"),
        names([1, 2], MODULES, "bias_delta.delta")
        | names([3, 4, 5], MODULES[:4], "lora_A", "lora_B")
        | names([3, 4, 5], LATE, "bias_delta.delta"),
    ),
    "spafit direct": (
        short("SPAFIT-1-3-II", bias="direct"),
        names([2, 3], MODULES, "bias")
        | names([4, 5], MODULES[:4], "lora_A", "lora_B")
        | names([4, 5], LATE, "bias"),
    ),
    "mixed": (
        mixed(),
        names([0], ["attention.self.query"], "lora_A", "lora_B", "bias_delta.delta")
        | names([0], ["intermediate.dense"], "weight", "bias")
        | names([4], ["output.LayerNorm"], "bias_delta.delta")
        | names([5], ["output.dense"], "bias", "lora_A", "lora_B")
        | {"bert.pooler.dense.weight", "bert.pooler.dense.bias"},
    ),
}
ADDED = ("lora_A", "lora_B", "bias_delta.delta")


def added(name: str) -> bool:
    """Return whether the end of a name is a technique's."""
    return name.endswith(ADDED)

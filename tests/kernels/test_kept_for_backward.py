"""What each kind of layer keeps for backward: the table of docs/guide/memory.md, counted.

Oracle: every tensor that autograd is given to keep, parameters not counted, each memory once.
"""

from __future__ import annotations

import pytest
import torch
from support.tensors import kept_for_backward

from spafit.adapters import BiasDelta, Full, LoRA
from spafit.bert import BertForSequenceClassification, Layer
from spafit.config import BertConfig
from spafit.layout import Packed
from spafit.plans import Plan, Stratum
from spafit.strata import adapt
from spafit.techniques import Technique

D, A, INTERMEDIATE, R = 20, 5, 37, 3
LENGTHS = [8] * 9  # 72 tokens, so that no row belongs to no sequence
N, T = sum(LENGTHS), LENGTHS[0]
QKV = ("query", "key", "value")
ALL = (
    *QKV,
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "layer.output.dense",
    "layer.output.LayerNorm",
)
LATE = ("intermediate.dense", "layer.output.dense", "layer.output.LayerNorm")

# Numbers a token, in that table's symbols; a mask takes a quarter of a float32. At these sizes LoRA
# is merged in forward, so U is not among them.
BIASES = 5.5 * D + INTERMEDIATE + A * T + 4
ROWS: dict[str, tuple[dict[str, list[Technique]], float]] = {
    "biases": ({each: [BiasDelta()] for each in ALL}, BIASES),
    "FT-I": (
        {**{each: [LoRA(R)] for each in QKV}, **{each: [BiasDelta()] for each in LATE}},
        BIASES + D,
    ),
    "FT-II": (
        {
            **{each: [LoRA(R)] for each in (*QKV, "attention.output.dense")},
            **{each: [BiasDelta()] for each in LATE},
        },
        BIASES + 2 * D,
    ),
    "full": ({each: [Full()] for each in ALL}, BIASES + 3 * D + INTERMEDIATE),
}


def make_layer(train: dict[str, list[Technique]]) -> Layer:
    config = BertConfig(
        vocab_size=53,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=A,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=17,
    )
    model = BertForSequenceClassification(config)
    adapt(model, Plan("one", 1, [Stratum("all", 0, 0, train)]))
    layer = model.bert.encoder.layer[0]
    assert isinstance(layer, Layer)
    return layer.train()


def kept_bytes(layer: Layer, X: torch.Tensor) -> int:
    """Run forward, and count what is kept."""
    layer(X, Packed(LENGTHS))  # lays the weights together, which moves them
    with kept_for_backward(layer.parameters()) as sizes:
        H7 = layer(X, Packed(LENGTHS))
    assert H7.grad_fn is not None
    return sum(sizes.values())


@pytest.mark.parametrize("kind", ROWS)
def test_is_what_the_table_says(kind: str) -> None:
    train, numbers = ROWS[kind]
    X = torch.randn(N, D, requires_grad=True)
    assert kept_bytes(make_layer(train), X) == 4 * N * numbers


def test_below_the_first_trained_layer_nothing_is_kept() -> None:
    layer = make_layer({})
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        H7 = layer(torch.randn(N, D), Packed(LENGTHS))
    assert not kept
    assert H7.grad_fn is None

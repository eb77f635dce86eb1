"""The least time for each kind of work in a training step: operations, bytes and a floor.

    floor_ms = max(operations / measured rate of products, bytes / measured rate of copies)

for each kind by itself, if every operand is read from memory once per operation and every result
written once, and if common fusions are one operation: a linear map and its bias, dropout with
addition and LayerNorm, attention with its softmax and dropout. Dropout draws its masks again in
backward, so that they take no memory. N tokens, D hidden, F intermediate, e bytes of an
activation or a frozen weight; trained values, their gradients and moments have 4 bytes.

====================  =====================================  =====================================
kind                  operations                             bytes
====================  =====================================  =====================================
base products         2·N·in·out, each way                   e·(N·in + in·out + N·out), each way
LoRA, forward         2·N·r·(in + out)                       e·(N·r + r·(in + out))
LoRA, backward        4·N·r·(in + out)                       e·(N·in + N·out + 4·N·r) +
                                                             (e + 4)·r·(in + out)
attention             4·t²·D forward, 8·t²·D backward        4·e·N·D forward, 8·e·N·D backward
add + norm            (few)                                  3·e·N·D forward, 4·e·N·D where
                                                             something is kept for backward, and
                                                             4·e·N·D backward
GELU                  (few)                                  2·e·N·F forward, 3·e·N·F backward
bias gradients        (few)                                  e·N·out
embeddings, dropout   (few)                                  (3·4 + e)·N·D
clipping              (few)                                  12 bytes a trained number
optimizer             (few)                                  28 bytes a trained number
copies                none                                   10 bytes a trained number
====================  =====================================  =====================================

The base products and attention together are the floor of :mod:`benchmarks.harness.arithmetic`,
exactly; where whole matrices train, the base products have their gradients as well, a third
product. A trained number is read for the norm of the gradient, read and written for clipping; read
with its gradient and two moments, and written with these, by AdamW; and its gradient is set to 0
and its value rounded for the products (10 bytes, the last only where e is below 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spafit.adapters import LoRALinear
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig

BASE, LORA, ATTENTION, ADD_NORM, GELU = "base products", "LoRA", "attention", "add + norm", "GELU"
BIASES, EMBEDDINGS, DROPOUT = "bias gradients", "embeddings", "dropout"
OPTIMIZER, CLIPPING, COPIES = "optimizer", "clipping", "copies"
_TRAINED_BYTES = 4


@dataclass(frozen=True)
class Floor:
    """The least time for a kind of work.

    Attributes
    ----------
    kind : str
        Such as "base products".
    flop, traffic_bytes : float
        Operations, and bytes read and written.
    """

    kind: str
    flop: float
    traffic_bytes: float

    def floor_ms(self, flop_per_s: float, bytes_per_s: float) -> float:
        """Return the least time at a device's measured rates."""
        return 1000 * max(self.flop / flop_per_s, self.traffic_bytes / bytes_per_s)


@dataclass(frozen=True)
class Trained:
    """Properties of what trains in a model that determine the work of a step.

    Attributes
    ----------
    first_trainable : int
        The first layer in which anything trains.
    lora : tuple of (int, int, int)
        (in, out, r) of each map with LoRA.
    bias_widths : tuple of int
        Widths of the linear maps in the layers whose bias, or a delta of it, trains.
    numbers : int
        All numbers that train.
    full : tuple of (int, int)
        (in, out) of the linear maps in the layers whose matrix trains.
    """

    first_trainable: int
    lora: tuple[tuple[int, int, int], ...]
    bias_widths: tuple[int, ...]
    numbers: int
    full: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, model: BertForSequenceClassification) -> Trained:
        """Return those of a model."""
        lora = tuple(
            (each.weight.shape[1], each.weight.shape[0], len(each.lora_A))
            for each in model.bert.encoder.modules()
            if isinstance(each, LoRALinear)
        )
        widths, full = [], []
        for name, parameter in model.bert.encoder.named_parameters():
            if not parameter.requires_grad or "LayerNorm" in name:
                continue
            if name.endswith((".bias", ".bias_delta.delta")):
                widths.append(len(parameter))
            elif name.endswith(".weight"):
                full.append((parameter.shape[1], parameter.shape[0]))
        numbers = sum(each.numel() for each in model.parameters() if each.requires_grad)
        return cls(model.bert.frozen_depth, lora, tuple(widths), numbers, tuple(full))


def step_floors(
    config: BertConfig,
    lengths: Sequence[int],
    trained: Trained,
    *,
    element_bytes: int,
    first_computed: int = 0,
) -> list[Floor]:
    """Return the floors of a training step on real tokens, kind by kind.

    Parameters
    ----------
    config : BertConfig
        The sizes.
    lengths : sequence of int
        Real tokens of each sequence of the batch.
    trained : Trained
        What trains.
    element_bytes : int
        e: 2 in half precision with frozen weights stored so, 4 in float32.
    first_computed : int
        0, or ``trained.first_trainable`` where the hidden states below it were kept.
    """
    D, F, L, e = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        element_bytes,
    )
    N = sum(lengths)
    forward, backward = L - first_computed, L - trained.first_trainable
    maps = [(D, 3 * D), (D, D), (D, F), (F, D)]
    passes = forward + backward

    def product(pairs: Sequence[tuple[int, int]], times: float) -> tuple[float, float]:
        flop = sum(2.0 * N * inner * outer for inner, outer in pairs)
        moved = sum(e * (N * inner + inner * outer + N * outer) for inner, outer in pairs)
        return times * flop, times * moved

    base, base_bytes = product(maps, passes)
    full, full_bytes = product(trained.full, 1)  # dW, which is dYᵀ x
    squares = sum(t * t for t in lengths)
    lora_flop = lora_bytes = 0.0
    for inner, outer, r in trained.lora:
        lora_flop += 6.0 * N * r * (inner + outer)
        lora_bytes += e * (N * r + r * (inner + outer))
        lora_bytes += e * (N * inner + N * outer + 4 * N * r)
        lora_bytes += (e + _TRAINED_BYTES) * r * (inner + outer)
    rounding = e + _TRAINED_BYTES if e < _TRAINED_BYTES else 0
    looked_up = 0 if first_computed else N * D * (3 * _TRAINED_BYTES + e)
    return [
        Floor(BASE, base + full, base_bytes + full_bytes),
        Floor(LORA, lora_flop, lora_bytes),
        Floor(
            ATTENTION,
            4.0 * squares * D * (forward + 2 * backward),
            4.0 * e * N * D * (forward + 2 * backward),
        ),
        Floor(ADD_NORM, 0.0, 2.0 * e * N * D * (3 * forward + backward + 4 * backward)),
        Floor(GELU, 0.0, e * N * F * (2.0 * forward + 3.0 * backward)),
        Floor(BIASES, 0.0, float(e * N * sum(trained.bias_widths))),
        Floor(EMBEDDINGS, 0.0, float(looked_up)),
        Floor(CLIPPING, 0.0, 12.0 * trained.numbers),
        Floor(OPTIMIZER, 0.0, 28.0 * trained.numbers),
        Floor(COPIES, 0.0, float(trained.numbers * (_TRAINED_BYTES + rounding))),
    ]

"""The two sides of a comparison of whole models: one training step, written once for both.

A step is the same on both sides but for what gives the logits: forward, mean cross entropy,
backward, gradient norm clipped at 1, AdamW, gradients set to None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baseline import Logits, plain_name
from benchmarks.harness import Contender, Rows
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.inference import autocast
from spafit.kept_prefix import KeptPrefix, prefix_key
from spafit.prefix_cache import PrefixCache, PrefixKey
from spafit.strata import adapt
from spafit.tokenization import Encodings

LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 6e-5, 0.01, 1.0

#: The shapes that models are measured in, with random weights; dropout is 0.1 in all.
SHAPES = {
    "large": BertConfig(),
    "minilm": BertConfig(
        vocab_size=30_522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    ),
    "tiny": BertConfig(
        hidden_size=64, num_hidden_layers=12, num_attention_heads=4, intermediate_size=256
    ),
}
METHODS = {"large": "SPAFIT-4-9-II", "minilm": "SPAFIT-1-3-II", "tiny": "SPAFIT-4-9-II"}
"""What each shape is trained by, unless told otherwise."""

TOLERANCES = {"float32": 1e-3, "bf16": 0.1}
"""The largest difference of logits and gradients through all layers that is rounding alone."""


def adapted_model(
    config: BertConfig, method: str, seed: int, device: torch.device
) -> BertForSequenceClassification:
    """Build a model with random weights, adapted; its B and deltas are not zero.

    LoRA's B and the deltas start at zero; drawn at random, a mistake in them shows in the check.
    """
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config, num_labels=2)
    adapt(model, method, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".lora_B", ".bias_delta")):
                parameter.normal_(0.0, 0.02)
    return model.to(device).eval()


@dataclass(frozen=True)
class Training:
    """A model in training, as a contender.

    Attributes
    ----------
    name : str
        As it stands in the tables.
    model : nn.Module
        It is in training mode while a step is timed, and in evaluation mode while it is checked.
    logits : callable
        Its forward, from row numbers to logits.
    optimizer : torch.optim.Optimizer
        Of what trains.
    labels : Tensor, (n,)
        Of all rows, on the model's device.
    """

    name: str
    model: nn.Module
    logits: Logits
    optimizer: torch.optim.Optimizer
    labels: Tensor

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def step(self, rows: Rows) -> None:
        """Train on one batch."""
        self.model.train()
        torch.autograd.backward(self._loss(self.logits(rows.numbers), rows))
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def results(self, rows: Rows) -> dict[str, Tensor]:
        """Give the logits, and the gradients by what they are of; dropout is off."""
        self.model.eval()
        logits = self.logits(rows.numbers)
        torch.autograd.backward(self._loss(logits, rows))
        by_kind: dict[str, list[Tensor]] = {"logits": [logits.detach()]}
        named = {plain_name(name): each for name, each in self.model.named_parameters()}
        for name in sorted(named):
            gradient = named[name].grad
            if gradient is not None:
                last = name.rpartition(".")[2]
                kind = "classifier" if name.startswith("classifier") else last
                by_kind.setdefault(f"gradients of {kind}", []).append(gradient.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        return {kind: torch.cat(gradients) for kind, gradients in by_kind.items()}

    def contender(self) -> Contender:
        """Give its steps, to be timed."""
        return Contender(self.name, self.step, self.results)

    def _loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return F.cross_entropy(logits.float(), self.labels[list(rows.numbers)])


def in_order(logits: Tensor, order: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """Bring logits (B, C) of rows in one order into the order of ``numbers``."""
    place = {row: at for at, row in enumerate(order)}
    wanted = torch.tensor([place[row] for row in numbers])
    return logits.index_select(0, wanted.to(logits.device, non_blocking=True))


def packed_logits(
    model: BertForSequenceClassification, encodings: Encodings, arithmetic: str = "float32"
) -> Logits:
    """Run a model on packed batches."""
    device = model.classifier.weight.device

    def logits(numbers: Sequence[int]) -> Tensor:
        order = encodings.by_length(numbers)
        batch = encodings.packed(order).to(device)
        with autocast(arithmetic, device):
            found = model.forward_packed(batch)
        return in_order(found, order, numbers)

    return logits


def kept_logits(
    model: BertForSequenceClassification,
    encodings: Encodings,
    batches: Sequence[Rows],
    arithmetic: str = "float32",
) -> Logits:
    """Run a model on packed batches from their hidden states after group 1, kept in memory.

    The states of the batches are computed here, without dropout, as a first epoch would.
    """
    device = model.classifier.weight.device
    key = random_weights_key(model, "float32", arithmetic)
    cache = PrefixCache(encodings, key, folder=None, limit_bytes=2**40)
    kept = KeptPrefix(model, encodings, cache)
    for rows in batches:
        order = encodings.by_length(rows.numbers)
        cache.store(order, prefix_states(model, encodings, order, arithmetic))

    def logits(numbers: Sequence[int]) -> Tensor:
        order = encodings.by_length(numbers)
        batch = encodings.packed(order).to(device)
        with autocast(arithmetic, device):
            found = model.forward_packed(batch, prefix=kept(order, batch))
        return in_order(found, order, numbers)

    return logits


def prefix_states(
    model: BertForSequenceClassification,
    encodings: Encodings,
    order: Sequence[int],
    arithmetic: str = "float32",
) -> Tensor:
    """Compute group 1 without dropout: the hidden states (N, D) of rows in an order."""
    device = model.classifier.weight.device
    batch = encodings.packed(order).to(device)
    was_training = model.training
    model.eval()
    with autocast(arithmetic, device):
        states = model.bert.prefix(batch)[: batch.layout.tokens]
    model.train(was_training)
    return states


def random_weights_key(
    model: BertForSequenceClassification, dtype: str, arithmetic: str = "float32"
) -> PrefixKey:
    """Name what the kept states of a model with random weights belong to."""
    return prefix_key(model, "random weights", "benchmark", dtype=dtype, arithmetic=arithmetic)

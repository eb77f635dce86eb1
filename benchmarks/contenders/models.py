"""The two sides of a comparison of whole models: how they are built, and a plain training step.

The step is that of the baseline: forward, mean cross entropy, backward, gradient norm clipped at 1,
AdamW, gradients set to None, and in fp16 the loss scaled. spafit's own is in
:mod:`benchmarks.contenders.steps`; what a step does is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders.baseline import Logits, plain_name
from benchmarks.harness.timing import Contender, Rows
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.machine.precision import autocast
from spafit.strata import adapt
from spafit.text.tokenization import Encodings
from spafit.training.prefix.cache import PrefixCache, PrefixKey
from spafit.training.prefix.kept import KeptPrefix, prefix_key

LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 6e-5, 0.01, 1.0

#: The shapes that models are measured in, with random weights; dropout is 0.1 in all.
SHAPES = {
    "large": BertConfig(),
    "base": BertConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
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
METHODS = {
    "large": "SPAFIT-4-9-II",
    "base": "SPAFIT-2-4-II",
    "minilm": "SPAFIT-1-3-II",
    "tiny": "SPAFIT-4-9-II",
}
"""What each shape is trained by, unless told otherwise."""

TOLERANCES = {"float32": 1e-3, "bf16": 0.1, "fp16": 0.05}
"""The largest difference of logits and gradients through all layers that is rounding alone."""

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CHECK_SCALES = {"float32": 1.0, "bf16": 1.0, "fp16": 1024.0}
"""What the loss is multiplied by where gradients are compared: fp16's would vanish."""


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
            if name.endswith((".lora_B", ".bias_delta.delta")):
                parameter.normal_(0.0, 0.02)
    return model.to(device).eval()


@dataclass(frozen=True)
class Training:
    """A model in training, as a contender.

    Attributes
    ----------
    name : str
        Its name in the tables.
    model : nn.Module
        It is in training mode while a step is timed, and in evaluation mode while it is checked.
    logits : callable
        Its forward, from row numbers to logits.
    optimizer : torch.optim.Optimizer
        Of what trains.
    labels : Tensor, (n,)
        Of all rows, on the model's device.
    precision : {"float32", "bf16", "fp16"}
        That of the forward pass.
    scaler : torch.amp.GradScaler
        One that is enabled for fp16.
    """

    name: str
    model: nn.Module
    logits: Logits
    optimizer: torch.optim.Optimizer
    labels: Tensor
    precision: str = "float32"
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False)
    )

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @cached_property
    def targets(self) -> dict[Rows, Tensor]:
        """The labels of each batch, created before timing starts."""
        return {}

    def step(self, rows: Rows) -> None:
        """Train on one batch, without synchronizing with a GPU."""
        if not self.model.training:
            self.model.train()
        loss = self._loss(self.logits(rows.numbers), rows)
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def results(self, rows: Rows) -> dict[str, Tensor]:
        """Return the logits, and the gradients by kind of parameter; dropout is off."""
        self.model.eval()
        logits = self.logits(rows.numbers)
        scale = CHECK_SCALES[self.precision]
        torch.autograd.backward(scale * self._loss(logits, rows))
        found = {"logits": logits.detach(), **gradients_by_kind(self.model, scale)}
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def contender(self) -> Contender:
        """Return a contender that runs these steps."""
        return Contender(self.name, self.step, self.results)

    def _loss(self, logits: Tensor, rows: Rows) -> Tensor:
        if rows not in self.targets:
            self.targets[rows] = self.labels[list(rows.numbers)]
        return F.cross_entropy(logits.float(), self.targets[rows])


def gradients_by_kind(model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """Return copies of all gradients divided by a scale, one vector for each kind of parameter."""
    by_kind: dict[str, list[Tensor]] = {}
    named = {plain_name(name): each for name, each in model.named_parameters()}
    for name in sorted(named):
        gradient = named[name].grad
        if gradient is not None:
            last = name.rpartition(".")[2]
            kind = "classifier" if name.startswith("classifier") else last
            by_kind.setdefault(f"gradients of {kind}", []).append(gradient.flatten() / scale)
    return {kind: torch.cat(gradients) for kind, gradients in by_kind.items()}


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, object]]:
    """Divide what trains as spafit's optimizer does: matrices decay, vectors do not."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [each for each in trained if each.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [each for each in trained if each.dim() == 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def in_order(logits: Tensor, order: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """Reorder the logits (B, C) of some rows into the order of ``numbers``."""
    place = {row: at for at, row in enumerate(order)}
    wanted = torch.tensor([place[row] for row in numbers])
    return logits.index_select(0, wanted.to(logits.device, non_blocking=True))


def packed_logits(
    model: BertForSequenceClassification, encodings: Encodings, precision: str = "float32"
) -> Logits:
    """Run a model on packed batches."""
    device = model.classifier.weight.device

    def logits(numbers: Sequence[int]) -> Tensor:
        order = encodings.by_length(numbers)
        batch = encodings.packed(order).to(device)
        with autocast(precision, device):
            found = model.forward_packed(batch)
        return in_order(found, order, numbers)

    return logits


def kept_states(
    model: BertForSequenceClassification,
    encodings: Encodings,
    batches: Sequence[Rows],
    precision: str = "float32",
) -> KeptPrefix:
    """Return the hidden states after group 1 of some batches, kept in memory.

    They are computed here, without dropout, as a first epoch would.
    """
    key = random_weights_key(model, "float32", precision)
    cache = PrefixCache(encodings, key, folder=None, limit_bytes=2**40)
    kept = KeptPrefix(model, encodings, cache)
    for rows in batches:
        order = encodings.by_length(rows.numbers)
        cache.store(order, prefix_states(model, encodings, order, precision))
    return kept


def prefix_states(
    model: BertForSequenceClassification,
    encodings: Encodings,
    order: Sequence[int],
    precision: str = "float32",
) -> Tensor:
    """Compute group 1 without dropout: the hidden states (N, D) of rows in an order."""
    device = model.classifier.weight.device
    batch = encodings.packed(order).to(device)
    was_training = model.training
    model.eval()
    with autocast(precision, device):
        states = model.bert.prefix(batch)[: batch.layout.tokens]
    model.train(was_training)
    return states


def random_weights_key(
    model: BertForSequenceClassification, dtype: str, precision: str = "float32"
) -> PrefixKey:
    """Return the key for the kept states of a model with random weights."""
    return prefix_key(model, "benchmark", dtype=dtype, precision=precision)

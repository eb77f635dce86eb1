"""The contenders of a training step: transformers + PEFT, and spafit's own step in all its forms.

For spafit the package's own step is timed (:func:`spafit.training.make_step.make_step`), with its
frozen matrices stored as in a run. On a GPU both sides' batches are prepared in pinned memory, as
by :class:`spafit.training.batches.Feed` or a data loader, with their kept hidden states; copying
them to the device is part of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders.baseline import padded_logits, peft_twin
from benchmarks.contenders.models import (
    CHECK_SCALES,
    DTYPES,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Training,
    adapted_model,
    decay_groups,
    gradients_by_kind,
    in_order,
    kept_states,
)
from benchmarks.harness.lengths import TaskRows, random_labels
from benchmarks.harness.timing import Contender, Rows
from spafit.bert import BertForSequenceClassification, set_impl
from spafit.config import BertConfig
from spafit.layout import PackedBatch
from spafit.machine.precision import autocast, has_half
from spafit.strata import frozen_in_half, layers_of_group
from spafit.training.captured_step import CapturedStep
from spafit.training.make_step import make_step
from spafit.training.optimisation import make_optimizer
from spafit.training.settings import TrainConfig
from spafit.training.step import MicroBatch, TrainingStep

PADDING_MULTIPLE = 64
"""What the lengths of the compiled baseline's static shapes are multiples of."""


class Form(NamedTuple):
    """How a contender launches its steps.

    Attributes
    ----------
    name : str
        Its name in the tables.
    launched : str
        Its description there.
    step : str
        Of spafit's settings; empty for the baseline.
    kept : bool
        Whether the hidden states after group 1 are read; dropout is then off in group 1.
    pad_to, multiple : int
        Of the baseline's padding (:func:`~benchmarks.contenders.baseline.padded_batch`).
    compiled : bool
        Whether the baseline is compiled; a multiple above 1 makes its shapes static.
    precision : str
        Its own, whatever is asked for.
    recomputed : tuple of int
        The groups of layers that are recomputed in backward.
    """

    name: str
    launched: str
    step: str = ""
    kept: bool = False
    pad_to: int = 0
    multiple: int = 1
    compiled: bool = False
    precision: str = ""
    recomputed: tuple[int, ...] = ()

    @property
    def prepares(self) -> bool:
        """Return whether it is captured or compiled, for every shape or for some."""
        return self.compiled or self.step in ("captured", "compiled")


#: By the names of the command line, in the order of the tables.
FORMS = {
    "peft": Form("transformers + PEFT, longest", "eager"),
    "peft-float32": Form("transformers + PEFT, longest, float32", "eager", precision="float32"),
    "peft-128": Form("transformers + PEFT, 128", "eager", pad_to=128),
    "peft-compiled": Form(
        "transformers + PEFT, longest, compiled", "torch.compile, dynamic=None", compiled=True
    ),
    "peft-compiled-static": Form(
        f"transformers + PEFT, multiples of {PADDING_MULTIPLE}, compiled",
        "torch.compile, dynamic=False",
        multiple=PADDING_MULTIPLE,
        compiled=True,
    ),
    "eager": Form("spafit", "eager", "eager"),
    "float32": Form("spafit, float32", "eager", "eager", precision="float32"),
    "recomputed": Form("spafit, layers recomputed", "eager", "eager", recomputed=(2, 3)),
    "kept": Form("spafit, prefix kept", "eager", "eager", kept=True),
    "compiled": Form("spafit, compiled", "torch.compile, dynamic=True", "compiled"),
    "captured": Form("spafit, captured", "CUDA graphs", "captured"),
    "captured-kept": Form("spafit, captured, prefix kept", "CUDA graphs", "captured", kept=True),
}
BASELINE = "peft"


class _OnHost(NamedTuple):
    """A batch before it is copied to the device."""

    order: list[int]
    batch: PackedBatch
    targets: Tensor
    prefix: Tensor | None

    def pinned(self) -> _OnHost:
        """Return the batch in pinned memory."""
        prefix = None if self.prefix is None else self.prefix.pin_memory()
        return _OnHost(self.order, self.batch.pinned(), self.targets.pin_memory(), prefix)


class ProductTraining:
    """spafit's training step, as a contender.

    Parameters
    ----------
    form : Form
        One of spafit's.
    model : BertForSequenceClassification
        On its device. A captured step needs one for itself: its gradients stay where they are.
    data : TaskRows
        The rows.
    batches : sequence of Rows
        Those whose hidden states are kept, where the form wants that.
    precision : str
        That of the forward pass.
    labels : Tensor, (n,)
        Of all rows, on the host.
    """

    def __init__(
        self,
        form: Form,
        model: BertForSequenceClassification,
        data: TaskRows,
        batches: Sequence[Rows],
        precision: str,
        labels: Tensor,
    ) -> None:
        self.form, self.name, self.model = form, form.name, model
        self.encodings, self.labels, self.precision = data.encodings, labels, precision
        self.device = model.classifier.weight.device
        self.prefix = kept_states(model, data.encodings, batches, precision) if form.kept else None
        self.take_step = self._make()
        self._ready: dict[Rows, _OnHost] = {}

    def _make(self) -> TrainingStep:
        config = TrainConfig(
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            precision=self.precision,
            step=self.form.step,
            device=str(self.device),
        )
        return make_step(self.model, config, _refuse)

    def step(self, rows: Rows) -> None:
        """Train on one batch."""
        if not self.model.training:
            self.model.train()
        self.take_step([self.part(rows)[1]], LEARNING_RATE)

    def part(self, rows: Rows) -> tuple[list[int], MicroBatch]:
        """Return a batch on the device and the order of its rows; only on a CPU is it made anew."""
        made = self._ready.get(rows)
        if made is None:
            made = self._on_host(rows)
            if self.device.type == "cuda":
                made = self._ready[rows] = made.pinned()
        batch, targets = made.batch.to(self.device), made.targets.to(self.device, non_blocking=True)
        prefix = made.prefix
        if prefix is not None:
            prefix = prefix.to(self.device, non_blocking=True)
        return made.order, MicroBatch(batch, targets, prefix)

    def _on_host(self, rows: Rows) -> _OnHost:
        order = self.encodings.by_length(rows.numbers)
        batch = self.encodings.packed(order, bucketed=self.form.step != "eager")
        prefix = None
        if self.prefix is not None:
            prefix = self.prefix.read(order, batch.layout)
            assert prefix is not None, "a batch whose hidden states are not kept"
        return _OnHost(order, batch, self.labels[order], prefix)

    def results(self, rows: Rows) -> dict[str, Tensor]:
        """Return the logits, and the gradients by what they are of; dropout is off.

        Of a captured step the gradients are those of a replay.
        """
        self.model.eval()
        order, part = self.part(rows)
        assert isinstance(part.batch, PackedBatch)
        with autocast(self.precision, self.device):
            logits = self.take_step.forward(part.batch, part.prefix)
        logits = in_order(logits.detach(), order, rows.numbers)
        scale, step = CHECK_SCALES[self.precision], self._step_to_check()
        step.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=scale, enabled=self.precision == "fp16"
        )
        for _ in range(3 if isinstance(step, CapturedStep) else 1):
            step.forget_gradients()
            step.accumulate(part, len(order))
        found = {"logits": logits, **gradients_by_kind(self.model, scale)}
        step.close()
        if isinstance(step, CapturedStep):
            self.restart()
        return found

    def restart(self) -> None:
        """Restart after another step used the model, which discards a captured one's gradients."""
        self.take_step.close()
        self.model.zero_grad(set_to_none=True)
        self.take_step = self._make()

    def _step_to_check(self) -> TrainingStep:
        if isinstance(self.take_step, CapturedStep):
            optimizer = self.take_step.optimizer
            return CapturedStep(self.model, optimizer, precision=self.precision)
        optimizer = make_optimizer(self.model, learning_rate=LEARNING_RATE, weight_decay=0.0)
        return TrainingStep(
            self.model, optimizer, precision=self.precision, forward=self.take_step.forward
        )

    def prepared(self) -> int:
        """Return how many shapes were captured, or functions compiled in this process."""
        if isinstance(self.take_step, CapturedStep):
            return self.take_step.graphs
        return compiled_functions() if self.form.step == "compiled" else 0

    def contender(self) -> Contender:
        """Return its steps, to be timed."""
        return Contender(self.name, self.step, self.results, prepared=self.prepared)


@dataclass(frozen=True)
class CompiledTraining(Training):
    """The baseline's training step under torch.compile."""

    def contender(self) -> Contender:
        """Return its steps, to be timed."""
        return Contender(self.name, self.step, self.results, prepared=compiled_functions)


def _refuse(note: str) -> None:
    """Raise an error where a run would continue with eager steps, which must not be timed here."""
    raise RuntimeError(note)


def compiled_functions() -> int:
    """Return how many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compiled_twin(twin: torch.nn.Module, form: Form, mode: str) -> Any:
    """Compile a twin; running out of compilations is an error, never an eager step."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = 64
    dynamo.fail_on_recompile_limit_hit = True
    dynamic = False if form.multiple > 1 else None
    return torch.compile(twin, dynamic=dynamic, mode=None if mode == "default" else mode)


def product_model(
    config: BertConfig,
    method: str,
    *,
    precision: str,
    seed: int,
    device: torch.device,
    opened: ExitStack,
    frozen_weights: str = "auto",
    impl: str = "auto",
) -> BertForSequenceClassification:
    """Build spafit's model on its device, with frozen matrices stored as in a run.

    Arguments as for :func:`make_trainings`.
    """
    model = adapted_model(config, method, seed, torch.device("cpu"))
    is_half = frozen_weights == "half" or (frozen_weights == "auto" and has_half(precision, device))
    if is_half and precision != "float32":
        assert model.adaptation is not None
        model.adaptation.base_fingerprint = "random weights"  # else all of them are hashed
        opened.enter_context(frozen_in_half(model, DTYPES[precision], device))
    set_impl(model, impl)
    return model.to(device)


def make_trainings(
    names: Sequence[str],
    config: BertConfig,
    method: str,
    data: TaskRows,
    batches: Sequence[Rows],
    *,
    precision: str,
    seed: int,
    device: torch.device,
    opened: ExitStack,
    frozen_weights: str = "auto",
    compile_mode: str = "default",
    impl: str = "auto",
) -> list[Training | ProductTraining]:
    """Set up contenders by name, all from the same random weights.

    The baseline's share a model and optimizer, and spafit's eager ones a model where both have its
    precision and the groups that it recomputes.

    Parameters
    ----------
    names : sequence of str
        Of :data:`FORMS`.
    config, method : BertConfig, str
        Of the model.
    data, batches : TaskRows, sequence of Rows
        What they will train on.
    precision, seed, device
        How, and where.
    opened : ExitStack
        Holds what must stay while the contenders are used.
    frozen_weights : {"auto", "float32", "half"}
        In what spafit stores its frozen matrices; see :class:`spafit.TrainConfig`.
    compile_mode : str
        torch.compile's, for the baseline.
    impl : str
        The forms of spafit's operations; see :func:`spafit.set_impl`.
    """
    labels = random_labels(len(data.encodings), 2, seed)
    twin = theirs = None
    eager: dict[tuple[str, tuple[int, ...]], BertForSequenceClassification] = {}
    trainings: list[Training | ProductTraining] = []
    for name in names:
        form = FORMS[name]
        own = form.precision or precision
        if not form.step:
            if twin is None or theirs is None:
                twin = peft_twin(adapted_model(config, method, seed, torch.device("cpu")))
                twin.to(device)
                groups: Any = decay_groups(twin.parameters())
                theirs = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
            run = compiled_twin(twin, form, compile_mode) if form.compiled else twin
            logits = padded_logits(run, data.encodings, own, form.pad_to, form.multiple)
            scaler = torch.amp.GradScaler(device.type, enabled=own == "fp16")
            side = CompiledTraining if form.compiled else Training
            trainings.append(side(form.name, twin, logits, theirs, labels.to(device), own, scaler))
            continue
        key = (own, form.recomputed)
        if form.step == "eager" and key in eager:
            model = eager[key]
        else:
            model = product_model(
                config,
                method,
                precision=own,
                seed=seed,
                device=device,
                opened=opened,
                frozen_weights=frozen_weights,
                impl=impl,
            )
            model.bert.encoder.recomputed = {
                layer for group in form.recomputed for layer in layers_of_group(model, group)
            }
            if form.step == "eager":
                eager[key] = model
        trainings.append(ProductTraining(form, model, data, batches, own, labels))
    return trainings

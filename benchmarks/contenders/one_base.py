"""The contenders of :mod:`benchmarks.many_tasks`: k tasks on one base, in spafit and elsewhere.

Each gives the logits (k, n, C) of its tasks in the order of the rows that it was given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.contenders.baseline import padded_batch, peft_twin
from benchmarks.harness.child_process import ChildProcess
from benchmarks.harness.timing import Contender, Rows
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.layout import PackedBatch
from spafit.machine.precision import autocast
from spafit.plans import Plan
from spafit.strata import adapt, pretrained_names, use
from spafit.text.tokenization import Encodings
from spafit.trunk.batches import forward_tasks

ONE_BY_ONE = "spafit, a whole pass for each task"
IN_TURN, MIXED = "spafit, shared trunk, in turn", "spafit, shared trunk, mixed"
PEFT_SWITCHED = "PEFT, set_adapter, no biases"
PEFT_MIXED = "PEFT, adapter_names, no biases"
PARALLEL = "AdapterHub, Parallel"

#: Gives the logits (k, n, C) of rows.
TaskLogits = Callable[[Sequence[int]], Tensor]


def model_of_tasks(
    config: BertConfig, plan: Plan | str, tasks: int, seed: int, device: torch.device
) -> BertForSequenceClassification:
    """Build a model with random weights and as many adapters, of which no value is zero."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config, num_labels=2).to(device).eval()
    for number in range(tasks):
        adapt(model, plan, name=f"task{number}", seed=seed + number, num_labels=2)
        _fill(model)
    use(model, None)
    return model


@torch.no_grad()
def _fill(model: BertForSequenceClassification) -> None:
    """Draw anew what begins at zero, so that a mistake in it shows in the check."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(0.0, 0.02)


@torch.no_grad()
def zero_biases(model: BertForSequenceClassification) -> None:
    """Set all deltas of biases to zero: with them PEFT would not be the same function."""
    for name in model.adaptations:
        use(model, name)
        for key, parameter in model.named_parameters():
            if key.endswith(".bias_delta.delta"):
                parameter.zero_()
    use(model, None)


def contender(name: str, logits: TaskLogits) -> Contender:
    """Return a contender that computes the logits of a batch."""

    @torch.inference_mode()
    def run(rows: Rows) -> Tensor:
        return logits(rows.numbers)

    return Contender(name, run, lambda rows: {"logits": run(rows)})


def shares(model: BertForSequenceClassification, numbers: Sequence[int], own: bool) -> list[range]:
    """Return the places of each task's rows in a batch: all of them, or a part of its own."""
    count = len(numbers)
    tasks = len(model.adaptations)
    n = count // tasks
    return [range(at * n, (at + 1) * n) if own else range(count) for at in range(tasks)]


def one_by_one(
    model: BertForSequenceClassification, encodings: Encodings, precision: str, own: bool
) -> TaskLogits:
    """Compute each task's rows by a pass through all layers, one task after the other.

    The base is one for all, because the memory of k bases is not that of a usual machine; the
    switch from one task to the next, of less than a millisecond, is part of it.
    """

    def logits(numbers: Sequence[int]) -> Tensor:
        found = []
        for name, its in zip(model.adaptations, shares(model, numbers, own), strict=True):
            use(model, name)
            batch, back = _packed(model, encodings, [numbers[at] for at in its])
            with autocast(precision, model.device):
                found.append(model.forward_packed(batch)[back])
        return torch.stack(found)

    return logits


def shared(
    model: BertForSequenceClassification,
    encodings: Encodings,
    precision: str,
    own: bool,
    mixed: bool,
) -> TaskLogits:
    """Compute the layers below the adapters once for all tasks: ``forward_tasks``."""

    def logits(numbers: Sequence[int]) -> Tensor:
        batch, back = _packed(model, encodings, numbers)
        each = shares(model, numbers, own)
        sequences = {
            name: [back[at] for at in its]
            for name, its in zip(model.adaptations, each, strict=True)
        }
        with autocast(precision, model.device):
            found = forward_tasks(model, batch, sequences, mixed=mixed)
        return torch.stack(list(found.values()))

    return logits


def _packed(
    model: BertForSequenceClassification, encodings: Encodings, numbers: Sequence[int]
) -> tuple[PackedBatch, list[int]]:
    """Pack rows, sorted by length; return the place of each in the batch, too."""
    lengths = encodings.lengths
    order = sorted(range(len(numbers)), key=lambda at: lengths[numbers[at]])
    back = [0] * len(order)
    for place, at in enumerate(order):
        back[at] = place
    return encodings.packed([numbers[at] for at in order]).to(model.device), back


def peft_tasks(model: BertForSequenceClassification) -> Any:
    """Build PEFT's model of the same adapters, LoRA and heads, on copies of the weights.

    PEFT refuses a second adapter with biases, so they are left out, and what is added to them has
    to be zero (:func:`zero_biases`).
    """
    first, *others = model.adaptations
    use(model, first)
    twin: Any = peft_twin(model)
    for name in others:
        twin.add_adapter(name, twin.peft_config["default"])
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for name in others:
            use(model, name)
            for key, parameter in model.named_parameters():
                owner, _, which = key.rpartition(".")
                if which in ("lora_A", "lora_B"):
                    theirs[f"base_model.model.{owner}.{which}.{name}.weight"].copy_(parameter)
                elif owner == "classifier":
                    key = f"base_model.model.classifier.modules_to_save.{name}.{which}"
                    theirs[key].copy_(parameter)
    use(model, None)
    return twin.to(model.device).eval()


def peft_names(model: BertForSequenceClassification) -> list[str]:
    """Return the names that the tasks have in PEFT's model."""
    return ["default", *list(model.adaptations)[1:]]


def peft_logits(
    twin: Any, names: Sequence[str], encodings: Encodings, precision: str, own: bool
) -> TaskLogits:
    """Switch from adapter to adapter; or with ``own`` rows give one batch the name of each row."""
    device = next(twin.parameters()).device

    def logits(numbers: Sequence[int]) -> Tensor:
        ids, mask, types = (each.to(device) for each in padded_batch(encodings, numbers))
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        with autocast(precision, device):
            if own:
                of_rows = [name for name in names for _ in range(len(numbers) // len(names))]
                found: Tensor = twin(**inputs, adapter_names=of_rows).logits
                return found.view(len(names), -1, found.shape[1])
            each = []
            for name in names:
                twin.set_adapter(name)
                each.append(twin(**inputs).logits)
            return torch.stack(each)

    return logits


class ParallelProcess(ChildProcess):
    """A process with AdapterHub's ``Parallel`` of the same bottlenecks; see ``parallel_child``.

    Parameters
    ----------
    model : BertForSequenceClassification
        Its adapters are Houlsby's, of one size, in all layers from some layer on.
    encodings : Encodings
        The rows.
    library : Path
        The folder in which the library and its transformers are installed.
    folder : Path
        An empty one, for the weights.

    Attributes
    ----------
    versions : str
        Those of the library and its transformers.
    """

    def __init__(
        self,
        model: BertForSequenceClassification,
        encodings: Encodings,
        library: Path,
        folder: Path,
    ) -> None:
        _write(model, encodings, folder)
        arguments = [str(folder), str(torch.get_num_threads())]
        super().__init__("benchmarks.contenders.parallel_child", arguments, library)
        self.versions = ", ".join(" ".join(each) for each in self.ready.items())

    def contender(self) -> Contender:
        """Return the contender; its time is the process's own."""

        def check(rows: Rows) -> dict[str, Tensor]:
            answer = self.ask({"rows": rows.numbers, "check": True})
            return {"logits": torch.tensor(answer["logits"])}

        return Contender(
            PARALLEL,
            lambda rows: float(self.ask({"rows": rows.numbers, "check": False})["ms"]),
            check,
            has_own_clock=True,
        )


def _write(model: BertForSequenceClassification, encodings: Encodings, folder: Path) -> None:
    """Write what :func:`benchmarks.contenders.parallel_child.parallel` reads."""
    use(model, None)
    state = {name: each.detach() for name, each in model.named_parameters()}
    base = [name for name in pretrained_names(model) if not name.startswith("classifier.")]
    save_file({name: state[name] for name in base}, folder / "base.safetensors")
    tasks, depth, sizes = {}, 0, set()
    for task, adaptation in model.adaptations.items():
        use(model, task)
        depth = adaptation.depth
        for name in adaptation.trainable:
            values = tasks[f"{task}/{name}"] = model.get_parameter(name).detach()
            if name.endswith(".down.weight"):
                sizes.add(len(values))
    use(model, None)
    save_file(tasks, folder / "tasks.safetensors")
    [size] = sizes
    about = {
        "config": model.config.to_json_dict(),
        "tasks": list(model.adaptations),
        "bottleneck": size,
        "leave_out": list(range(depth)),
        "rows": list(zip(encodings.input_ids, encodings.token_type_ids, strict=True)),
    }
    (folder / "setup.json").write_text(json.dumps(about), encoding="utf-8")

"""Adapter files: everything that was trained, in one safetensors file, tied to its base.

The tensors have the model's own names (``bert.encoder.layer.7.attention.self.query.lora_A`` ...;
the head is always among them), except for those of :data:`NAMES_IN_FILES`. The header's metadata
holds the plan, the task, its label names and the fingerprint of the base, all as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spafit.adaptation import Adaptation
from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError, WeightsError, has_controls, listed, one_line
from spafit.plans import Plan
from spafit.strata import adapt, base_fingerprint, check_name, require_none_to_choose
from spafit.version import __version__
from spafit.weights.pretrained import HEAD
from spafit.weights.safefile import FLOAT_DTYPES, SafeFile, save_tensors

_FORMAT = "1"

#: Parameters whose names end differently in adapter files and checkpoints than in a model. The
#: names in files are those that the format began with, so that older versions can read new files.
NAMES_IN_FILES = {
    # in the model          in files
    ".bias_delta.delta": ".bias_delta",
}


def name_in_files(name: str) -> str:
    """Return the name that a model's parameter has in adapter files and checkpoints."""
    for end, written in NAMES_IN_FILES.items():
        if name.endswith(end):
            return name.removesuffix(end) + written
    return name


def names_in_model(
    model: BertForSequenceClassification, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return tensors from an adapter file or checkpoint under their names in an adapted model.

    A tensor that the plan does not declare keeps its name.
    """
    assert model.adaptation is not None
    names = {name_in_files(name): name for name in model.adaptation.trainable}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class AdapterHeader:
    """The header of an adapter file.

    Attributes
    ----------
    plan : Plan
        What was trained.
    base_fingerprint : str
        The base that it belongs to (see :func:`spafit.strata.fingerprint`).
    task : str or None
        The task's name.
    labels : tuple of str or None
        Label names in the order of the logits; empty for a score; None where they are not known.
    definition : dict or None
        The definition of the task, if it is not one of GLUE's.
    shapes : mapping of str to tuple of int
        The shape of each tensor.
    """

    plan: Plan
    base_fingerprint: str
    task: str | None
    labels: tuple[str, ...] | None
    definition: dict[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def num_labels(self) -> int:
        """C: the rows of the head."""
        return self.shapes["classifier.weight"][0]


def save_adapter(model: BertForSequenceClassification, path: str | Path) -> None:
    """Write what was trained to a file: LoRA, bias deltas, head, plan, task, base fingerprint.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model.
    path : str or Path
        The file; it is written atomically.

    Raises
    ------
    PlanError
        As :func:`adaptation_to_save`.
    WeightsError
        If a trained tensor holds NaN or infinite values, or the file cannot be written.
    """
    adaptation_to_save(model)
    save_tensors(path, *adapter_content(model))


def adaptation_to_save(model: BertForSequenceClassification) -> Adaptation:
    """Return a model's adaptation, if an adapter file would hold all that trains.

    Raises
    ------
    PlanError
        If this is not an adapted model itself, its adapters are disabled at the moment, it lacks a
        parameter that its plan declares, or one requires a gradient that the plan does not declare.
    """
    if not isinstance(model, BertForSequenceClassification):
        raise PlanError(
            f"expected a BertForSequenceClassification, found a {type(model).__name__}; give the "
            "model itself, without what was wrapped around it (DataParallel, torch.compile ...)"
        )
    adaptation = model.adaptation
    if adaptation is None:
        require_none_to_choose(model)
        raise PlanError(
            "the model was not adapted; call spafit.adapt(model, plan) first, so that there is an "
            "adapter to train and to save"
        )
    adaptation.require_enabled()
    adaptation.require_unmerged()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gone = [name for name in (*HEAD, *adaptation.trainable) if name not in parameters]
    if gone:
        raise PlanError(
            f"the model lacks {listed(dict.fromkeys(gone), ', ', 3)}: a module was replaced by "
            "another kind; load the model afresh and adapt it as it was built"
        )
    undeclared = [
        name
        for name, each in model.named_parameters()
        if each.requires_grad and name not in set(adaptation.trainable)
    ]
    if undeclared:
        raise PlanError(
            f"{listed(undeclared, ', ', 3)} would train, but the plan {adaptation.plan.name} does "
            "not declare it, so it would not be saved; put it in the plan, or freeze it "
            "(requires_grad_(False))"
        )
    return adaptation


def adapter_content(
    model: BertForSequenceClassification, values: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a model's adapter file.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model.
    values : mapping of str to torch.Tensor, optional
        Values to write instead of the model's current ones, such as the best so far.

    Raises
    ------
    PlanError
        If the adapters are disabled at the moment.
    WeightsError
        As :func:`save_adapter`.
    """
    adaptation = model.adaptation
    assert adaptation is not None
    adaptation.require_enabled()
    if values is None:
        values = {name: model.get_parameter(name).detach() for name in adaptation.trainable}
    tensors = {name_in_files(name): tensor for name, tensor in values.items()}
    sick = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if sick:
        raise WeightsError(f"{', '.join(sick)} hold NaN or infinite values; nothing was written")
    metadata = {
        "format": "pt",
        "spafit_adapter": _FORMAT,
        "spafit_version": __version__,
        "plan": adaptation.plan.to_json(),
        "base_fingerprint": base_fingerprint(model),
        "task": json.dumps(adaptation.task),
        "labels": json.dumps(adaptation.labels),
    }
    if adaptation.definition is not None:
        metadata["definition"] = json.dumps(adaptation.definition)
    return tensors, metadata


def read_adapter_header(path: str | Path) -> AdapterHeader:
    """Read the header of an adapter file, without its tensors.

    Raises
    ------
    WeightsError
        If it is not a valid adapter file.
    """
    with SafeFile(path) as file:
        return _header(file)


def load_adapter(
    model: BertForSequenceClassification, path: str | Path, *, name: str | None = None
) -> Adaptation:
    """Load an adapter into its base model: its logits are those at saving, bit for bit.

    Any number of adapters can be loaded under names of their own, whatever their techniques, strata
    and heads; each takes as much memory as its file. The one just loaded is in use
    (:func:`spafit.use`).

    Parameters
    ----------
    model : BertForSequenceClassification
        The base. Without a name: freshly loaded, or adapted by an equal plan.
    path : str or Path
        A file from :func:`save_adapter`.
    name : str, optional
        A name that no adapter of the model has.

    Returns
    -------
    Adaptation
        Also at ``model.adaptation``.

    Raises
    ------
    WeightsError
        If the file is not a valid adapter, belongs to another base (the message gives both
        fingerprints), or a name or shape does not fit; the model is then unchanged.
    PlanError
        If there is an adapter of this name, or without a name the model was adapted by another
        plan; or if adapters are disabled at the moment, or the base is gone (:func:`spafit.use`).
    """
    present = model.adaptation
    if present is not None:
        present.require_enabled()  # else the head is lost when the block ends
        if name is None:
            present.require_unmerged()
    if name is not None:
        check_name(model, name)
        if present is not None:
            present.require_base()
    with SafeFile(path) as file:
        header = _header(file)
        if name is None and present is not None and present.plan != header.plan:
            raise PlanError(
                f"the model is adapted by {one_line(present.plan.name)}, {path} needs "
                f"{one_line(header.plan.name)}; load the base afresh, or give this adapter a name "
                '(name="...")'
            )
        if header.plan.num_layers != model.config.num_hidden_layers:
            raise WeightsError(
                f"{path} is for {header.plan.num_layers} layers, this model has "
                f"{model.config.num_hidden_layers}; load the base that it was trained on"
            )
        found = base_fingerprint(model)
        if found != header.base_fingerprint:
            raise WeightsError(
                f"{path} was trained on the base {one_line(header.base_fingerprint)}, this model "
                f"is {found}; load the base that it was trained on"
            )
        num_labels = model.num_labels if name is None else header.num_labels
        _check_shapes(model, header, path, num_labels)
        # Converted to the model's type here, so that a value that overflows is still refused.
        dtype = model.classifier.weight.dtype
        tensors = {name: file.read(name, dtype) for name in file.tensors}
    if name is not None or present is None:
        adapt(model, header.plan, name=name, num_labels=None if name is None else num_labels)
    assert model.adaptation is not None
    with torch.no_grad():
        for name, tensor in names_in_model(model, tensors).items():
            model.get_parameter(name).copy_(tensor)
    model.adaptation.task = header.task
    model.adaptation.labels = header.labels
    model.adaptation.definition = header.definition
    return model.adaptation


def _check_shapes(
    model: BertForSequenceClassification, header: AdapterHeader, path: str | Path, num_labels: int
) -> None:
    """Compare the file's names and shapes with those of a model adapted by the plan."""
    with torch.device("meta"):
        shadow = BertForSequenceClassification(model.config, num_labels)
    adapt(shadow, header.plan)
    assert shadow.adaptation is not None
    expected = {
        name_in_files(name): tuple(shadow.get_parameter(name).shape)
        for name in shadow.adaptation.trainable
    }
    if header.num_labels != num_labels:
        raise WeightsError(
            f"{path} has a head for {header.num_labels} labels, this model one for {num_labels}; "
            f"load the base with num_labels={header.num_labels}"
        )
    faults = [f"{name} is missing" for name in expected.keys() - header.shapes.keys()]
    faults += [f"{name} is unexpected" for name in header.shapes.keys() - expected.keys()]
    faults += [
        f"{name} has shape {shape}, expected {expected[name]}"
        for name, shape in header.shapes.items()
        if name in expected and shape != expected[name]
    ]
    if faults:
        raise WeightsError(
            f"{path} does not hold what its plan {one_line(header.plan.name)} trains: "
            f"{listed(sorted(faults))}"
        )


def _header(file: SafeFile) -> AdapterHeader:
    """Check the metadata of an adapter file."""
    metadata = file.metadata
    if metadata.get("spafit_adapter") != _FORMAT:
        raise WeightsError(
            f"{file.path} is not an adapter file of spafit: its header has spafit_adapter = "
            f"{metadata.get('spafit_adapter')!r:.200}, expected {_FORMAT!r}"
        )
    shapes = {name: info.shape for name, info in file.tensors.items()}
    if len(shapes.get("classifier.weight", ())) != 2:
        raise WeightsError(f"{file.path} has no head: classifier.weight (C, D) is missing")
    not_floats = [name for name, info in file.tensors.items() if info.dtype not in FLOAT_DTYPES]
    if not_floats:
        names = listed(not_floats, ", ")
        raise WeightsError(f"{file.path} holds {names} in a type that is not floating-point")
    missing = [key for key in ("plan", "base_fingerprint", "task", "labels") if key not in metadata]
    if missing:
        raise WeightsError(f"the header of {file.path} is damaged: it lacks {', '.join(missing)}")
    try:
        task = json.loads(metadata["task"])
        labels = json.loads(metadata["labels"])
        definition = json.loads(metadata.get("definition", "null"))
        base_fingerprint = metadata["base_fingerprint"]
    except (ValueError, RecursionError) as error:
        reason = one_line(str(error), 600 + len(str(file.path)))
        raise WeightsError(f"the header of {file.path} is damaged: {reason}") from None
    try:
        plan = Plan.from_json(metadata["plan"], source=f"the plan in {file.path}")
    except PlanError as error:  # such as a technique that is not registered here
        raise WeightsError(str(error)) from None
    if (
        not (task is None or _is_name(task))
        or not _are_labels(labels, shapes["classifier.weight"][0])
        or not isinstance(definition, dict | None)
    ):
        raise WeightsError(
            f"the header of {file.path} is damaged: task {task!r:.200}, labels {labels!r:.200}"
        )
    return AdapterHeader(
        plan, base_fingerprint, task, None if labels is None else tuple(labels), definition, shapes
    )


def _is_name(value: object) -> bool:
    """Return whether a value is a string that can be a label in a table of predictions."""
    return isinstance(value, str) and not has_controls(value)


def _are_labels(labels: object, num_labels: int) -> bool:
    if labels is None:
        return True
    if not isinstance(labels, list) or not all(_is_name(label) for label in labels):
        return False
    if len(set(labels)) < len(labels):  # two outputs for one label
        return False
    return len(labels) == num_labels or (not labels and num_labels == 1)

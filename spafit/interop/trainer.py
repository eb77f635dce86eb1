"""What a trainer such as transformers' ``Trainer`` expects of a model, without importing it.

:func:`for_trainer` wraps an adapted model in a :class:`TrainerModel`, which computes the loss that
:func:`spafit.fit` does, and whose state dict holds what trains alone.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from spafit.adaptation import Adaptation
from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError, DataError, PlanError, WeightsError, listed, one_line
from spafit.runs.record import ADAPTER
from spafit.tasks.task import is_name
from spafit.training.optimisation import loss_function, trained_parameters
from spafit.weights.adapter_files import adaptation_to_save, save_adapter


class LossAndLogits(dict[str, torch.Tensor]):
    """The output of a :class:`TrainerModel`: ``logits`` (B, C), and with labels ``loss`` () too.

    Its entries are attributes, too: ``output.loss`` is ``output["loss"]``.
    """

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise AttributeError(f"the output has no {name}; it holds {', '.join(self)}")
        return self[name]


class ConfigView(SimpleNamespace):
    """The entries of a ``config.json`` as attributes, which a trainer reads and may set.

    They are a copy: setting one changes nothing in the model.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the entries."""
        return dict(vars(self))

    def to_json_string(self) -> str:
        """Return the entries as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def get_text_config(self) -> ConfigView:
        """Return itself: there is text alone. ``Trainer`` compares its special tokens."""
        return self


class TrainerModel(nn.Module):
    """An adapted model with labels in, and loss and logits out; :func:`for_trainer` makes it.

    Its state dict holds what trains alone, under the names of ``model``, and it loads such a one
    without missing the frozen rest; so a trainer's checkpoints are small, and can be resumed.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model, which is wrapped and not copied.

    Attributes
    ----------
    model : BertForSequenceClassification
        The same.
    config : ConfigView
        Sizes, rates and label names, under Hugging Face's names.
    accepts_loss_kwargs : bool
        Tells ``Trainer`` that ``forward`` takes ``num_items_in_batch``.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model
        self.config = _config_view(model)
        self.register_state_dict_post_hook(_keep_what_trains)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_miss_no_frozen)  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> LossAndLogits:
        """Compute the logits of a padded batch, and the loss if there are labels.

        Parameters
        ----------
        input_ids, attention_mask, token_type_ids : torch.Tensor, (B, T)
            As for :class:`~spafit.bert.BertModel`.
        labels : torch.Tensor, (B,), optional
            Class numbers of an integer type, for the cross entropy; or, if the model has one
            output, scores, for the squared error.
        num_items_in_batch : torch.Tensor or int, optional
            The number of examples of the whole batch, of which this may be a micro-batch: what the
            summed loss is divided by. None means B.

        Returns
        -------
        LossAndLogits

        Raises
        ------
        DataError
            If the labels do not fit the batch or the head.
        """
        logits: torch.Tensor = self.model(input_ids, attention_mask, token_type_ids)  # (B, C)
        if labels is None:
            return LossAndLogits(logits=logits)
        B, C = logits.shape
        _check_labels(labels, B, C)
        total = loss_function(logits, labels.double() if C == 1 else labels.long())
        loss = total / (B if num_items_in_batch is None else num_items_in_batch)
        return LossAndLogits(loss=loss, logits=logits)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what was trained to ``adapter.safetensors`` in a folder, which is made if need be.

        ``spafit.load_adapter(fresh, folder / "adapter.safetensors")`` brings it back on a freshly
        loaded base, with the same logits bit for bit.

        Raises
        ------
        PlanError
            If the adapters are disabled at the moment, or what trains is not what the plan
            declares.
        WeightsError
            If a trained tensor holds NaN or infinite values, or the file cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WeightsError(f"{folder} cannot be created: {error.strerror}") from None
        save_adapter(self.model, folder / ADAPTER)


def for_trainer(
    model: BertForSequenceClassification, labels: Sequence[str] | None = None
) -> TrainerModel:
    """Wrap an adapted model for another program's trainer, such as transformers' ``Trainer``.

    The trainer's optimizer follows the plan's rates and weight decays if it is made of
    :func:`spafit.parameter_groups`.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model; it is wrapped and not copied, so that what is trained is in it.
    labels : sequence of str, optional
        The names of the labels in the order of the logits, for ``config`` and for the adapter file.
        None: those that the model has from :func:`spafit.load_adapter` or :func:`spafit.fit`.

    Returns
    -------
    TrainerModel

    Raises
    ------
    PlanError
        If the model was not adapted, its adapters are disabled, what would train is not what its
        plan declares, or the plan has times at which strata thaw or freeze.
    ConfigError
        If the names of the labels do not fit the head, or are not those that the model has.
    """
    trained_parameters(model)  # refuses a model of which not all that trains would be saved
    for stratum in _adaptation(model).plan.strata:
        if stratum.is_timed:
            raise PlanError(
                f"{one_line(stratum.name)} thaws or freezes during training, which spafit.fit does "
                "and another trainer does not; leave thaw and freeze out of the plan"
            )
    if any(
        (how.rate, how.weight_decay) != (1.0, None) for how in _adaptation(model).trained.values()
    ):
        warnings.warn(
            "the plan has rates or weight decays of its own, which the trainer's optimizer follows "
            "only if it is made of spafit.parameter_groups(model, learning_rate)",
            stacklevel=2,
        )
    if labels is not None:
        _name_labels(model, labels)
    return TrainerModel(model)


def _name_labels(model: BertForSequenceClassification, labels: Sequence[str]) -> None:
    adaptation, C = _adaptation(model), model.num_labels
    names = (labels,) if isinstance(labels, str) else tuple(labels)
    are_text = all(map(is_name, names))
    if not are_text or len(set(names)) != len(names) or len(names) != (C if C > 1 else 0):
        needs = f"{C} different names, one for each logit" if C > 1 else "none, for it has a score"
        raise ConfigError(f"the labels of this model must be {needs}; found {labels!r:.200}")
    if adaptation.labels not in (None, names):
        raise ConfigError(
            f"the model has the labels {listed(adaptation.labels or ('of a score',), ', ')}, found "
            f"{listed(names, ', ')}; leave them out, or load the base afresh"
        )
    adaptation.labels = names


def _config_view(model: BertForSequenceClassification) -> ConfigView:
    C = model.num_labels
    names = _adaptation(model).labels or [f"LABEL_{number}" for number in range(C)]
    return ConfigView(
        **model.config.to_json_dict(),
        architectures=["BertForSequenceClassification"],
        num_labels=C,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        problem_type="regression" if C == 1 else "single_label_classification",
        use_cache=False,
        _name_or_path="",
    )


def _check_labels(labels: torch.Tensor, B: int, C: int) -> None:
    """Check labels; values on a GPU are not looked at, because the host would wait for it."""
    if labels.shape != (B,):
        raise DataError(f"labels must have shape ({B},), found {tuple(labels.shape)}")
    if C == 1:
        return
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"labels must be class numbers of an integer type, found {labels.dtype}; for scores "
            "load the model with num_labels=1"
        )
    if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < C)).all()):
        raise DataError(
            f"labels must lie in 0 .. {C - 1}, found {int(labels.min())} .. {int(labels.max())}; "
            f"load the model with as many num_labels as there are classes"
        )


def _adaptation(model: BertForSequenceClassification) -> Adaptation:
    assert model.adaptation is not None  # for_trainer has seen to it
    return model.adaptation


def _keep_what_trains(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Take all that is frozen out of a state dict in the making."""
    assert isinstance(module, TrainerModel)
    adaptation = adaptation_to_save(module.model)
    kept = {f"{prefix}model.{name}" for name in adaptation.trainable}
    for key in [key for key in state if key.startswith(f"{prefix}model.") and key not in kept]:
        del state[key]


def _miss_no_frozen(module: nn.Module, keys: Any) -> None:
    """Take what is frozen out of the missing keys, which may have a prefix."""
    assert isinstance(module, TrainerModel)
    trainable = set(_adaptation(module.model).trainable)
    names = (name for name, _ in module.model.named_parameters())
    frozen = tuple(f"model.{name}" for name in names if name not in trainable)
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(frozen)]

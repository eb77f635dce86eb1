"""Complete the settings of a training run for its model, task and device."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import torch

from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError, PlanError
from spafit.machine.precision import has_half, resolve_device, resolve_precision
from spafit.runs.train_config import TrainConfig
from spafit.strata import pretrained_names
from spafit.tasks.task import Dataset
from spafit.training.captured_step import why_not_captured
from spafit.training.inference import longest
from spafit.weights.pretrained import HEAD

__all__ = ["TrainConfig", "class_weights", "complete"]


def complete(
    config: TrainConfig,
    model: BertForSequenceClassification,
    train: Dataset,
    shares: bool = False,
) -> TrainConfig:
    """Replace each None and "auto" by the value for this model, task and device.

    With ``shares``, those with which the output of group 1 can be shared with other runs; others
    are refused.
    """
    assert model.adaptation is not None
    if model.classifier.weight.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            "training needs parameters in float32, the model has "
            f"{model.classifier.weight.dtype}; load it with dtype=torch.float32, and use "
            'precision="bf16" or "fp16"'
        )
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    dropout_in_group_1 = config.dropout_in_group_1
    if dropout_in_group_1 is None:
        dropout_in_group_1 = not _trains_head_alone(model)
    plan = model.adaptation.plan
    beyond = [group for group in config.recompute if group > len(plan.strata)]
    if beyond:
        raise PlanError(f"recompute names group {beyond[0]}, {plan.name} has {len(plan.strata)}")
    pretrained = set(pretrained_names(model)) - set(HEAD)
    is_full = any(
        name in pretrained and name.endswith(".weight") for name in model.adaptation.trainable
    )
    return dataclasses.replace(
        config,
        order_seed=config.seed if config.order_seed is None else config.order_seed,
        dropout_seed=config.seed if config.dropout_seed is None else config.dropout_seed,
        class_weights=_resolve_weights(config, train),
        batch_size=config.batch_size or train.task.paper_batch_size,
        learning_rate=config.learning_rate or (2e-5 if is_full else 6e-5),
        max_length=longest(model.config, config.max_length),
        device=str(device),
        precision=precision,
        dropout_in_group_1=dropout_in_group_1,
        cache_prefix=_resolve_cache(config.cache_prefix, model, dropout_in_group_1, shares),
        frozen_weights=_resolve_frozen_weights(config.frozen_weights, precision, device),
        step=_resolve_step(config, device, is_reference=not model.bert.packed),
    )


def _trains_head_alone(model: BertForSequenceClassification) -> bool:
    assert model.adaptation is not None
    return all(name.startswith("classifier.") for name in model.adaptation.trainable)


def _resolve_cache(
    kept: str, model: BertForSequenceClassification, dropout_in_group_1: bool, shares: bool
) -> str:
    """Return where the output of group 1 is kept: "memory", "disk", or "off" for nowhere."""
    assert model.adaptation is not None
    plan = model.adaptation.plan
    is_timed = any(stratum.is_timed for stratum in plan.strata)  # the depth may grow
    is_constant = model.bert.frozen_depth > 0 or is_timed
    if shares:
        if not is_constant:
            raise PlanError(
                f"{plan.name} trains the first layer or the embeddings, so there are no frozen "
                "layers whose output runs could share; train them without --together"
            )
        if dropout_in_group_1:
            raise ConfigError(
                "runs share the output of group 1 (--together) only without dropout there, which "
                "changes it at every step; turn that off with dropout_in_group_1=False "
                "(--no-dropout-in-group-1), or train them without --together"
            )
        if kept == "off":
            raise ConfigError(
                "runs that share the output of group 1 (--together) keep it; leave out "
                'cache_prefix="off" (--cache-prefix off)'
            )
        return "disk" if kept in ("auto-disk", "disk") else "memory"
    if kept == "auto-disk":
        return "disk" if is_constant and not dropout_in_group_1 else "off"
    if kept == "auto":
        # What is kept is at most float32, to which a model in float64 would be rounded; and it is
        # computed packed, which the reference form is not.
        is_exact = model.dtype != torch.float64 and model.bert.packed
        is_kept = _trains_head_alone(model) and not dropout_in_group_1 and is_exact
        kept = "memory" if is_kept else "off"
    if kept != "off" and not is_constant:
        raise PlanError(
            f"{plan.name} trains the first layer or the embeddings, so no hidden state stays "
            "constant; leave cache_prefix off"
        )
    return kept


def _resolve_frozen_weights(frozen_weights: str, precision: str, device: torch.device) -> str:
    """Return the type of the frozen matrices, and refuse half precision in a run without it."""
    if frozen_weights == "half" and precision in ("float32", "tf32"):
        raise ConfigError(
            'frozen_weights="half" needs precision bf16 or fp16, which rounds the weights at '
            "every use; this run has " + precision
        )
    if frozen_weights == "auto":
        return "half" if has_half(precision, device) else "float32"
    return frozen_weights


def class_weights(config: TrainConfig, names: tuple[str, ...]) -> torch.Tensor | None:
    """Return the weights (C,) of the labels in the loss, in the order of ``names``, if any."""
    if not isinstance(config.class_weights, Mapping):
        return None
    return torch.tensor([float(config.class_weights[name]) for name in names])


def _resolve_weights(config: TrainConfig, train: Dataset) -> dict[str, float] | None:
    """Return the weight of each label in the loss, and refuse weights that do not fit the task."""
    weights, labels = config.class_weights, train.task.labels
    if not labels and (weights is not None or config.label_smoothing):
        raise ConfigError(
            "class_weights (--class-weights) and label_smoothing (--label-smoothing) are for "
            f"labels; {train.task.display} has scores"
        )
    if weights is None:
        return None
    if isinstance(weights, str):  # "balanced"
        counts = Counter(train.labels)
        # A label without examples has no loss that could be weighted.
        return {name: len(train) / (len(labels) * max(1, counts[name])) for name in labels}
    differing = sorted(set(labels) ^ set(weights))
    if differing:
        what = "is missing" if differing[0] in labels else "is none of them"
        raise ConfigError(
            f"class_weights needs each label of {train.task.display} once ({', '.join(labels)}); "
            f"{differing[0]!r:.80} {what}"
        )
    return {name: float(weights[name]) for name in labels}


def _resolve_step(config: TrainConfig, device: torch.device, is_reference: bool) -> str:
    reason = why_not_captured(device, recomputes=bool(config.recompute))
    if config.step == "captured" and reason:
        raise ConfigError(f'step="captured" is not available: {reason}; use "eager", or "auto"')
    if config.step == "compiled" and config.recompute:
        raise ConfigError('step="compiled" cannot be combined with recompute; use step="eager"')
    if config.step != "auto":
        return config.step
    return "eager" if reason or is_reference else "captured"

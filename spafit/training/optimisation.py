"""Loss, optimizer, learning-rate schedule and order of the data."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from spafit.bert import BertForSequenceClassification
from spafit.config import is_number
from spafit.errors import ConfigError, PlanError
from spafit.weights.adapter_files import adaptation_to_save


def trained_parameters(model: BertForSequenceClassification) -> dict[str, torch.nn.Parameter]:
    """Return, by name, the parameters that a run trains: those of the plan that were not frozen.

    A run saves all parameters that the plan declares. Others would be lost, so training them is
    refused. A declared parameter that the user froze (``requires_grad_(False)`` after
    :func:`spafit.adapt`) stays frozen: it has no gradient and no moments, and is saved too.

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model.

    Raises
    ------
    PlanError
        As :func:`~spafit.weights.adapter_files.adaptation_to_save`, or if no parameter requires a
        gradient.
    """
    adaptation = adaptation_to_save(model)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not trained:
        raise PlanError(
            f"nothing trains: all parameters of the plan {adaptation.plan.name} are frozen; "
            "unfreeze some of them (requires_grad_(True))"
        )
    return trained


def parameter_groups(
    model: BertForSequenceClassification,
    learning_rate: float,
    weight_decay: float = 0.01,
    *,
    decay_biases: bool = False,
) -> list[dict[str, Any]]:
    """Return what a model trains as the parameter groups of a torch optimizer, as its plan says.

    A parameter learns at ``rate`` times the learning rate (:class:`spafit.plans.Trained`), and
    decays by the plan's weight decay for it, or by the one given here if the plan has none. Without
    rates and decays in the plan there are two groups: matrices, and vectors and single numbers.
    When strata thaw and freeze, no optimizer knows: set ``requires_grad`` before each step, by
    ``model.adaptation.trained[name].trains_at`` (:class:`spafit.plans.Trained`).

    Parameters
    ----------
    model : BertForSequenceClassification
        An adapted model; its :func:`trained_parameters` are grouped.
    learning_rate, weight_decay : float
        AdamW's.
    decay_biases : bool
        Whether vectors (biases, bias deltas, LayerNorm weights) and single numbers decay too.

    Returns
    -------
    list of dict
        ``params``, ``lr``, ``weight_decay`` and ``rate`` of each group.

    Raises
    ------
    PlanError
        As :func:`trained_parameters`.
    ConfigError
        If the learning rate or the weight decay is not a number from 0.
    """
    for setting, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not is_number(value) or not 0 <= value < math.inf:  # torch looks at no group's
            raise ConfigError(f"{setting} must be a number from 0, found {value!r:.80}")
    trained = trained_parameters(model)
    assert model.adaptation is not None
    groups: dict[tuple[bool, float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in sorted(trained.items(), key=lambda each: each[1].dim() <= 1):
        how = model.adaptation.trained[name]
        decay = how.decay(parameter, weight_decay, weight_decay if decay_biases else 0.0)
        groups.setdefault((parameter.dim() <= 1, decay, how.rate), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * rate, "weight_decay": decay, "rate": rate}
        for (_, decay, rate), parameters in groups.items()
    ]


class _AdamW(torch.optim.AdamW):
    """AdamW without the decorators around PyTorch's own, which import its compiler.

    That takes a second, and nothing here compiles the optimizer.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_optimizer(
    model: BertForSequenceClassification,
    *,
    learning_rate: float,
    weight_decay: float,
    decay_biases: bool = False,
    capturable: bool = False,
) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, in the groups of :func:`parameter_groups`.

    Parameters
    ----------
    model, learning_rate, weight_decay, decay_biases
        As there.
    capturable : bool
        Whether to keep the learning rates on the device, for the CUDA graph of a captured step.
    """
    groups = parameter_groups(model, learning_rate, weight_decay, decay_biases=decay_biases)
    trained = [parameter for group in groups for parameter in group["params"]]
    # Fused: one call updates all tensors, of which there are some hundred, most of them small.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    device = trained[0].device
    for group in groups if capturable else []:
        group["lr"] = torch.tensor(group["lr"], device=device)
    return _AdamW(
        groups,
        betas=(0.9, 0.999),
        fused=fused,
        capturable=capturable and device.type == "cuda",
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set each group's share of the learning rate, in place if it is a tensor on the device."""
    for group in optimizer.param_groups:
        rate = learning_rate * group.get("rate", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate_factor(step: int, total_steps: int, warmup: float) -> float:
    """Return the learning-rate schedule's factor: linear warm-up from 0, then linear decay to 0.

    Parameters
    ----------
    step : int
        Steps done, from 0.
    total_steps : int
        Total number of steps.
    warmup : float
        The share of the steps for warm-up.
    """
    warm_steps = math.ceil(warmup * total_steps)
    if step < warm_steps:
        return step / warm_steps
    return (total_steps - step) / max(1, total_steps - warm_steps)


def loss_function(
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the cross entropy, or the squared error if C is 1, summed over the examples.

    With w the weights of the classes, ε the smoothing and p = softmax(logits), an example of class
    y has the loss -(1 - ε) w_y log p_y - (ε / C) Σ_c w_c log p_c.

    Parameters
    ----------
    logits : torch.Tensor, (B, C)
        The head's output, of any floating type; the loss is computed in float32 or wider.
    targets : torch.Tensor, (B,)
        Class numbers (int64), or scores.
    class_weights : torch.Tensor, optional, (C,)
        w; 1 by default.
    label_smoothing : float
        ε.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if targets.is_floating_point():
        return F.mse_loss(logits[:, 0], targets.to(logits.dtype), reduction="sum")
    if class_weights is not None:
        class_weights = class_weights.to(logits)
    return F.cross_entropy(
        logits, targets, class_weights, reduction="sum", label_smoothing=label_smoothing
    )


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return 0 .. n-1 shuffled as a function of (seed, epoch) alone; epochs count from 1."""
    return np.random.default_rng([seed, epoch]).permutation(n)

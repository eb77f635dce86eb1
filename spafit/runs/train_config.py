"""The settings of a training run, checked when they are created; the command line's, too.

Nothing here imports torch, so that ``spafit train --help`` and a wrong option are answered at once.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spafit.errors import ConfigError
from spafit.machine import PRECISIONS
from spafit.runs.identity import RENAMED

CACHES = ("auto", "auto-disk", "off", "memory", "disk")
"""Where the hidden states after group 1 may be kept."""

CACHE_DTYPES = ("float32", "half")
"""The types in which they may be kept."""

FROZEN_WEIGHTS = ("auto", "float32", "half")
"""The types in which frozen matrices may be stored."""

STEPS = ("auto", "eager", "captured", "compiled")
"""How a training step may be launched."""


def _by_older_names(cls: type[TrainConfig]) -> type[TrainConfig]:
    """Also accept settings, and their attributes, by their older names."""
    init = cls.__init__

    @functools.wraps(init)
    def by_any_name(self: TrainConfig, *values: Any, **settings: Any) -> None:
        for old, new in RENAMED.items():
            if old in settings:
                settings[new] = settings.pop(old)
        init(self, *values, **settings)

    cls.__init__ = by_any_name  # type: ignore[method-assign]
    for old, new in RENAMED.items():
        setattr(cls, old, property(operator.attrgetter(new)))
    return cls


@_by_older_names
@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run; the model never sees them.

    Attributes
    ----------
    out : str, Path or None
        The run folder; None writes nothing. An existing run is resumed from its newest checkpoint,
        if it is the same run (:mod:`spafit.runs.identity`).
    seed : int
        Seed of dropout and of the order of the data, which depends on (seed, epoch) alone.
    order_seed, dropout_seed : int or None
        Seeds of the order and of dropout apart; None is ``seed``. The initial values of what is
        added are drawn by :func:`spafit.load_pretrained` and :func:`spafit.adapt`, with theirs.
    epochs : int
        Passes over the training data.
    batch_size : int or None
        Examples per optimizer step, of all processes together that train the run; None is the
        paper's: 16, or 8 for MNLI, QNLI and QQP.
    accumulation : int
        Number of micro-batches per batch, computed one after the other to save memory; the gradient
        is the same except for dropout, whose masks are drawn per micro-batch. Of many processes
        each splits its share so.
    learning_rate : float or None
        The peak; None is the paper's: 6e-5, or 2e-5 if a plan trains pre-trained matrices.
    weight_decay : float
        AdamW's weight decay of matrices.
    decay_biases : bool
        Whether biases, bias deltas and LayerNorms decay too. A delta decays towards 0, which means
        towards the pre-trained bias.
    warmup : float
        The share of all steps over which the learning rate rises linearly from 0.
    max_grad_norm : float
        The norm to which the gradient of all trained values together is clipped; 0 does not clip.
    metric : str or None
        The metric by which the best epoch is chosen; None is the first of the task's.
    class_weights : {"balanced"}, mapping of str to float, or None
        The weight of each label's examples in the loss; None weights all alike. ``"balanced"`` is
        n / (C n_c) for the n_c of the n training examples that have label c: all labels then have
        the same share, and the weights of all examples add up to n.
    label_smoothing : float
        The share of each example's loss that is spread over all labels.
    early_stopping : int or None
        After how many evaluations without a better score the run ends; None: it does not. The
        learning rate falls as if it went on.
    max_length : int or None
        Tokens to which an example is truncated; None is the model's maximum.
    eval_every : int or None
        Steps between evaluations; None evaluates after each epoch. The last step is always
        evaluated.
    save_every : int or None
        Steps between checkpoints; None is every 10 minutes. One is also saved after each evaluation
        (while steps are being skipped, after the first that is not) and when the run is stopped.
    keep_checkpoints : int
        How many of the last checkpoints to keep, at least 2, besides that of the best evaluation.
    precision : {"auto", "float32", "tf32", "bf16", "fp16"}
        Precision of matrix products; ``"auto"`` chooses by device (see
        :func:`~spafit.machine.precision.resolve_precision`).
    dropout_in_group_1 : bool or None
        Whether group 1, the layers below the first that trains, has dropout in training, like the
        other layers. In the paper it has; without it, its hidden states are the same in every
        epoch. None is the paper's, but for a plan that trains the head alone (linear probing),
        which is without: the head learns from the features of the frozen model. (The older name,
        ``frozen_dropout``, still works.)
    cache_prefix : {"auto", "auto-disk", "off", "memory", "disk"}
        Keep the hidden states after group 1 instead of computing them in every epoch; this needs
        ``dropout_in_group_1=False``. Where the head alone trains, it is the pooled output that is
        kept, one vector of an example. On disk they are also used by later runs with other seeds,
        methods and learning rates (:mod:`spafit.training.prefix.cache`). ``"auto"`` is in memory
        for a plan that trains the head alone, without dropout, in float32 and not in the reference
        form, else off. ``"auto-disk"`` is on disk wherever group 1 is frozen and without dropout,
        else off. With both a run for whose states there is no room computes them every time.
    cache_dtype : {"float32", "half"}
        The type in which they are kept.
    cache_limit_gib : float
        The most memory or disk space for them.
    recompute : tuple of int
        Groups (1, 2, 3 in a SPAFIT plan) whose layers keep only their input in training and are
        computed again in backward: less memory, more time.
    frozen_weights : {"auto", "float32", "half"}
        The type in which the frozen matrices of encoder and pooler are read during the run: "half"
        is that of ``precision``, which must be bf16 or fp16. The products are the same, because
        autocast rounds to it anyway; it saves the rounding at every use. On a GPU they are stored
        so, which saves two bytes per weight; on a CPU copies stand beside them, which takes two
        bytes per weight, and two more where backward reads it. ``"auto"`` is half in bf16 or fp16
        on a GPU, and in bf16 on a CPU that has such products, else float32. After the run the
        pre-trained values are there again, bit for bit.
    step : {"auto", "eager", "captured", "compiled"}
        How a step is launched. ``"captured"``: as CUDA graphs
        (:mod:`spafit.training.captured_step`), without gaps between the launches. ``"compiled"``:
        forward and backward by torch.compile. ``"auto"``: captured on a GPU if possible, else
        eager. The reference form of the model (:func:`spafit.set_impl`) is trained eagerly on
        padded batches, as in :mod:`spafit.training.plain`; captured, compiled or from a kept
        prefix, on packed ones.
    device : str
        Such as ``"cpu"`` or ``"cuda"``; ``"auto"`` is a GPU if there is one. Of many processes each
        has the GPU of its ``LOCAL_RANK``.
    overwrite : bool
        Whether to replace a run in ``out``, with its checkpoints, instead of resuming it.
    quiet : bool
        Whether to show no progress.

    Raises
    ------
    ConfigError
        If a setting is out of range.
    """

    out: str | Path | None = None
    seed: int = 0
    order_seed: int | None = field(default=None, kw_only=True)
    dropout_seed: int | None = field(default=None, kw_only=True)
    epochs: int = 10
    batch_size: int | None = None
    accumulation: int = 1
    learning_rate: float | None = None
    weight_decay: float = 0.01
    decay_biases: bool = False
    warmup: float = 0.0
    max_grad_norm: float = 1.0
    metric: str | None = None
    class_weights: str | Mapping[str, float] | None = None
    label_smoothing: float = 0.0
    early_stopping: int | None = None
    max_length: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    precision: str = "auto"
    dropout_in_group_1: bool | None = None
    cache_prefix: str = "auto"
    cache_dtype: str = "float32"
    cache_limit_gib: float = 16.0
    recompute: tuple[int, ...] = ()
    frozen_weights: str = "auto"
    step: str = "auto"
    device: str = "auto"
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in (*_WHOLE_NUMBERS, *_NUMBERS, *_SWITCHES, *_CHOICES):
            value = getattr(self, name)
            if value is not None or getattr(TrainConfig, name, 0) is not None:
                _check(name, value)
        self._check_others()
        self._check_together()

    def _check_others(self) -> None:
        """Check the settings that are no single number, switch or choice."""
        weights = self.class_weights
        if weights not in (None, "balanced") and not (
            isinstance(weights, Mapping)
            and all(isinstance(name, str) and _is_weight(each) for name, each in weights.items())
        ):
            raise ConfigError(
                'class_weights must be "balanced", or a number from 0 for each label: '
                f"{weights!r:.200}"
            )
        if not isinstance(self.metric, (str, type(None))):
            raise ConfigError(f"metric must be the name of one: {self.metric!r:.80}")
        if type(self.recompute) is not tuple or not all(
            type(group) is int and group >= 1 for group in self.recompute
        ):
            raise ConfigError(
                f"recompute must be a tuple of group numbers from 1, found {self.recompute!r}"
            )
        if not isinstance(self.device, str):
            raise ConfigError(f'device must be a name such as "cpu" or "cuda:1": {self.device!r}')
        is_path = isinstance(self.out, (str, Path)) and str(self.out) and "\0" not in str(self.out)
        if not is_path and self.out is not None:
            raise ConfigError(f"out must be the path of a folder, or None: {self.out!r:.200}")

    def _check_together(self) -> None:
        """Check what one setting asks of another."""
        if self.cache_prefix in ("memory", "disk") and self.dropout_in_group_1 is not False:
            raise ConfigError(
                f"cache_prefix={self.cache_prefix!r} needs group 1 without dropout; turn it off "
                "with dropout_in_group_1=False (--no-dropout-in-group-1), or leave cache_prefix off"
            )
        if self.batch_size is not None and self.accumulation > self.batch_size:
            raise ConfigError(
                f"accumulation = {self.accumulation} exceeds the batch size of {self.batch_size}"
            )


_WHOLE_NUMBERS = {
    "seed": 0,
    "order_seed": 0,
    "dropout_seed": 0,
    "epochs": 1,
    "batch_size": 1,
    "accumulation": 1,
    "max_length": 8,
    "early_stopping": 1,
    "eval_every": 1,
    "save_every": 1,
    "keep_checkpoints": 2,
}
"""The least value of each setting that is a whole number."""

_NUMBERS = {
    "learning_rate": (0.0, 1.0),
    "weight_decay": (0.0, 1.0),
    "warmup": (0.0, 1.0),
    "max_grad_norm": (0.0, sys.float_info.max),
    "label_smoothing": (0.0, 1.0),
    "cache_limit_gib": (0.0, 1e6),
}
"""The least and greatest value of each other number."""

_SWITCHES = ("decay_biases", "dropout_in_group_1", "overwrite", "quiet")

_CHOICES = {
    "precision": PRECISIONS,
    "cache_prefix": CACHES,
    "cache_dtype": CACHE_DTYPES,
    "frozen_weights": FROZEN_WEIGHTS,
    "step": STEPS,
}


def _check(name: str, value: object) -> None:
    """Raise a ConfigError if a setting of a table above is out of range."""
    if name in _WHOLE_NUMBERS:
        least = _WHOLE_NUMBERS[name]
        if type(value) is not int or not least <= value < 2**63:
            raise ConfigError(f"{name} must be a whole number of at least {least}: {value!r}")
    elif name in _NUMBERS:
        low, high = _NUMBERS[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name} must be a number: {value!r}")
        if not low <= value <= high:  # NaN is not either
            raise ConfigError(f"{name} must be a number from {low:g} to {high:g}: {value!r}")
        if name == "learning_rate" and value == 0:
            raise ConfigError("learning_rate must be above 0")
    elif name in _SWITCHES:
        if type(value) is not bool:
            raise ConfigError(f"{name} must be True or False: {value!r}")
    elif value not in _CHOICES[name]:
        raise ConfigError(f"{name} must be one of {', '.join(_CHOICES[name])}: {value!r}")


def _is_weight(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value < math.inf

"""The record of what was done to a model: which adapter is in use, and what of it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from spafit.adaptable import Adaptable
from spafit.errors import PlanError
from spafit.plans import Plan, Trained


@dataclass
class Adaptation:
    """The record of what :func:`spafit.adapt` did to a model, at ``model.adaptation``.

    Attributes
    ----------
    plan : Plan
        The plan that was applied.
    trained : dict of str to Trained
        All parameters that the plan declares to train by name, the head's last, and how each is
        trained. One that a user froze, or a phase of the training, has ``requires_grad`` False.
    untrained : dict of str to torch.Tensor
        The values before training of the head and of the parameters in ``Technique.copies``, such
        as biases that train directly, for ``adapters_disabled``.
    base_fingerprint : str or None
        The fingerprint of the base before training, if the plan trains pre-trained tensors
        directly; else None, because it can be computed from the model at any time.
    task : str or None
        The name of the task, once trained or loaded.
    labels : tuple of str or None
        The label names in the order of the logits, once trained or loaded; empty for a score.
    definition : dict or None
        The definition of the task, once trained or loaded, if it is not one of GLUE's.
    disabled : int
        The number of ``adapters_disabled`` blocks that the model is in.
    set_aside : dict of str to torch.Tensor
        Inside such blocks, the trained values of the tensors in ``untrained``.
    switched_off : list of Adaptable
        Inside such blocks, the modules whose additions the first of them switched off.
    """

    plan: Plan
    trained: dict[str, Trained] = field(repr=False)
    untrained: dict[str, torch.Tensor] = field(repr=False)
    base_fingerprint: str | None = None
    task: str | None = None
    labels: tuple[str, ...] | None = None
    definition: dict[str, Any] | None = None
    disabled: int = 0
    set_aside: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    switched_off: list[Adaptable] = field(default_factory=list, repr=False)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of all parameters that the plan declares to train, the head's last."""
        return tuple(self.trained)

    def require_enabled(self) -> None:
        """Refuse to save, load, train or merge a model while its adapters are disabled.

        Raises
        ------
        PlanError
            If the adapters are disabled.
        """
        if self.disabled:
            raise PlanError("the adapters are disabled here; leave the with block first")

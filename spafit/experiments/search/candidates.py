"""The plans that a search chooses from: every SPAFIT of a model's layers under a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spafit.config import BertConfig
from spafit.errors import ConfigError
from spafit.experiments.search.selectors import layer_costs

KINDS = ("I", "II")

LEAST_LAYERS = 3


@dataclass(frozen=True)
class Candidate:
    """A plan SPAFIT-[N1]-[N2]-[I|II] of a model.

    Attributes
    ----------
    N1, N2 : int
        The last layers of groups 1 and 2, numbered from 0.
    kind : {"I", "II"}
        The type.
    trainable : int
        The numbers that train, in the layers and in the head, as Table 2 counts them.
    """

    N1: int
    N2: int
    kind: str
    trainable: int

    @property
    def name(self) -> str:
        """The method's name."""
        return f"SPAFIT-{self.N1}-{self.N2}-{self.kind}"


def every_candidate(config: BertConfig, num_labels: int, r: int = 64) -> list[Candidate]:
    """Return every SPAFIT plan of a model with three groups, the smallest first.

    Parameters
    ----------
    config : BertConfig
        The model's sizes.
    num_labels : int
        C: the head trains C (D + 1) numbers.
    r : int
        LoRA's rank.

    Raises
    ------
    ConfigError
        If the model has fewer than three layers.
    """
    L = config.num_hidden_layers
    if L < LEAST_LAYERS:
        raise ConfigError(
            f"three groups need {LEAST_LAYERS} layers, and the model has {L}; there is nothing to "
            "search"
        )
    head = num_labels * (config.hidden_size + 1)
    found = []
    for kind in KINDS:
        group_2, group_3 = layer_costs(config, kind, r)
        for N1, N2 in itertools.combinations(range(L - 1), 2):
            layers = (N2 - N1) * group_2 + (L - 1 - N2) * group_3
            found.append(Candidate(N1, N2, kind, layers + head))
    return sorted(found, key=lambda each: (each.trainable, each.N1))


def papers_own(candidates: Sequence[Candidate], L: int) -> Candidate:
    """Return the paper's best plan for BERT-large, SPAFIT-4-9-II, scaled to L layers.

    Of 24 layers the first 5 are frozen, and group 3 begins after the first 10: of 6 after 3, as in
    the grid ``minilm``, because half a layer counts as one. Every group has a layer at least.
    """
    first, second = (math.floor(L * share / 24 + 0.5) for share in (5, 10))
    N1 = max(first, 1) - 1
    N2 = max(second - 1, N1 + 1)
    return next(each for each in candidates if (each.N1, each.N2, each.kind) == (N1, N2, "II"))


def within_parameters(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """Return the plans that train no more numbers than a budget.

    Raises
    ------
    ConfigError
        If they are fewer than two; the message names the least budget.
    """
    found = [each for each in candidates if each.trainable <= most]
    if len(found) < 2:
        raise ConfigError(
            f"--parameters {most:,} leaves {len(found)} of {len(candidates)} plans, and a search "
            f"needs two; the least budget is {candidates[1].trainable:,}"
        )
    return found


def within_time(
    candidates: Sequence[Candidate], most_s: float, seconds: Mapping[int, float]
) -> list[Candidate]:
    """Return the plans with which a full run takes no longer than a budget.

    Parameters
    ----------
    candidates : sequence of Candidate
        All of them.
    most_s : float
        The most seconds.
    seconds : mapping of int to float
        How long a run takes with each N1.

    Raises
    ------
    ConfigError
        If they are fewer than two; the message names the least budget.
    """
    found = [each for each in candidates if seconds[each.N1] <= most_s]
    if len(found) < 2:
        raise ConfigError(
            f"--minutes {most_s / 60:g} leaves no plan: the shortest run takes "
            f"{min(seconds.values()) / 60:.2g} minutes here; raise it, or take fewer --epochs or "
            "--rows"
        )
    return found

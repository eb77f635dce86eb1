"""What proposes a plan: successive halving, random choice, the selectors of the literature.

All of them see rows of train alone: plans are trained on some and scored on others that are held
out of them. Dev is for the report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from spafit.errors import ConfigError
from spafit.experiments.probe.states import layer_states
from spafit.experiments.search.candidates import Candidate
from spafit.experiments.search.halving import Rung, climb, rungs
from spafit.experiments.search.runs import Trainer
from spafit.experiments.search.selectors import (
    LabelledBatch,
    boundaries,
    condition_scores,
    fisher_scores,
    gradient_norms,
    representation_changes,
)
from spafit.machine.precision import resolve_device
from spafit.tasks.label_order import label_names
from spafit.tasks.metrics import METRICS, Ints
from spafit.tasks.task import Dataset
from spafit.training.fit import targets_of
from spafit.training.inference import encode

HALVING, CHOICE, DRAW = "successive halving", "random choice", "one random draw"

BATCHES, ROWS = 8, 256
"""What the selectors see: so many batches with their labels, or so many rows without."""


@dataclass(frozen=True)
class Proposal:
    """A proposed plan.

    Attributes
    ----------
    name : str
        Who proposes it.
    plans : mapping of int to Candidate
        The plan for each reported seed: the same for all, but for one random draw.
    steps : int
        The training steps that it took to choose it.
    cost : str
        The same in words.
    """

    name: str
    plans: Mapping[int, Candidate]
    steps: int
    cost: str

    @property
    def plan(self) -> Candidate | None:
        """The plan; None if there is another one for each seed."""
        first, *others = dict.fromkeys(self.plans.values())
        return None if others else first


class Selection:
    """Runs on a part of train, scored on rows of train that are held out of it.

    Parameters
    ----------
    trainer : Trainer
        Trains them.
    train, held_out : Dataset
        The rows to train on, and those to score on.
    seed : int
        Of every run, and of what is drawn: plans, and the rows of a short run.
    """

    def __init__(self, trainer: Trainer, train: Dataset, held_out: Dataset, seed: int) -> None:
        self.trainer, self.train, self.held_out, self.seed = trainer, train, held_out, seed
        self._order = np.random.default_rng([seed]).permutation(len(train))

    def part(self, share: Fraction) -> tuple[int, int]:
        """Return the rows and epochs of a share of a full run: whole epochs, of fewer rows."""
        whole = self.trainer.base.config.epochs * share
        epochs = -(-whole.numerator // whole.denominator)
        return max(1, int(len(self.train) * whole / epochs)), epochs

    def steps(self, share: Fraction) -> int:
        """Return the steps of a share of a full run."""
        return self.trainer.base.steps(self.train.task, *self.part(share))

    def rows(self, count: int) -> Dataset:
        """Return so many rows to train on, those of a smaller number among them."""
        if count >= len(self.train):
            return self.train
        return self._with(np.sort(self._order[:count]))

    def drawn(self, count: int) -> Dataset:
        """Return so many rows in the order in which they were drawn, which may be all."""
        return self._with(self._order[:count])

    def _with(self, places: Ints) -> Dataset:
        examples = tuple(self.train.examples[place] for place in places.tolist())
        return dataclasses.replace(self.train, examples=examples, sha256="")

    def score(self, candidate: Candidate, share: Fraction) -> float | None:
        """Train a plan for a share of a full run; return its score, the larger the better."""
        rows, epochs = self.part(share)
        metrics = self.trainer.train(
            "selection",
            candidate,
            self.rows(rows),
            self.held_out,
            seed=self.seed,
            epochs=epochs,
        ).metrics
        if metrics is None:
            return None
        name, value = next(iter(metrics.items()))
        return METRICS[name].sign * value

    def draw(self, candidates: Sequence[Candidate], count: int, what: int) -> list[Candidate]:
        """Return some plans drawn without replacement, the smallest first; each ``what`` anew."""
        order = np.random.default_rng([self.seed, what]).permutation(len(candidates))
        return [candidates[place] for place in sorted(order[:count].tolist())]


def by_halving(
    selection: Selection, candidates: Sequence[Candidate], most: int, seeds: Sequence[int]
) -> Proposal:
    """Propose a plan by successive halving, beginning with ``most`` candidates or all of them.

    Of equal scores the plan that trains fewer numbers goes on.
    """
    begun = selection.draw(candidates, most, 1)
    steps = rungs(len(begun))
    best, scores = climb(begun, steps, selection.score)
    spent = sum(
        len(found) * selection.steps(rung.share) for rung, found in zip(steps, scores, strict=True)
    )
    return _same(HALVING, best, seeds, spent, f"{spent:,} steps")


def halving_steps(selection: Selection, plans: int) -> int:
    """Return the training steps of successive halving that begins with so many plans."""
    return sum(rung.plans * selection.steps(rung.share) for rung in rungs(plans))


def at_random(
    selection: Selection, candidates: Sequence[Candidate], steps: int, seeds: Sequence[int]
) -> Proposal:
    """Propose the best of plans drawn at random, trained in full for about as many steps.

    That is the nearest number of full runs, at least one, and at most one a candidate.
    """
    full = selection.steps(Fraction(1))
    count = min(max(1, round(Fraction(steps, full))), len(candidates))
    drawn = selection.draw(candidates, count, 2)
    best, _ = climb(drawn, [Rung(count, Fraction(1))], selection.score)
    return _same(CHOICE, best, seeds, count * full, f"{count * full:,} steps")


def one_draw(
    selection: Selection, candidates: Sequence[Candidate], seeds: Sequence[int]
) -> Proposal:
    """Propose a plan drawn at random for each seed, so that their mean is the average plan's."""
    plans = {seed: selection.draw(candidates, 1, 3 + seed)[0] for seed in seeds}
    return Proposal(DRAW, plans, 0, "none")


def by_selectors(
    selection: Selection,
    candidates: Sequence[Candidate],
    seeds: Sequence[int],
    say: Callable[[str], None],
) -> Iterator[Proposal]:
    """Propose a plan by each selector, of type II if there is one among the candidates.

    A selector whose scores are not finite proposes none, which is said.
    """
    base, task = selection.trainer.base, selection.train.task
    size = base.batch_size(task)
    data = selection.rows(ROWS)
    few = selection.drawn(BATCHES * size)  # a file may be sorted by its labels, and so its batches
    kind = max(each.kind for each in candidates)
    plans = {(each.N1, each.N2): each for each in candidates if each.kind == kind}
    model = base.adapted("lora-ii", task.num_labels, selection.seed)
    model.to(resolve_device(base.config.device))
    encodings, fewer = (
        encode(model, base.tokenizer, each, base.config.max_length) for each in (data, few)
    )
    targets = targets_of(few, label_names(model, few))

    def batches() -> Iterator[LabelledBatch]:
        for rows in every:
            batch = fewer.batch(rows).to(model.device)
            yield batch._asdict(), targets[rows.start : rows.stop].to(model.device)

    every = [range(at, min(at + size, len(few))) for at in range(0, len(few), size)]
    count = len(every)
    seen = f"{count} batches"
    selectors: dict[str, tuple[Callable[[], torch.Tensor], int, str]] = {
        "Fisher score": (lambda: fisher_scores(model, batches()), count, seen),
        "gradient norm": (lambda: gradient_norms(model, batches()), count, seen),
        "similarity of layers": (
            lambda: representation_changes(layer_states(model, encodings)["mean"]),
            0,
            f"{len(data):,} rows read",
        ),
        "condition number": (lambda: condition_scores(model), 0, "none"),
    }
    numbers = {at: each.trainable for at, each in plans.items()}
    for name, (scores, steps, cost) in selectors.items():
        try:
            at = boundaries(scores().cpu(), numbers)
        except ConfigError as error:
            say(f"{name} proposes no plan: {error}")
            continue
        yield _same(name, plans[at], seeds, steps, cost)


def _same(name: str, plan: Candidate, seeds: Sequence[int], steps: int, cost: str) -> Proposal:
    return Proposal(name, dict.fromkeys(seeds, plan), steps, cost)

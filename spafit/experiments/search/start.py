"""``spafit search``: choose N1, N2 and the type of a plan, and report what the choices are worth.

Nothing is chosen on dev: plans are trained on a part of train and scored on rows held out of it,
with a seed that is not reported. Then what each proposer chose is trained on all of train with the
reported seeds and scored on dev, once, after the last step.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError, DataError
from spafit.experiments.figure import can_draw
from spafit.experiments.probe.layers import some_rows
from spafit.experiments.search import report
from spafit.experiments.search.asked import (
    SEARCH,
    begun_before,
    data_and_model,
    settings_asked,
    write_summary,
)
from spafit.experiments.search.candidates import (
    Candidate,
    every_candidate,
    papers_own,
    within_parameters,
    within_time,
)
from spafit.experiments.search.figure import draw
from spafit.experiments.search.proposers import (
    Proposal,
    Selection,
    at_random,
    by_halving,
    by_selectors,
    halving_steps,
    one_draw,
)
from spafit.experiments.search.runs import Base, Trainer
from spafit.files.replacing import refuse_place, replacing
from spafit.methods import R
from spafit.runs.record import about_model
from spafit.runs.train_config import TrainConfig
from spafit.tasks import own, scoring
from spafit.tasks.metrics import METRICS
from spafit.tasks.task import Dataset
from spafit.text.tokenization import load_tokenizer
from spafit.training.inference import encode
from spafit.version import __version__
from spafit.weights.pretrained import load_pretrained

HELD_OUT = 0.2
"""The share of the training rows that plans are scored on while they are chosen."""

LEAST_HELD_OUT = 10


@dataclass(frozen=True)
class SearchOptions:
    """The options of ``spafit search``.

    Attributes
    ----------
    model, revision, mapped
        As for :func:`spafit.load_pretrained`.
    r, alpha : int, float or None
        LoRA's; None is the default of :func:`spafit.plan`.
    parameters : int or None
        The most numbers that may train; None without ``minutes`` is what the paper's SPAFIT-4-9-II,
        scaled to the model, trains.
    minutes : float or None
        The most minutes that a full run may take.
    plans : int
        The most plans that successive halving begins with.
    rows : int or None
        The most rows of train that are used; None is all.
    seeds : tuple of int
        Those that are reported.
    selection_seed : int
        The seed that plans are chosen with.
    out : Path
        The folder of the search, which is resumed there.
    config : TrainConfig
        The settings of a full run.
    """

    model: str
    revision: str | None
    mapped: bool | None
    r: int | None
    alpha: float | None
    parameters: int | None
    minutes: float | None
    plans: int
    rows: int | None
    seeds: tuple[int, ...]
    selection_seed: int
    out: Path
    config: TrainConfig

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds has a duplicate: {' '.join(map(str, self.seeds))}")
        if self.selection_seed in self.seeds:
            raise ConfigError(
                f"--selection-seed {self.selection_seed} is one of --seeds; what is reported needs "
                "other seeds than what it is chosen by"
            )
        if self.parameters is not None and self.minutes is not None:
            raise ConfigError("the budget is one of --parameters and --minutes; give one of them")
        for name, value, least in (
            ("parameters", self.parameters, 1),
            ("plans", self.plans, 2),
            ("rows", self.rows, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--{name} must be a whole number of at least {least}: {value}")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"--minutes must be above 0: {self.minutes:g}")


def run_search(
    options: SearchOptions, train: Dataset, dev: Dataset, about: dict[str, Any]
) -> list[report.Row]:
    """Choose plans, train and score what was chosen, print it, and write it into a folder.

    The folder gets ``search.json`` (the summary), ``search.csv`` (a row for each run),
    ``search.png`` where there is matplotlib, and the run folders: below ``selection`` those that
    choose, below ``report`` those that are reported. The same command resumes a search.

    Parameters
    ----------
    options : SearchOptions
        What is asked for.
    train, dev : Dataset
        Labelled rows. Dev is not looked at until all plans are chosen.
    about : dict
        What the record of a run says of the data.

    Returns
    -------
    list of Row
        The proposals with their scores on dev.

    Raises
    ------
    ConfigError, DataError
        If the budget leaves no choice, the model has too few layers, there are too few rows, or the
        folder holds another search.
    TrainingError
        If all runs of a rung diverge.
    StoppedError
        If a signal asked for a stop; what was running is saved.
    """
    refuse_place(options.out, is_folder=True)
    train = dataclasses.replace(train, task=train.task.with_metric(options.config.metric))
    whole, fitted, held_out = _rows(train, dev, about, options)
    search = _prepared(options, whole, dev, about)
    selection = Selection(search.trainer, fitted, held_out, options.selection_seed)
    print(
        f"{len(search.candidates)} plans are within {search.budget}.\n"
        f"They are chosen on train alone: trained on {len(fitted):,} of its rows, scored on "
        f"{len(held_out):,} others, seed {options.selection_seed}.\n"
        f"{_steps_in_words(search, selection, len(whole), options)}"
    )
    with search.trainer.stop:
        proposals = _proposals(search, selection, options)
        rows = _trained(search.trainer, proposals, whole, dev, options.seeds)
        points = _points(search.trainer, selection, rows, options.seeds)
        summary = {
            **search.begun,
            "display": train.task.display,
            "model": options.model,
            "spafit": __version__,
            "candidates": [each.name for each in search.candidates],
            "seeds": list(options.seeds),
            "rows": {
                "train": len(whole),
                "selection": len(fitted),
                "held_out": len(held_out),
                "dev": len(dev),
            },
            "majority": scoring.majority(train.task, dev.labels),
            **report.summary(rows, points, METRICS[train.task.metrics[0]].sign),
        }
        _write(options.out, rows, points, summary, search.trainer)
    return rows


def _rows(
    train: Dataset, dev: Dataset, about: dict[str, Any], options: SearchOptions
) -> tuple[Dataset, Dataset, Dataset]:
    """Return the rows of train that are used, and what they are divided into for the choice."""
    count = min(len(train), options.rows or len(train))
    least = round(LEAST_HELD_OUT / HELD_OUT)
    if count < least:
        asked = " (--rows)" if count < len(train) else ""
        is_split = "dev_share" in about
        others = f", of which {len(dev):,} others went to dev," if is_split else ""
        mend = "; a file of its own for dev (--dev), or a smaller --dev-share, leaves more of them"
        raise DataError(
            f"{count} rows{asked} of {train.source}{others} are too few: a fifth of them is held "
            f"out to choose by, and a search needs {least} rows"
            f"{mend if is_split and len(train) < least else ''}"
        )
    whole = some_rows(train, count)
    try:
        fitted, held_out = own.split(whole, HELD_OUT, options.selection_seed)
    except DataError:
        raise DataError(
            f"{train.source} has too few different texts to hold some of them out"
        ) from None
    return whole, fitted, dataclasses.replace(held_out, split="held out")


@dataclass(frozen=True)
class _Search:
    """What a search chooses from, and how its budget is called."""

    trainer: Trainer
    candidates: list[Candidate]
    papers: Candidate
    budget: str
    begun: dict[str, Any]


def _prepared(
    options: SearchOptions, train: Dataset, dev: Dataset, about: dict[str, Any]
) -> _Search:
    """Find the plans within the budget, and begin the folder or resume it."""
    base, model = _loaded(options, train)
    every = every_candidate(model.config, train.task.num_labels, options.r or R)
    papers = papers_own(every, model.config.num_hidden_layers)
    most = None if options.minutes is not None else options.parameters or papers.trainable
    candidates = every if most is None else within_parameters(every, most)
    asked = {
        **data_and_model(base, model, train, dev),
        "parameters": most,
        "minutes": options.minutes,
        "plans": min(options.plans, len(candidates)),
        "selection_seed": options.selection_seed,
        **settings_asked(base, model, papers, train),  # last, because it adapts the model
    }
    before = begun_before(options.out, asked)
    begun = before or {"asked": asked}
    trainer = _trainer(options, base, about)
    if options.minutes is not None:
        if "seconds" not in begun:  # measured once: the same plans when it is resumed
            begun = {**begun, "seconds": _measured(trainer, every, train)}
        seconds = {int(N1): float(each) for N1, each in begun["seconds"].items()}
        candidates = within_time(every, 60 * options.minutes, seconds)
    if begun is not before:
        options.out.mkdir(parents=True, exist_ok=True)
        write_summary(options.out / SEARCH, begun)
    return _Search(trainer, candidates, papers, _in_words(options, papers), begun)


def _loaded(options: SearchOptions, train: Dataset) -> tuple[Base, BertForSequenceClassification]:
    """Return what all runs start from, and the model that it names."""
    tokenizer = load_tokenizer(options.model, revision=options.revision)
    model = load_pretrained(
        options.model,
        num_labels=train.task.num_labels,
        revision=options.revision,
        mapped=options.mapped,
    )
    encode(model, tokenizer, train[:1], options.config.max_length)  # refuses what no run could be
    base = Base(
        options.model,
        options.revision,
        options.mapped,
        tokenizer,
        options.r,
        options.alpha,
        # All without dropout in group 1: comparable, and what is kept of it on disk is for all.
        dataclasses.replace(options.config, dropout_in_group_1=False, cache_prefix="auto-disk"),
    )
    return base, model


def _trainer(options: SearchOptions, base: Base, about: dict[str, Any]) -> Trainer:
    """Return what trains the runs, with what their records say of model and data."""
    about = {
        **about_model(
            options.model,
            revision=options.revision,
            split_special_tokens=base.tokenizer.split_special_tokens,
        ),
        **about,
    }
    say = (lambda text: None) if options.config.quiet else partial(print, flush=True)
    return Trainer(base, options.out, about, say)


def _in_words(options: SearchOptions, papers: Candidate) -> str:
    """Return what the budget is."""
    if options.minutes is not None:
        return f"{options.minutes:g} minutes for a run"
    if options.parameters is not None:
        return f"a budget of {options.parameters:,} numbers that train"
    return (
        f"a budget of {papers.trainable:,} numbers that train (those of {papers.name}, the paper's "
        "SPAFIT-4-9-II scaled)"
    )


def _steps_in_words(
    search: _Search, selection: Selection, rows: int, options: SearchOptions
) -> str:
    """Return how much is to be trained: the steps of the choice, and of what is reported."""
    chosen_by = halving_steps(selection, min(options.plans, len(search.candidates)))
    base = search.trainer.base
    reported = base.steps(selection.train.task, rows, base.config.epochs)
    return (
        f"Successive halving takes {chosen_by:,} training steps, random choice about as many; then "
        f"each plan that was chosen is trained for {reported:,} steps with each of "
        f"{len(options.seeds)} seeds."
    )


def _measured(trainer: Trainer, every: Sequence[Candidate], train: Dataset) -> dict[str, float]:
    """Return how long a full run takes with each N1, measured with the plan that trains most."""
    largest = {each.N1: each for each in every}  # in the order of what they train
    print(f"measuring {len(largest)} plans ...", file=sys.stderr, flush=True)
    epochs = trainer.base.config.epochs
    return {str(N1): trainer.measure(each, train, epochs) for N1, each in sorted(largest.items())}


def _proposals(search: _Search, selection: Selection, options: SearchOptions) -> list[Proposal]:
    """Have all proposers choose; none of them is given dev."""
    candidates, seeds = search.candidates, options.seeds
    halving = by_halving(selection, candidates, options.plans, seeds)
    found = [
        halving,
        at_random(selection, candidates, halving.steps, seeds),
        *by_selectors(selection, candidates, seeds, print),
        one_draw(selection, candidates, seeds),
    ]
    if search.papers in candidates:
        plans = dict.fromkeys(seeds, search.papers)
        found.insert(-1, Proposal("the paper's, scaled", plans, 0, "none"))
    return found


def _trained(
    trainer: Trainer,
    proposals: Sequence[Proposal],
    train: Dataset,
    dev: Dataset,
    seeds: Sequence[int],
) -> list[report.Row]:
    """Train what was proposed on all of train, each plan and seed once, and score it on dev."""
    epochs = trainer.base.config.epochs
    rows = []
    for proposal in proposals:
        scores: dict[int, float | None] = {}
        for seed in seeds:
            plan = proposal.plans[seed]
            run = trainer.train("report", plan, train, dev, seed=seed, epochs=epochs)
            scores[seed] = run.score
        rows.append(report.Row(proposal, scores))
    return rows


def _points(
    trainer: Trainer, selection: Selection, rows: Sequence[report.Row], seeds: Sequence[int]
) -> list[report.Point]:
    """Return the plans trained with every reported seed, and the full runs that chose."""
    sign = METRICS[selection.train.task.metrics[0]].sign
    fixed: dict[Candidate, tuple[float, ...]] = {}
    for row in rows:
        sound = tuple(each for each in row.scores.values() if each is not None)
        if row.proposal.plan is not None and len(sound) == len(seeds):
            fixed[row.proposal.plan] = sound
    on_dev = [report.Point("dev", plan, scores) for plan, scores in fixed.items()]
    rows_and_epochs = selection.part(Fraction(1))
    chosen = [
        report.Point("held out", run.candidate, (run.score,))
        for run in trainer.runs.values()
        if run.purpose == "selection"
        and (run.rows, run.epochs) == rows_and_epochs
        and run.score is not None
    ]
    return [*report.frontier(on_dev, sign), *report.frontier(chosen, sign)]


def _write(
    out: Path,
    rows: Sequence[report.Row],
    points: Sequence[report.Point],
    summary: dict[str, Any],
    trainer: Trainer,
) -> None:
    """Print the report, and write it."""
    print(f"\n{report.screen(rows, summary, points)}\n")
    write_summary(out / SEARCH, summary)
    with replacing(out / "search.csv", ConfigError) as temporary:
        text = report.table(list(trainer.runs.values()), list(summary["majority"]))
        temporary.write_text(text, encoding="utf-8", newline="")
    names = [SEARCH, "search.csv"]
    if can_draw():
        draw(points, summary, out / "search.png")
        names.append("search.png")
    print(f"written: {', '.join(names)} in {out}")

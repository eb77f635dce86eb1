"""``spafit search`` on a tiny model: what it trains, on which rows, resumed, and what it refuses.

Oracle: the run folders that it leaves, and a search that nothing disturbed.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.interruptions import stopped_after
from support.small_runs import SmallRun, make_dataset

from spafit.cli import main
from spafit.errors import ConfigError, DataError, DivergedError, StoppedError
from spafit.experiments.search import proposers, runs, start
from spafit.experiments.search.candidates import Candidate, every_candidate
from spafit.experiments.search.proposers import CHOICE, DRAW, HALVING
from spafit.experiments.search.report import Row
from spafit.experiments.search.runs import Run, Trainer
from spafit.experiments.search.start import SearchOptions, run_search
from spafit.runs.train_config import TrainConfig
from spafit.tasks.task import Dataset

TRAIN, DEV = make_dataset("rte", 60, seed=1), make_dataset("rte", 21, "dev", seed=2)
SEEDS = (0, 5)


CONFIG = TrainConfig(epochs=1, batch_size=6, learning_rate=3e-3, device="cpu", quiet=True)


def options(small: SmallRun, out: Path, **changes: Any) -> SearchOptions:
    usual: dict[str, Any] = {
        **{"model": str(small.folder), "revision": None, "mapped": None, "r": 5, "alpha": 7.0},
        **{"parameters": 10**9, "minutes": None, "plans": 27, "rows": None, "seeds": SEEDS},
        **{"selection_seed": 1000, "out": out, "config": CONFIG},
    }
    return SearchOptions(**{**usual, **changes})


class Sealed(Dataset):
    """A dev set that must not be read until all plans are chosen."""

    is_open = False

    def __getattribute__(self, name: str) -> Any:
        assert Sealed.is_open or name not in ("examples", "labels"), "dev is read"
        return super().__getattribute__(name)


@dataclasses.dataclass
class Searched:
    """A search that nothing disturbed: what it returned, printed, left, and asked of ``fit``."""

    rows: list[Row]
    text: str
    out: Path
    fits: list[tuple[Any, Any, Any]]


def counted(patch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """Take down data and settings of every call of ``fit``."""
    fits: list[tuple[Any, Any, Any]] = []
    real = runs.fit

    def fit(model: Any, tokenizer: Any, train: Any, dev: Any, config: Any, **more: Any) -> Any:
        fits.append((train, dev, config))
        return real(model, tokenizer, train, dev, config, **more)

    patch.setattr(runs, "fit", fit)
    return fits


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPAFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def searched(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    out = tmp_path_factory.mktemp("searched") / "new" / "rte"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        fits = counted(patch)
        real = start._trained

        def trained(*arguments: Any) -> list[Row]:
            Sealed.is_open = True
            return real(*arguments)

        patch.setattr(start, "_trained", trained)
        patch.setattr("builtins.print", lambda *text, **_: said.append(" ".join(map(str, text))))
        rows = run_search(options(small, out), TRAIN, Sealed(**vars(DEV)), {"data": "here"})
    return Searched(rows, "\n".join(said), out, fits)


def test_dev_is_not_read_before_all_is_chosen(searched: Searched) -> None:
    """See Sealed. Held-out rows are of train, and no row that is trained on to choose by them."""
    assert Sealed.is_open
    choosing = [each for each in searched.fits if "selection" in str(each[2].out)]
    reported = [each for each in searched.fits if "report" in str(each[2].out)]
    assert choosing and reported and len(choosing) + len(reported) == len(searched.fits)
    every = {each.index for each in TRAIN}
    for train, held_out, config in choosing:
        held, fitted = ({each.index for each in data} for data in (held_out, train))
        assert not held & fitted and held | fitted <= every
        assert all(TRAIN[each.index].text_a == each.text_a for each in held_out)
        assert config.seed == 1000
    assert len({held_out.sha256 for _, held_out, _ in choosing}) == 1
    for train, dev, config in reported:
        assert train.labels == TRAIN.labels and dev.sha256 == DEV.sha256 and config.seed in SEEDS
    for _, _, config in searched.fits:
        assert config.eval_every and not config.dropout_in_group_1
        assert config.cache_prefix == "auto-disk"
        record = json.loads((config.out / "run.json").read_text())
        assert record["settings"]["cache_prefix"] == "disk"


def test_each_plan_is_trained_once(searched: Searched) -> None:
    folders = [str(config.out) for _, _, config in searched.fits]
    assert len(set(folders)) == len(folders)
    reported = {
        (plan.name, seed) for row in searched.rows for seed, plan in row.proposal.plans.items()
    }
    assert len([each for each in folders if "report" in each]) == len(reported)
    assert len(reported) < len(SEEDS) * len(searched.rows)
    for row in searched.rows:
        for seed, score in row.scores.items():
            name = row.proposal.plans[seed].name
            record = json.loads((searched.out / f"report/{name}/seed-{seed}/run.json").read_text())
            assert record["result"]["metrics"]["accuracy"] == score
            assert len(record["result"]["history"]) == 1  # no epoch is chosen on dev


def test_random_choice_costs_as_much(searched: Searched) -> None:
    """Of 48 rows in 8 steps, halving takes 6 plans for a third (16 rows: 3 steps) and 2 in full."""
    by_name = {row.proposal.name: row.proposal for row in searched.rows}
    assert by_name[HALVING].steps == 6 * 3 + 2 * 8 == 34
    assert by_name[CHOICE].steps == 4 * 8  # the nearest number of full runs
    full = [each for each in searched.fits if "1x48-rows" in str(each[2].out)]
    assert 4 <= len(full) <= 2 + 4
    assert by_name[DRAW].steps == 0


def test_what_proposes(searched: Searched) -> None:
    names = [row.proposal.name for row in searched.rows]
    assert names == [
        *(HALVING, CHOICE, "Fisher score", "gradient norm", "similarity of layers"),
        *("condition number", "the paper's, scaled", DRAW),
    ]
    by_name = {row.proposal.name: row.proposal for row in searched.rows}
    assert by_name["the paper's, scaled"].plan.name == "SPAFIT-0-1-II"  # type: ignore[union-attr]
    for name in names[2:6]:
        plan = by_name[name].plan
        assert plan is not None and plan.kind == "II"
        assert by_name[name].steps == (8 if name in ("Fisher score", "gradient norm") else 0)


def test_what_is_written(searched: Searched) -> None:
    summary = json.loads((searched.out / "search.json").read_text())
    assert summary["rows"] == {"train": 60, "selection": 48, "held_out": 12, "dev": 21}
    assert len(summary["candidates"]) == 6 and summary["seeds"] == list(SEEDS)
    with (searched.out / "search.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(searched.fits)
    assert {(each["scored_on"], each["seed"]) for each in table} == {
        ("held out", "1000"),
        *(("dev", str(seed)) for seed in SEEDS),
    }
    on_dev = [each for each in table if each["scored_on"] == "dev"]
    [point] = [e for e in summary["points"] if e["on"] == "dev" and e["plan"] == "SPAFIT-0-1-II"]
    assert point["scores"] == [
        float(e["accuracy"])
        for seed in SEEDS
        for e in on_dev
        if e["plan"] == "SPAFIT-0-1-II" and e["seed"] == str(seed)
    ]
    assert {e["plan"] for e in summary["points"] if e["on"] == "held out"} == {
        each["plan"] for each in table if each["scored_on"] == "held out" and each["rows"] == "48"
    }
    assert "trained on 48 of its rows, scored on 12 others, seed 1000" in searched.text
    assert summary["says"].split(".")[0] in " ".join(searched.text.split())
    assert f"written: search.json, search.csv, search.png in {searched.out}" in searched.text


def test_a_killed_search_goes_on(
    searched: Searched,
    small: SmallRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within a run, and between two: the same numbers, and nothing done twice."""
    fits = counted(monkeypatch)
    with stopped_after(6), pytest.raises(StoppedError):  # in the first run of the last rung
        run_search(options(small, tmp_path), TRAIN, DEV, {})
    assert len(fits) == 7

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(start, "_trained", kill)
        with pytest.raises(Killed):
            run_search(options(small, tmp_path), TRAIN, DEV, {})
    assert fits[7][2].out == fits[6][2].out  # the one that was stopped
    reported = sorted((searched.out / "report").glob("*/seed-*"))
    for each in reported[1:]:  # to save time
        shutil.copytree(each, tmp_path / each.relative_to(searched.out))
    rows = run_search(options(small, tmp_path), TRAIN, DEV, {})
    assert [(row.proposal.plans, row.scores) for row in rows] == [
        (row.proposal.plans, row.scores) for row in searched.rows
    ]
    assert len(fits) == len(searched.fits) + 1 - len(reported[1:])
    csvs = [(each / "search.csv").read_text() for each in (tmp_path, searched.out)]
    assert csvs[0] == csvs[1]

    before = len(fits)
    run_search(options(small, tmp_path, seeds=(5,), plans=40), TRAIN, DEV, {})  # there are 6
    by_default = dataclasses.replace(CONFIG, metric="accuracy")
    run_search(options(small, tmp_path, config=by_default), TRAIN, DEV, {})
    assert len(fits) == before
    kept = tmp_path / "search.json"
    summary, written = kept.read_text(), kept.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        real = start._trained

        def signalled(*arguments: Any) -> list[Row]:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)

        patch.setattr(start, "_trained", signalled)
        with pytest.raises(StoppedError, match="SIGTERM; the same command resumes the search"):
            run_search(options(small, tmp_path), TRAIN, DEV, {})
    assert kept.read_text() == summary and "proposals" in summary
    assert kept.stat().st_mtime_ns == written
    for changes, named in (
        ({"selection_seed": 7}, "selection_seed was 1000, and is 7"),
        ({"parameters": 10**8}, "parameters was 1000000000, and is 100000000"),
        (
            {"parameters": None, "minutes": 3.0},
            "parameters was 1000000000, and is not given; minutes was not given, and is 3.0",
        ),
        ({"r": 6}, "r was 5, and is 6"),
        ({"config": dataclasses.replace(CONFIG, metric="f1")}, "metric was 'accuracy', and is"),
        ({"config": dataclasses.replace(CONFIG, warmup=0.5)}, "warmup was 0.0, and is 0.5"),
        ({"config": dataclasses.replace(CONFIG, precision="bf16")}, "precision was 'float32'"),
    ):
        with pytest.raises(ConfigError, match=f"holds another search: {named}"):
            run_search(options(small, tmp_path, **changes), TRAIN, DEV, {})
    with pytest.raises(ConfigError, match="holds another search: the rows of dev are others"):
        run_search(options(small, tmp_path), TRAIN, DEV[:20], {})
    kept.write_text("{}")
    with pytest.raises(ConfigError, match=r"search\.json cannot be read"):
        run_search(options(small, tmp_path), TRAIN, DEV, {})
    kept.unlink()  # the runs may be of another learning rate, or other rows
    with pytest.raises(ConfigError, match=r"holds runs of a search, and no search\.json"):
        run_search(options(small, tmp_path), TRAIN, DEV, {})
    assert len(fits) == before


class Made(Trainer):
    """Scores that are made up, by plan, purpose and seed; nothing is trained."""

    score: Callable[[Candidate, str, int], float | None]
    metric = "accuracy"

    def train(
        self,
        purpose: str,
        candidate: Candidate,
        train: Dataset,
        scored: Dataset,
        *,
        seed: int,
        epochs: int,
    ) -> Run:
        value = type(self).score(candidate, purpose, seed)
        metrics = None if value is None else {self.metric: value}
        steps = self.base.steps(train.task, len(train), epochs)
        run = Run(purpose, candidate, seed, len(train), epochs, steps, metrics)
        self.runs[f"{purpose} {candidate.name} {seed} {len(train)}"] = run
        return run


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> type[Made]:
    monkeypatch.setattr(start, "Trainer", Made)
    return Made


def test_nothing_beats_random(
    small: SmallRun, made: type[Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all plans are as good, but for chance."""
    draw = np.random.default_rng(0)
    made.score = staticmethod(lambda candidate, purpose, seed: 0.7 + 0.01 * float(draw.normal()))
    run_search(options(small, tmp_path, seeds=(0, 1, 2, 3)), TRAIN, DEV, {})
    out = " ".join(capsys.readouterr().out.split())
    assert "Nothing beats random here: of what was tested none is better, by a paired" in out
    # What is to come is said first: 34 steps as above, and 60 rows in batches of 6.
    assert "halving takes 34 training steps" in out and "for 10 steps with each of 4 seeds" in out


def test_a_plan_that_is_better_is_found(
    small: SmallRun,
    made: type[Made],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half of those that halving takes are drawn by random choice, which misses it."""
    draw = np.random.default_rng(0)
    best = proposers.Selection.draw
    monkeypatch.setattr(
        proposers.Selection,
        "draw",
        lambda self, candidates, count, what: best(
            self, candidates if what == 1 else candidates[:-1], count, what
        ),
    )
    largest = "SPAFIT-0-1-II"
    made.score = staticmethod(
        lambda candidate, purpose, seed: (
            (0.9 if candidate.name == largest else 0.7) + 0.001 * float(draw.normal())
        )
    )
    rows = run_search(options(small, tmp_path, seeds=(0, 1, 2, 3)), TRAIN, DEV, {})
    assert rows[0].proposal.plan is not None and rows[0].proposal.plan.name == largest
    out = " ".join(capsys.readouterr().out.split())
    assert "Successive halving beats random choice" in out
    assert "as few numbers: " in out and largest in out


def test_a_run_that_diverges_is_out_and_stays_out(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = runs.Base(str(small.folder), None, None, small.tokenizer, 5, 7.0, small.settings())
    trainer = Trainer(base, tmp_path, {}, print)
    every = every_candidate(small.model().config, 2, 5)

    def diverge(*_: Any, **__: Any) -> None:
        folder = tmp_path / f"selection/1x60-rows/{every[0].name}/seed-0"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text('{"status": "failed", "error": "DivergedError: NaN"}')
        raise DivergedError("NaN")

    monkeypatch.setattr(runs, "fit", diverge)
    for one in (trainer, Trainer(base, tmp_path, {}, print)):
        found = one.train("selection", every[0], TRAIN, DEV, seed=0, epochs=1)
        assert found.metrics is None and found.score is None


def test_plans_with_one_N1_share_what_is_kept_of_the_frozen_layers(
    small: SmallRun, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: of how many examples group 1 was computed; by types and seeds, and another N1."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    trainer = start._trainer(
        options(small, tmp_path), start._loaded(options(small, tmp_path), TRAIN)[0], {}
    )
    computed.clear()
    counts = []
    for name, seed in (("0-1-II", 0), ("0-1-I", 0), ("0-1-II", 5), ("1-2-II", 0)):
        [plan] = [
            each
            for each in every_candidate(small.model().config, 2, 5)
            if each.name == f"SPAFIT-{name}"
        ]
        trainer.train("report", plan, TRAIN, DEV, seed=seed, epochs=2)
        counts.append(sum(computed))
    rows = len(TRAIN) + len(DEV)
    assert counts == [rows, rows, rows, 2 * rows]


def test_a_budget_of_time_is_measured_once(
    small: SmallRun, made: type[Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.score = staticmethod(lambda candidate, purpose, seed: 0.5)
    asked: list[str] = []

    def measure(self: Trainer, candidate: Candidate, train: Dataset, epochs: int) -> float:
        asked.append(candidate.name)
        return 100.0 if candidate.N1 == 0 else 50.0

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "measure", measure)
        for _ in range(2):
            run_search(options(small, tmp_path, parameters=None, minutes=1.0), TRAIN, DEV, {})
    assert asked == ["SPAFIT-0-1-II", "SPAFIT-1-2-II"]  # those that train most with each N1
    assert json.loads((tmp_path / "search.json").read_text())["candidates"] == [
        "SPAFIT-1-2-I",
        "SPAFIT-1-2-II",
    ]
    config = small.settings(epochs=7)
    base = runs.Base(str(small.folder), None, None, small.tokenizer, 5, 7.0, config)
    every = every_candidate(small.model().config, 2, 5)
    fitted: list[Dataset] = []

    def fit(model: Any, tokenizer: Any, train: Dataset, *others: Any, **more: Any) -> Any:
        fitted.append(train)
        return run_fit(model, tokenizer, train, *others, **more)

    run_fit = runs.fit
    monkeypatch.setattr(runs, "fit", fit)
    seconds = Trainer(base, tmp_path, {}, print).measure(every[0], TRAIN, 7)
    assert 0.001 < seconds < 60
    batches = 8 * config.batch_size
    assert fitted[-1].texts_a == [
        TRAIN.texts_a[k * len(TRAIN) // batches] for k in range(batches)
    ]  # a file may begin with its short texts


def test_the_default_budget_is_the_paper_s(
    small: SmallRun, made: type[Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.score = staticmethod(lambda candidate, purpose, seed: 0.5)
    run_search(options(small, tmp_path, parameters=None, rows=50), TRAIN, DEV, {})
    out = " ".join(capsys.readouterr().out.split())
    assert "those of SPAFIT-0-1-II, the paper's SPAFIT-4-9-II scaled" in out
    assert json.loads((tmp_path / "search.json").read_text())["rows"]["train"] == 50


def test_rows_of_short_runs(small: SmallRun, tmp_path: Path) -> None:
    """Whole epochs of fewer rows, which are among those of the longer runs."""
    base = runs.Base(
        str(small.folder), None, None, small.tokenizer, 5, 7.0, small.settings(epochs=10)
    )
    selection = proposers.Selection(Trainer(base, tmp_path, {}, print), TRAIN, DEV, 3)
    assert selection.part(Fraction(1)) == (60, 10)
    assert selection.part(Fraction(1, 3)) == (50, 4)  # of 3 1/3 epochs: 200 examples
    assert selection.part(Fraction(1, 9)) == (33, 2)
    assert selection.part(Fraction(1, 27)) == (22, 1)
    few, more = (set(selection.rows(count).examples) for count in (22, 33))
    assert few < more < set(TRAIN.examples) and selection.rows(60) is TRAIN
    other = proposers.Selection(selection.trainer, TRAIN, DEV, 4)
    assert set(other.rows(22).examples) != few


def test_truncated_texts_are_said_once(small: SmallRun, tmp_path: Path) -> None:
    for length, count in ((8, 1), (None, 0)):
        said: list[str] = []
        config = small.settings(max_length=length)
        base = runs.Base(str(small.folder), None, None, small.tokenizer, 5, 7.0, config)
        trainer = Trainer(base, tmp_path / str(length), {}, said.append)
        for candidate in every_candidate(small.model().config, 2, 5)[:2]:
            trainer.train("selection", candidate, TRAIN[:12], DEV[:6], seed=3, epochs=1)
        whole = [
            small.tokenizer.encode(
                [row.text_a for row in rows], [row.text_b for row in rows], max_length=512
            )
            for rows in (TRAIN[:12], DEV[:6])
        ]
        long = sum(each > 8 for encodings in whole for each in encodings.lengths)
        assert 0 < long < 18
        cut = [each for each in said if "truncated" in each]
        assert [each.partition(":")[0] for each in cut] == [f"{long} of 18 examples are truncated"][
            :count
        ]
        assert len(said) == 2 + count


def test_what_is_drawn(small: SmallRun, made: type[Made], tmp_path: Path) -> None:
    """Random choice takes the nearest number of full runs; one random draw is another a seed."""
    made.score = staticmethod(lambda candidate, purpose, seed: 0.5)
    base = runs.Base(str(small.folder), None, None, small.tokenizer, 5, 7.0, small.settings())
    selection = proposers.Selection(made(base, tmp_path, {}, print), TRAIN, DEV, 3)
    every = every_candidate(small.model().config, 2, 5)
    full = selection.steps(Fraction(1))
    for steps, count in ((1, 1), (full * 2 - 1, 2), (full * 2 + 1, 2), (full * 99, 6)):
        found = proposers.at_random(selection, every, steps, SEEDS)
        assert found.steps == count * full
        assert found.plan == min(selection.draw(every, count, 2), key=lambda each: each.trainable)
    draws = [proposers.one_draw(selection, every, range(20)) for _ in range(2)]
    assert draws[0] == draws[1] and set(draws[0].plans.values()) == set(every)
    assert draws[0].plan is None

    made.score = staticmethod(lambda candidate, purpose, seed: float(candidate.trainable))
    best = [proposers.by_halving(selection, every, 27, SEEDS).plan]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "metric", "log_loss")  # the smaller, the better
        best.append(proposers.by_halving(selection, every, 27, SEEDS).plan)
    assert best == [every[-1], every[0]]
    assert selection.draw(every, 3, 1) != selection.draw(every, 3, 2)


def test_a_selector_without_finite_scores_proposes_nothing(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infinite = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    monkeypatch.setattr(proposers, "condition_scores", lambda model: infinite)
    base = runs.Base(str(small.folder), None, None, small.tokenizer, 5, 7.0, small.settings())
    selection = proposers.Selection(Trainer(base, tmp_path, {}, print), TRAIN, DEV, 3)
    every = [each for each in every_candidate(small.model().config, 2, 5) if each.kind == "I"]
    said: list[str] = []
    found = list(proposers.by_selectors(selection, every, SEEDS, said.append))
    assert len(found) == 3 and {p.kind for f in found for p in f.plans.values()} == {"I"}
    assert said == [
        "condition number proposes no plan: a score of a layer is not finite; take another selector"
    ]


def test_the_gradients_are_of_rows_from_the_whole_file(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may be sorted by its labels."""
    seen: list[torch.Tensor] = []

    def scores(model: Any, batches: Any) -> torch.Tensor:
        seen.append(torch.cat([targets for _, targets in batches]))
        return torch.zeros(4)

    monkeypatch.setattr(proposers, "fisher_scores", scores)
    examples = sorted(TRAIN.examples * 10, key=lambda each: str(each.label))
    rows = dataclasses.replace(TRAIN, examples=tuple(examples), sha256="")
    base = runs.Base(str(small.folder), None, None, small.tokenizer, 5, 7.0, CONFIG)
    selection = proposers.Selection(Trainer(base, tmp_path, {}, print), rows, DEV, 3)
    list(proposers.by_selectors(selection, every_candidate(small.model().config, 2, 5), (), print))
    [targets] = seen
    assert len(targets) == proposers.BATCHES * 6
    whole = sum(each.label == examples[-1].label for each in examples) / len(examples)
    assert targets.float().mean().item() == pytest.approx(whole, abs=0.2)
    alike = [len(set(batch.tolist())) == 1 for batch in targets.split(6)]
    assert sum(alike) <= 2  # of 8 batches; sorted, 7 are


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": (1, 1)}, "--seeds has a duplicate: 1 1"),
        ({"seeds": (0, 1000)}, "--selection-seed 1000 is one of --seeds"),
        ({"minutes": 3.0}, "the budget is one of --parameters and --minutes"),
        ({"parameters": None, "minutes": 0.0}, "--minutes must be above 0"),
        ({"parameters": 0}, "--parameters must be a whole number of at least 1"),
        ({"plans": 1}, "--plans must be a whole number of at least 2"),
        ({"rows": 0}, "--rows must be a whole number of at least 1"),
        ({"rows": 49}, r"49 rows \(--rows\) of rte train are too few.* needs 50 rows$"),
        ({"parameters": 100}, "--parameters 100 leaves 0 of 6 plans"),
    ],
)
def test_what_is_refused(
    small: SmallRun, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        run_search(options(small, tmp_path / "new", **changes), TRAIN, DEV, {})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("more", "said", "is_mended_by_dev"),
    [
        ("", "48 rows of {}, of which 12 others went to dev, are too few: a fifth of them", True),
        ("--rows 20", "20 rows (--rows) of {}, of which 12 others went to dev, are too few", True),
        ("--rows 20 --dev-share 0.1", "20 rows (--rows) of {}, of which 6 others went", False),
    ],
)
def test_too_few_rows_of_your_own(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: str,
    said: str,
    is_mended_by_dev: bool,
) -> None:
    """It is said how many went to dev, and what leaves more, where that is what they lack."""
    file = tmp_path / "all.csv"
    lines = [f"{each.text_a} {each.index},{each.label}\n" for each in TRAIN]
    file.write_text("text,label\n" + "".join(lines), encoding="utf-8")
    arguments = ["search", "--data", str(file), "--model", str(tmp_path), "--out", "new"]
    assert main([*arguments, *more.split()]) == 2
    err = capsys.readouterr().err
    assert said.format(file) in err and "needs 50 rows" in err and err.count("\n") == 1
    assert ("a smaller --dev-share, leaves more of them" in err) == is_mended_by_dev


def test_rows_that_are_all_alike_are_refused(small: SmallRun, tmp_path: Path) -> None:
    alike = tuple(dataclasses.replace(TRAIN[0], index=n) for n in range(60))
    train = dataclasses.replace(TRAIN, examples=alike, sha256="")
    with pytest.raises(DataError, match="too few different texts to hold some of them out"):
        run_search(options(small, tmp_path), train, DEV, {})

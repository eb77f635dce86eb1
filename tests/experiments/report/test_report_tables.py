"""What a report computes of runs.

Oracle: numbers worked out by hand from run folders written by hand, and scipy.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from scipy import stats
from support.written_runs import LARGE_CASED, write_run

from spafit.errors import ConfigError
from spafit.experiments.report.page import html
from spafit.experiments.report.published import ANCHORS, METRICS, TABLE_2, TASKS, paper_score
from spafit.experiments.report.tables import make_report
from spafit.experiments.report.text import markdown, other_tables

OURS = (0.72, 0.75, 0.70)
OTHERS = (0.70, 0.71, 0.69)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SPAFITs, LoRA-II and BitFit on RTE and CoLA; three seeds, two of BitFit."""
    folder = tmp_path_factory.mktemp("grid")
    for task, shift in (("rte", 0.0), ("cola", -0.2)):
        majority = 0.53 if task == "rte" else 0.0
        for method, scores in {
            "SPAFIT-1-3-II": OURS,
            "SPAFIT-1-3-I": (0.6, 0.6, 0.6),
            "Full LoRA-II": OTHERS,
            "Full BitFit": (0.66, 0.67),
        }.items():
            for seed, score in enumerate(scores):
                answers = [("a", "ab"[(seed + k) % 2 and k < 2]) for k in range(8)]
                write_run(
                    folder / task / method / f"seed-{seed}",
                    score + shift,
                    task=task,
                    method=method,
                    seed=seed,
                    answers=answers,
                    majority=majority,
                    trainable=500_000 if task == "rte" else 500_385,
                )
    return folder


def test_a_cell(grid: Path) -> None:
    report = make_report(grid)
    assert [task.display for task in report.tasks] == ["CoLA", "RTE"]
    assert [task.metric for task in report.tasks] == ["matthews", "accuracy"]
    assert [task.majority for task in report.tasks] == [0.0, 0.53]
    row = next(row for row in report.rows if row.label == "SPAFIT-1-3-II")
    cell = row.cells["rte"]
    assert cell.spread.mean == pytest.approx(sum(OURS) / 3)
    assert cell.spread.deviation == pytest.approx(stats.tstd(OURS))
    assert (cell.best, cell.paper, cell.seeds) == (0.75, None, ("0", "1", "2"))
    assert row.mean == pytest.approx(sum(OURS) / 3 - 0.1)
    assert row.deviation == pytest.approx(stats.tstd(OURS))
    assert row.trainable == (500_000, 500_385)
    assert row.seconds == pytest.approx(61.0)
    assert row.peak_memory_mib == pytest.approx(401.0)


def test_the_deviation_of_the_mean(tmp_path: Path) -> None:
    """Of each seed's mean over tasks: seeds that make up for each other have none."""
    for seed, score in enumerate((0.6, 0.7)):
        write_run(tmp_path / f"rte-{seed}", score, seed=seed)
        write_run(tmp_path / f"cola-{seed}", 1 - score, seed=seed, task="cola")
    [row] = make_report(tmp_path).rows
    assert (row.mean, row.deviation) == pytest.approx((0.5, 0.0))
    write_run(tmp_path / "cola-2", 0.5, seed=2, task="cola")
    [row] = make_report(tmp_path).rows
    assert row.mean is not None and row.deviation is None


def test_a_run_whose_machine_slept_does_not_count(tmp_path: Path) -> None:
    """Oracle: medians by hand, over the runs of the task that both methods have."""
    for seed, (seconds, speed, memory) in enumerate(((50, 30, 7), (9000, 2, 5), (54, 28, 6))):
        path = write_run(tmp_path / f"a{seed}", 0.7, seed=seed) / "run.json"
        record = json.loads(path.read_text())
        costs = {"seconds": seconds, "examples_per_s": speed, "peak_memory_mib": memory}
        path.write_text(json.dumps({**record, "result": {**record["result"], **costs}}))
    write_run(tmp_path / "other", 0.7, task="cola")
    write_run(tmp_path / "b", 0.7, method="Full BitFit")
    report = make_report(tmp_path)
    [row] = [each for each in report.rows if each.label == "SPAFIT-1-3-II"]
    assert (row.seconds, row.examples_per_s, row.peak_memory_mib) == (54, 28, 6)
    assert "medians over the runs" in markdown(report)


def test_costs_that_a_record_lacks(tmp_path: Path) -> None:
    """Of the others the median; what no run has is left out."""
    for seed, costs in enumerate(({"seconds": 50}, {"seconds": 60, "examples_per_s": 3}, {})):
        path = write_run(tmp_path / f"a{seed}", 0.7, seed=seed) / "run.json"
        record = json.loads(path.read_text())
        for name in ("seconds", "examples_per_s", "peak_memory_mib"):
            del record["result"][name]
        path.write_text(json.dumps({**record, "result": {**record["result"], **costs}}))
    report = make_report(tmp_path)
    [row] = report.rows
    assert (row.seconds, row.examples_per_s, row.peak_memory_mib) == (55, 3, None)
    [[_, _, rows]] = [each for each in other_tables(report) if each[0] == "Time and memory"]
    assert rows[1:] == [["SPAFIT-1-3-II", "55", "3.0"]]
    page = html(report)
    assert "Time</figcaption>" in page and "Memory</figcaption>" not in page


def test_comparisons(grid: Path) -> None:
    """The best SPAFIT against every other method, on the seeds that both have."""
    report = make_report(grid)
    assert report.ours == "SPAFIT-1-3-II"
    found = {(each.other, each.on): each for each in report.comparisons}
    assert {other for other, _ in found} == {"Full BitFit", "Full LoRA-II"}
    on_rte = found["Full LoRA-II", "RTE"]
    assert on_rte.test is not None and on_rte.seeds == 3
    assert on_rte.test.difference == pytest.approx(sum(OURS) / 3 - sum(OTHERS) / 3)
    assert on_rte.test.p == pytest.approx(stats.ttest_rel(OURS, OTHERS).pvalue)
    of_all = found["Full LoRA-II", "mean of 2 tasks"]
    assert of_all.test is not None
    assert of_all.test.p == pytest.approx(on_rte.test.p)  # the same differences on both tasks
    assert found["Full BitFit", "RTE"].seeds == 2


def test_seeds_that_are_crossed_are_no_independent_runs(tmp_path: Path) -> None:
    """Copies by a seed that does nothing change no test; nor does one that all runs share."""
    for copies in (1, 4):
        for method, scores in (("SPAFIT-1-3-II", OURS), ("Full LoRA-II", OTHERS)):
            for init, dropout in itertools.product(range(3), range(copies)):
                write_run(
                    tmp_path / str(copies) / method / f"{init}{dropout}",
                    scores[init],
                    method=method,
                    cell={"settings": {"init_seed": init}},
                    settings={"order_seed": 7, "dropout_seed": dropout},
                )
    one, four = (make_report(tmp_path / str(copies)) for copies in (1, 4))
    assert [each.test for each in one.comparisons] == [each.test for each in four.comparisons]
    assert [each.seeds for each in (*one.comparisons, *four.comparisons)] == [3, 3]
    assert not any("independent" in note for note in one.notes)
    [note] = [note for note in four.notes if "independent" in note]
    assert note.endswith("take only runs that share none: Full LoRA-II, RTE: 3 of 12")


def test_against_a_method_that_is_named(grid: Path) -> None:
    """Its own kind included; the name is that of the table, in any case."""
    report = make_report(grid, "full LORA-II")
    assert report.ours == "Full LoRA-II"
    others = {each.other for each in report.comparisons}
    assert others == {row.label for row in report.rows} - {"Full LoRA-II"}
    [on_rte] = [
        each for each in report.comparisons if (each.other, each.on) == ("SPAFIT-1-3-II", "RTE")
    ]
    assert on_rte.test is not None
    assert on_rte.test.difference == pytest.approx(sum(OTHERS) / 3 - sum(OURS) / 3)
    [rules] = [rules for title, rules, _ in other_tables(report) if title.endswith("the others")]
    assert "favours" not in rules
    with pytest.raises(ConfigError, match="called 'LoRA-II'; they are Full BitFit, Full LoRA-II, "):
        make_report(grid, "LoRA-II")


def test_a_single_seed_is_not_the_best(tmp_path: Path) -> None:
    """No test can pair it; in a grid that is not done it may be a lucky one."""
    for seed in (0, 1):
        for method, score in (("SPAFIT-1-3-II", 0.6), ("SPAFIT-0-2-II", 0.7), ("Houlsby", 0.5)):
            if (method, seed) != ("SPAFIT-0-2-II", 1):
                write_run(tmp_path / f"{method}{seed}", score, method=method, seed=seed)
    report = make_report(tmp_path)
    assert report.ours == "SPAFIT-1-3-II" and report.comparisons
    assert any("single seed" in note and "SPAFIT-0-2-II" in note for note in report.notes)


def test_the_mean_is_of_each_seed_over_tasks(tmp_path: Path) -> None:
    scores = {
        ("rte", "SPAFIT-1-3-II"): (0.70, 0.74, 0.71),
        ("cola", "SPAFIT-1-3-II"): (0.50, 0.45, 0.49),
        ("rte", "Full LoRA-II"): (0.69, 0.69, 0.70),
        ("cola", "Full LoRA-II"): (0.47, 0.46, 0.44),
    }
    for (task, method), each in scores.items():
        for seed, score in enumerate(each):
            write_run(
                tmp_path / f"{task}{method}{seed}", score, task=task, method=method, seed=seed
            )
    means = [
        [(scores["rte", m][k] + scores["cola", m][k]) / 2 for k in range(3)]
        for m in ("SPAFIT-1-3-II", "Full LoRA-II")
    ]
    [found] = [each for each in make_report(tmp_path).comparisons if "mean" in each.on]
    assert found.test is not None
    assert found.test.p == pytest.approx(stats.ttest_rel(*means).pvalue)


def test_methods_that_were_run_on_different_tasks(tmp_path: Path) -> None:
    """Three SPAFITs on a task each, no task common to all: the first's task decides.

    Then one of them on two tasks is best, because no other one was run on as many; it is said.
    """
    for method, task, score in (
        ("SPAFIT-0-2-I", "rte", 0.6),
        ("SPAFIT-0-2-II", "rte", 0.7),
        ("SPAFIT-1-3-II", "cola", 0.9),
        ("Full BitFit", "rte", 0.65),
    ):
        for seed in range(2):
            folder = tmp_path / task / method / str(seed)
            write_run(folder, score + seed / 100, task=task, method=method, seed=seed)
    report = make_report(tmp_path)
    assert report.ours == "SPAFIT-0-2-II"
    assert report.notes[0] == (
        "SPAFIT-0-2-II is the best of the SPAFITs that were run on RTE; not run on all of these, "
        "and so no candidates: SPAFIT-1-3-II"
    )
    write_run(tmp_path / "more", 0.1, task="cola", method="SPAFIT-0-2-I")
    report = make_report(tmp_path)
    assert report.ours == "SPAFIT-0-2-I"
    note = report.notes[0]
    assert "run on CoLA, RTE; " in note and note.endswith(": SPAFIT-0-2-II, SPAFIT-1-3-II")
    for each in (tmp_path / "rte" / "Full BitFit").iterdir():
        shutil.rmtree(each)
    assert "candidates" not in str(make_report(tmp_path).notes)  # nothing is compared


def test_a_single_seed_has_no_test(tmp_path: Path) -> None:
    for seed, method in enumerate(("SPAFIT-1-3-II", "Full BitFit")):
        write_run(tmp_path / method, 0.7, method=method, seed=seed)
    report = make_report(tmp_path)
    assert report.comparisons == ()
    assert report.notes == ("no paired test: it needs two seeds that two methods have in common",)


def test_of_an_error_less_is_better(tmp_path: Path) -> None:
    for method, errors in {"SPAFIT-1-3-I": (0.3, 0.4), "SPAFIT-1-3-II": (0.6, 0.7)}.items():
        for seed, error in enumerate(errors):
            write_run(
                tmp_path / f"{method}{seed}",
                0.0,
                task="price",
                method=method,
                seed=seed,
                result={
                    "metrics": {"mean_squared_error": error},
                    "majority": {"mean_squared_error": 1.0},
                    "history": [],
                    "trainable": 5,
                    "examples_per_s": 1.0,
                    "peak_memory_mib": 1.0,
                    "seconds": 1.0,
                },
            )
    report = make_report(tmp_path)
    assert report.ours == "SPAFIT-1-3-I"
    assert [row.cells["price"].best for row in report.rows] == [0.3, 0.6]


def test_agreement(grid: Path) -> None:
    """By hand: of 8 answers, the first two of seeds 0 and 2 are "ab", of seed 1 "ba"."""
    report = make_report(grid)
    found = {(each.label, each.task): each for each in report.agreements}
    each = found["SPAFIT-1-3-II", "RTE"]
    assert each.runs == 3
    assert each.value == pytest.approx((6 / 8 + 1 + 6 / 8) / 3)
    assert each.by_chance == pytest.approx((7 / 8) ** 2 + (1 / 8) ** 2)  # one b in each
    [[_, rules, rows]] = [each for each in other_tables(report) if each[0].startswith("Agreement")]
    assert "beside what chance alone would give" in rules
    assert rows[-1] == ["SPAFIT-1-3-II", *["83.3 %, by chance 78.1 %"] * 2]


def test_agreement_of_scores_is_a_correlation(tmp_path: Path) -> None:
    one, two = (1.0, 2.0, 3.5), (1.5, 1.25, 3.0)
    for seed, scores in enumerate((one, two)):
        answers = list(zip((1.0, 2.0, 3.0), scores, strict=True))
        write_run(tmp_path / str(seed), 0.9, task="sts-b", seed=seed, answers=answers)
    report = make_report(tmp_path)
    [found] = report.agreements
    assert report.notes == () and found.by_chance is None
    assert found.value == pytest.approx(stats.pearsonr(one, two)[0])
    assert f"r = {found.value:.3f}" in markdown(report)


def test_no_agreement_is_made_up(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", 0.7, seed=seed)
        labels = [("entailment", "entailment")] * (3 + seed)
        write_run(tmp_path / f"b{seed}", 0.7, seed=seed, method="Full BitFit", answers=labels)
        scores = [(1.0, "much")]
        write_run(tmp_path / f"c{seed}", 0.7, seed=seed, task="sts-b", answers=scores)
    report = make_report(tmp_path)
    assert report.agreements == ()
    assert report.notes == (
        "Full BitFit, RTE: no agreement, because its runs have different dev examples",
        "SPAFIT-1-3-II, STS-B: no agreement, because an answer is not a number",
        "no agreement of a method's seeds, because a0 has no readable dev.tsv",
    )


def test_the_spread_is_divided_among_the_seeds(tmp_path: Path) -> None:
    """Initial values matter, the order does not; dropout's seed goes with the order's."""
    for init in (0, 1, 2):
        for order in (0, 1):
            settings = {"order_seed": order, "dropout_seed": order}
            cell = {"settings": {"init_seed": init}}
            write_run(
                tmp_path / f"{init}{order}", 0.6 + init / 50, cell=cell, settings=settings, seed=9
            )
    [found] = make_report(tmp_path).shares
    assert found.levels == {"initial values": 3, "order and dropout": 2}
    expected = {"initial values": 1.0, "order and dropout": 0.0, "rest": 0.0}
    assert {name: each for name, (each, _) in found.shares.items()} == pytest.approx(
        expected, abs=1e-9
    )
    [[_, _, rows]] = [
        each for each in other_tables(make_report(tmp_path)) if each[0].startswith("Where the")
    ]
    assert rows[1][3:] == [
        *("100 %, by chance 40 % (3 seeds)", "0 %, by chance 20 % (2 seeds)"),
        "0 %, by chance 40 %",
    ]


def test_seeds_that_vary_together_are_not_told_apart(grid: Path) -> None:
    assert make_report(grid).shares == ()


@pytest.mark.parametrize(
    ("other", "named", "tests"),
    [
        ({}, "", 1),
        ({"settings": {"epochs": 10, "learning_rate": 1e-3}}, "epochs (RTE)", 1),
        ({"settings": {"metric": "f1"}}, "metric (RTE)", 1),
        ({"base_fingerprint": "b" * 8}, "weights (RTE)", 0),
        ({"data": {"dev": {"sha256": "other rows"}}}, "dev (RTE)", 0),
    ],
)
def test_methods_that_differ_in_more_than_the_method(
    tmp_path: Path, other: dict[str, Any], named: str, tests: int
) -> None:
    """Each has a learning rate of its own; another base or other rows of dev make no pair."""
    for seed in range(3):
        ours = {"base_fingerprint": "a" * 8, "settings": {"learning_rate": 1e-4}}
        for method, its in (("SPAFIT-1-3-II", ours), ("Full LoRA-II", {**ours, **other})):
            folder = tmp_path / method / str(seed)
            write_run(folder, 0.6 + 0.01 * seed, method=method, seed=seed, **its)
    report = make_report(tmp_path)
    assert len(report.comparisons) == tests
    said = "Full LoRA-II differs from SPAFIT-1-3-II in more than the method: "
    found = [note.partition(said)[2] for note in report.notes if note.startswith(said)]
    assert [note.partition(";")[0] for note in found] == [named] * bool(named)
    assert [note.endswith("there is no test") for note in found] == [not tests] * bool(named)


def test_a_rate_is_reported_whatever_else_the_reported_runs_vary(tmp_path: Path) -> None:
    for rate in (1e-4, 1e-3):
        for r in (4, 16):
            varied = {"cell": {"purpose": "choice", "settings": {"r": r}}}
            settings = {"learning_rate": rate, "epochs": 2}
            write_run(tmp_path / f"choice/{rate}/{r}", 0.6, settings=settings, **varied)
    for epochs in (3, 10):
        settings = {"learning_rate": 1e-3, "epochs": epochs}
        cell = {"settings": {"r": 16}}
        write_run(tmp_path / f"{epochs}", 0.7, settings=settings, cell=cell)
    report = make_report(tmp_path)
    assert {(each.label, each.rate): each.is_taken for each in report.choices} == {
        ("SPAFIT-1-3-II (r 4)", 1e-4): False,
        ("SPAFIT-1-3-II (r 4)", 1e-3): False,
        ("SPAFIT-1-3-II (r 16)", 1e-4): False,
        ("SPAFIT-1-3-II (r 16)", 1e-3): True,
    }


def test_choices(tmp_path: Path) -> None:
    for rate, score in ((6e-5, 0.6), (2e-4, 0.7)):
        for task in ("rte", "cola"):
            write_run(
                tmp_path / "choice" / f"{task}{rate}",
                score - (0.2 if task == "cola" else 0),
                task=task,
                seed=100,
                cell={"purpose": "choice"},
                settings={"learning_rate": rate},
            )
    write_run(tmp_path / "it", 0.7, settings={"learning_rate": 2e-4})
    report = make_report(tmp_path)
    assert report.runs == 1
    assert [(each.rate, each.is_taken) for each in report.choices] == [(6e-5, False), (2e-4, True)]
    assert report.choices[0].scores == pytest.approx({"CoLA": 0.4, "RTE": 0.6})
    assert report.choices[1].mean == pytest.approx(0.6)
    shutil.rmtree(tmp_path / "choice" / "cola6e-05")  # not run yet
    assert make_report(tmp_path).choices[0].mean is None


def test_curves(tmp_path: Path) -> None:
    for seed, score in ((0, 0.7), (1, 0.8)):
        write_run(tmp_path / str(seed), score, seed=seed)
    [curve] = make_report(tmp_path).curves["rte"]
    assert [epoch for epoch, _ in curve.points] == [1, 2, 3]
    assert [spread.mean for _, spread in curve.points] == pytest.approx([0.65, 0.75, 0.73])
    assert curve.points[0][1].deviation == pytest.approx(stats.tstd([0.6, 0.7]))


def test_a_curve_ends_where_a_seed_has_stopped(tmp_path: Path) -> None:
    """The mean of those that go on would be that of the better ones."""
    for seed, score in ((0, 0.7), (1, 0.8)):
        folder = write_run(tmp_path / str(seed), score, seed=seed)
    record = json.loads((folder / "run.json").read_text())
    record["result"]["history"].pop()
    (folder / "run.json").write_text(json.dumps(record))
    [curve] = make_report(tmp_path).curves["rte"]
    assert [(epoch, spread.n) for epoch, spread in curve.points] == [(1, 2), (2, 2)]


class TestPublished:
    """Oracle: the columns of the paper's Table 2, copied a second time, and what others publish."""

    # A column from the top: of the ten methods, in hundredths. Where the paper sets the best of the
    # nine others than full fine-tuning in bold, there is a star.
    COLUMNS: ClassVar = {
        "cola": "67 57 64* 61 62 63 62 64* 64* 63",
        "mnli": "87 82 86 86 86 86 86 86 87* 86",
        "mrpc": "91 83 91 92* 92* 92* 91 92* 92* 92*",
        "qnli": "93 88 92 92 92 93* 93* 92 92 92",
        "qqp": "89 89 90 90 90 90 90 91* 91* 90",
        "rte": "76 61 72 71 73 74 73 74 76* 73",
        "sst-2": "95 92 93* 93* 93* 93* 93* 93* 93* 93*",
        "sts-b": "90 87 88 90 90 90 90 91* 90 90",
        "wnli": "56 56* 56* 56* 56* 56* 56* 56* 56* 56*",
    }

    def test_the_paper_s_table(self) -> None:
        assert list(TABLE_2) == [
            *("Full Fine-tuning", "Full BitFit", "Full LoRA-I", "Full LoRA-II"),
            *("SPAFIT-8-12-I", "SPAFIT-8-12-II", "SPAFIT-8-16-II"),
            *("SPAFIT-4-9-I", "SPAFIT-4-9-II", "SPAFIT-4-14-II"),
        ]
        assert [millions for millions, _ in TABLE_2.values()] == [
            *(333.58, 31.52, 9.44, 12.59, 4.44, 5.88, 3.81, 5.65, 7.49, 4.89),
        ]
        assert tuple(self.COLUMNS) == TASKS == tuple(METRICS)
        for task, column in self.COLUMNS.items():
            cells = column.split()
            found = [scores[task] for _, scores in TABLE_2.values()]
            assert found == [int(cell.rstrip("*")) / 100 for cell in cells]
            best = max(found[1:])
            assert ["*" in cell for cell in cells[1:]] == [each == best for each in found[1:]]
        odd = {task: metric for task, metric in METRICS.items() if metric != "accuracy"}
        assert odd == {"cola": "matthews", "mrpc": "f1", "sts-b": "pearson"}

    def test_what_others_publish(self) -> None:
        """In thousandths, by their sources."""
        found = {
            anchor.source.split()[0].rstrip(","): {
                (task, metric): round(1000 * score)
                for task, scores in anchor.scores.items()
                for metric, score in scores.items()
            }
            for anchor in ANCHORS
        }
        assert found == {
            "github.com/ChengKang520/inhibited-lora": {
                ("cola", "matthews"): 603,
                ("rte", "accuracy"): 700,
                ("mrpc", "f1"): 893,
                ("mrpc", "accuracy"): 846,
                ("sst-2", "accuracy"): 922,
                ("qnli", "accuracy"): 920,
                ("qqp", "accuracy"): 897,
                ("qqp", "f1"): 862,
                ("mnli", "accuracy"): 856,
                ("mnli", "mismatched accuracy"): 857,
                ("sts-b", "pearson"): 901,
                ("sts-b", "spearman"): 899,
            },
            "huggingface.co/gchhablani/bert-large-cased-finetuned-cola": {
                ("cola", "matthews"): 596,
                ("wnli", "accuracy"): 352,
            },
            "NVIDIA": {("mrpc", "accuracy"): 826},
        }

    def test_stands_beside_the_same_numbers_of_parameters(self) -> None:
        assert paper_score("Full LoRA-II", "mrpc", "f1", 12_584_962) == 0.92
        assert paper_score("Full LoRA-II", "mrpc", "f1", 3_147_778) is None  # r is 16
        assert paper_score("Full LoRA-II", "mrpc", "accuracy", 12_584_962) is None
        assert paper_score("Full BitFit", "mrpc", "f1", 272_386) == 0.83
        assert paper_score("Houlsby", "mrpc", "f1", 7) is None

    def test_stands_beside_runs_of_its_base_alone(self, tmp_path: Path) -> None:
        base, method = LARGE_CASED, "SPAFIT-4-9-II"
        write_run(tmp_path / "large", 0.7, method=method, base=base, trainable=7_484_418)
        write_run(tmp_path / "small", 0.7, method="Full LoRA-II")
        report = make_report(tmp_path)
        found = {row.label: row.cells["rte"].paper for row in report.rows}
        assert found == {method: 0.76, "Full LoRA-II": None}
        [anchor] = report.anchors
        assert anchor.scores == {"rte": {"accuracy": 0.700}}

    def test_other_bases_have_none(self, grid: Path) -> None:
        assert make_report(grid).anchors == ()


def test_what_a_reader_should_know(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.7, data={"dev": {"sha256": "one"}})
    for seed in (1, 2):
        of_b = {"majority": 0.6, "data": {"dev": {"sha256": "two"}}}
        write_run(tmp_path / f"b{seed}", 0.7, seed=seed, **of_b)  # type: ignore[arg-type]
    write_run(tmp_path / "c", 0.7, task="mrpc", metrics={"f1": 0.8, "accuracy": 0.7})
    other = {"metrics": {"accuracy": 0.7}, "majority": {"accuracy": 0.6}, "history": []}
    costs = {"trainable": 5, "examples_per_s": 1.0, "peak_memory_mib": 1.0, "seconds": 1.0}
    write_run(tmp_path / "d", 0.7, task="mrpc", seed=1, result={**other, **costs})
    report = make_report(tmp_path)
    assert (
        "RTE: its runs were scored on different dev files; the majority baseline is that of most "
        "runs"
    ) in report.notes
    assert [task.majority for task in report.tasks if task.name == "rte"] == [0.6]
    assert "SPAFIT-1-3-II, MRPC: runs without f1: 1" in report.notes
    assert report.rows[0].cells["mrpc"].seeds == ("0",)

"""Finding runs, and gathering those that belong together.

Oracle: run folders written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.written_runs import LARGE_CASED, write_run

from spafit.errors import CheckpointError
from spafit.experiments.report.found import (
    NoAnswersError,
    best_of_each_task,
    find_runs,
    group,
    read_answers,
    tasks_of,
)


class TestFindRuns:
    def test_at_any_depth(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a" / "b" / "seed-0", 0.7)
        write_run(tmp_path / "seed-1", 0.6, seed=1, base=LARGE_CASED)
        (tmp_path / "seed-1" / "checkpoints" / "step-4").mkdir(parents=True)
        (tmp_path / "seed-1" / "checkpoints" / "step-4" / "run.json").write_text("{}")
        found = find_runs(tmp_path)
        assert [(run.name, run.score) for run in found.runs] == [
            ("a/b/seed-0", 0.7),
            ("seed-1", 0.6),
        ]
        assert [run.is_large_cased for run in found.runs] == [False, True]
        assert found.runs[0].history == ((1, 0.6), (2, 0.7), (3, pytest.approx(0.68)))
        assert found.left_out == ()

    def test_behind_links_once(self, tmp_path: Path) -> None:
        """A link to a folder above ends the search there."""
        run = write_run(tmp_path / "elsewhere" / "run", 0.7)
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "linked").symlink_to(run.parent)
        (tmp_path / "here" / "again").symlink_to(run)
        (run.parent / "up").symlink_to(run.parent)
        found = find_runs(tmp_path / "here")
        assert [each.name for each in found.runs] == ["again"] and found.left_out == ()

    def test_a_run_folder_itself(self, tmp_path: Path) -> None:
        [run] = find_runs(write_run(tmp_path / "run", 0.7)).runs
        assert run.name == "."

    def test_choices_are_apart(self, tmp_path: Path) -> None:
        write_run(tmp_path / "one", 0.7, cell={"purpose": "report"})
        write_run(tmp_path / "two", 0.6, cell={"purpose": "choice"})
        found = find_runs(tmp_path)
        assert [run.name for run in found.runs] == ["one"]
        assert [run.name for run in found.choices] == ["two"]

    def test_runs_of_a_search_that_choose_are_left_out(self, tmp_path: Path) -> None:
        """Their scores are those of rows of train."""
        write_run(tmp_path / "report", 0.7, cell={"purpose": "report"})
        write_run(tmp_path / "selection", 0.6, cell={"purpose": "selection"})
        found = find_runs(tmp_path)
        assert [run.name for run in found.runs] == ["report"] and not found.choices
        [(name, why)] = found.left_out
        assert name == "selection" and why.startswith("it chose a plan, by rows held out of train")

    def test_everything_else_is_named(self, tmp_path: Path) -> None:
        write_run(tmp_path / "good", 0.7)
        write_run(tmp_path / "h again", 0.9)
        for status in ("failed", "interrupted", "running"):
            write_run(tmp_path / status, 0.7, status=status, seed=1)
        write_run(tmp_path / "no result", 0.7, seed=2, result=None)
        write_run(tmp_path / "not a number", float("nan"), seed=3)
        write_run(tmp_path / "odd", 0.7, seed=4, metrics={"beauty": 1.0})
        result = json.loads((tmp_path / "good" / "run.json").read_text())["result"]
        write_run(tmp_path / "no majority", 0.7, seed=5, result={**result, "majority": {}})
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "run.json").write_text("{")
        found = find_runs(tmp_path)
        why = dict(found.left_out)
        assert [run.name for run in found.runs] == ["good"]
        assert why.keys() == {
            *("failed", "interrupted", "running", "no result", "not a number", "odd", "text"),
            "no majority",
            "h again",
        }
        assert why["failed"] == "failed, ConfigError: it was <b>"
        assert why["running"] == "running, or its process was killed"
        assert "record is damaged" in why["no result"]
        assert "cannot be read" in why["not a number"] or "damaged" in why["not a number"]
        assert "no metric is called 'beauty'" in why["odd"]
        assert why["h again"] == "the same task, method, settings and seeds as good"

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="has no run below it"):
            find_runs(tmp_path)
        with pytest.raises(CheckpointError, match="is not there; name a folder"):
            find_runs(tmp_path / "nowhere")
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="is a file; name a folder"):
            find_runs(tmp_path / "file")


def test_one_seed_under_two_names_of_the_model_is_one_run(tmp_path: Path) -> None:
    for name in ("minilm", "/models/minilm"):
        folder = tmp_path / Path(name).name / str(len(name))
        write_run(folder, 0.7, about={"model": name}, base_fingerprint="a" * 8)
    found = find_runs(tmp_path)
    assert len(found.runs) == 1
    [(_, why)] = found.left_out
    assert why.startswith("the same task, method, settings and seeds as ")
    # Without the weights' fingerprint nobody knows.
    for name in ("old", "/models/old"):
        write_run(tmp_path / f"{len(name)}", 0.7, seed=1, about={"model": name})
    assert len(find_runs(tmp_path).runs) == 3


class TestSeeds:
    def test_apart(self, tmp_path: Path) -> None:
        settings = {"order_seed": 5, "dropout_seed": None}
        write_run(tmp_path / "a", 0.7, seed=3, cell={"settings": {"init_seed": 4}})
        write_run(tmp_path / "b", 0.7, seed=3, settings=settings)
        run = write_run(tmp_path / "c", 0.7, seed=3)
        record = json.loads((run / "run.json").read_text())
        record["about"]["init_seed"] = 6
        (run / "run.json").write_text(json.dumps(record))
        seeds = [run.seeds for run in find_runs(tmp_path).runs]
        found = [(each.init, each.order, each.dropout) for each in seeds]
        assert found == [(4, 3, 3), (3, 5, 3), (6, 3, 3)]
        assert [str(each) for each in seeds] == ["4/3/3", "3/5/3", "6/3/3"]


class TestGroup:
    def labels(self, folder: Path) -> list[str]:
        return [row.label for row in group(find_runs(folder).runs)]

    def test_by_method_in_the_paper_s_order(self, tmp_path: Path) -> None:
        methods = "SPAFIT-1-10-I SPAFIT-4-9-II SPAFIT-1-3-II Mine Houlsby SPAFIT-8-12-I".split()
        methods += ["Full LoRA-II", "Full Fine-tuning", "SPAFIT-1-3-I"]
        for number, method in enumerate(methods):
            write_run(tmp_path / str(number), 0.7, method=method)
        expected = "Full Fine-tuning|Full LoRA-II|Houlsby|Mine|SPAFIT-8-12-I|SPAFIT-4-9-II|"
        expected += "SPAFIT-1-3-I|SPAFIT-1-3-II|SPAFIT-1-10-I"
        assert self.labels(tmp_path) == expected.split("|")

    def test_by_the_settings_that_differ_on_a_task(self, tmp_path: Path) -> None:
        for rate in (6e-5, 2e-3):
            for seed in (0, 1):
                settings = {"learning_rate": rate, "batch_size": 16, "out": f"{rate}/{seed}"}
                write_run(tmp_path / f"{rate}-{seed}", 0.7, seed=seed, settings=settings)
        settings = {"learning_rate": 6e-5, "batch_size": 8}  # as the paper has it, by the task
        write_run(tmp_path / "qnli", 0.7, task="qnli", settings=settings)
        write_run(tmp_path / "other", 0.7, method="Full BitFit", settings={"learning_rate": 1e-3})
        rows = group(find_runs(tmp_path).runs)
        assert [row.label for row in rows] == [
            "Full BitFit",
            "SPAFIT-1-3-II (learning_rate 6e-05)",
            "SPAFIT-1-3-II (learning_rate 0.002)",
        ]
        assert [len(row.runs["rte"]) for row in rows] == [1, 2, 2]
        assert rows[1].runs.keys() == {"rte", "qnli"}

    def test_by_the_plan_and_the_model(self, tmp_path: Path) -> None:
        """R is read from the plan, whether a grid made the run or not; nothing else repeats it."""
        for r in (4, 16, 64):
            train = {"layer.output.dense": {"lora": {"r": r, "alpha": 128.0}}}
            plan = {"name": "x", "strata": [{"name": "all", "layers": [0, 5], "train": train}]}
            cell = None if r == 4 else {"settings": {"r": r}}
            write_run(tmp_path / f"r-{r}", 0.7, plan=plan, cell=cell)
        names = [f"SPAFIT-1-3-II (r {r})" for r in (4, 16, 64)]
        assert self.labels(tmp_path) == names
        write_run(tmp_path / "x", 0.7, method="Mine", base_fingerprint="abcdefgh")
        write_run(tmp_path / "y", 0.7, method="Mine", base_fingerprint="ijklmnop")
        assert self.labels(tmp_path)[:2] == ["Mine (weights abcdef)", "Mine (weights ijklmn)"]

    def test_not_by_a_folder_s_name_or_what_an_older_record_lacks(self, tmp_path: Path) -> None:
        """The weights are the same; label smoothing had its default before it was a setting."""
        for seed, settings in enumerate(({}, {"label_smoothing": 0.0, "dropout_in_group_1": True})):
            run = write_run(
                tmp_path / str(seed),
                0.7,
                seed=seed,
                base_fingerprint="abcdefgh",
                settings={**settings, "device": f"cuda:{seed}", "out": str(seed)},
            )
            record = json.loads((run / "run.json").read_text())
            record["about"]["model"] = f"/home/{seed}/model"
            if seed == 0:
                record["settings"]["frozen_dropout"] = True
            (run / "run.json").write_text(json.dumps(record))
        assert self.labels(tmp_path) == ["SPAFIT-1-3-II"]
        for seed in (0, 1):
            path = tmp_path / str(seed) / "run.json"
            record = json.loads(path.read_text())
            record["base_fingerprint"] = f"{seed}bcdefgh"
            path.write_text(json.dumps(record))
        assert self.labels(tmp_path) == [
            *("SPAFIT-1-3-II (model /home/0/model)", "SPAFIT-1-3-II (model /home/1/model)"),
        ]

    def test_two_plans_of_one_name_are_not_mixed(self, tmp_path: Path) -> None:
        for last in (4, 5):
            plan = {"name": "x", "strata": [{"layers": [0, last], "train": {}}]}
            write_run(tmp_path / str(last), 0.7, plan=plan)
        labels = self.labels(tmp_path)
        assert len(labels) == 2 and all(each.startswith("SPAFIT-1-3-II (plan ") for each in labels)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("train", {"data": {"train": {"sha256": "b"}, "dev": {"sha256": "of rte"}}}),
            ("dev", {"data": {"train": {"sha256": "a"}, "dev": {"sha256": "other"}}}),
            ("started_from", {"about": {"model": "minilm", "started_from": "0123456789"}}),
            ("definition", {"definition": {"name": "rte", "fields": ["a", "b"]}}),
            ("labels", {"labels": ["no", "yes"]}),
            ("loss", {"loss": "my.loss"}),
            ("tokenizer", {"tokenizer_fingerprint": "0123456789"}),
            ("frozen_by_user", {"frozen_by_user": ["classifier.bias"]}),
            ("base_config", {"base_config": {"hidden_size": 384, "hidden_act": "relu"}}),
        ],
    )
    def test_by_all_that_identifies_a_run(
        self, tmp_path: Path, name: str, change: dict[str, object]
    ) -> None:
        """It is no repetition of another one, nor the same run."""
        data = {"train": {"sha256": "a"}, "dev": {"sha256": "of rte"}}
        for seed in (0, 1):
            write_run(tmp_path / f"a{seed}", 0.7, seed=seed, data=data)
        write_run(tmp_path / "b", 0.6, **{"data": data, **change})  # type: ignore[arg-type]
        found = find_runs(tmp_path)
        assert found.left_out == ()
        rows = {row.label: [run.name for run in row.every()] for row in group(found.runs)}
        [other] = [label for label, names in rows.items() if names == ["b"]]
        assert other.startswith(f"SPAFIT-1-3-II ({name} ") and ["a0", "a1"] in rows.values()

    def test_data_divide_their_own_task_alone(self, tmp_path: Path) -> None:
        for task, digests in (("rte", "ab"), ("mrpc", "c"), ("cola", "d")):
            for digest in digests:
                data = {"train": {"sha256": digest}, "dev": {"sha256": task}}
                write_run(tmp_path / f"{task}-{digest}", 0.7, task=task, data=data)
        rows = {row.label: list(row.runs) for row in group(find_runs(tmp_path).runs)}
        assert rows.pop("SPAFIT-1-3-II") == ["cola", "mrpc"]
        assert list(rows.values()) == [["rte"], ["rte"]]
        assert all(label.startswith("SPAFIT-1-3-II (train ") for label in rows)

    def test_what_a_record_lacks_is_not_in_a_label(self, tmp_path: Path) -> None:
        for bias in ("delta", "plain", None):
            cell = None if bias is None else {"settings": {"bias": bias}}
            write_run(tmp_path / str(bias), 0.7, method="Full BitFit", cell=cell)
        assert sorted(self.labels(tmp_path)) == [
            *("Full BitFit", "Full BitFit (bias delta)", "Full BitFit (bias plain)"),
        ]

    def test_tasks_are_in_the_paper_s_order(self, tmp_path: Path) -> None:
        names = "wnli tickets sts-b sst-2 rte qqp qnli mrpc mnli cola".split()
        for name in names:
            metrics = {"accuracy": 0.7}
            write_run(tmp_path / name, 0.7, task=name, metrics=metrics)
        expected = "cola mnli mrpc qnli qqp rte sst-2 sts-b wnli tickets".split()
        assert tasks_of(find_runs(tmp_path).runs) == expected


class TestAnswers:
    def test_are_read(self, tmp_path: Path) -> None:
        write_run(tmp_path / "run", 0.7, answers=[("a b", "c"), (1.5, 1.25)])
        [run] = find_runs(tmp_path).runs
        assert read_answers(run) == [("0", "a b", "c"), ("1", "1.5", "1.25")]

    @pytest.mark.parametrize("text", ["", "index\tlabel\n", "a\tb\tc\n0\tx\ty\n", "\xff"])
    def test_are_refused(self, tmp_path: Path, text: str) -> None:
        write_run(tmp_path / "run", 0.7)
        [run] = find_runs(tmp_path).runs
        with pytest.raises(NoAnswersError, match="no readable"):
            read_answers(run)
        (run.folder / "dev.tsv").write_bytes(text.encode("latin-1"))
        with pytest.raises(NoAnswersError):
            read_answers(run)
        head = "index\tlabel\tprediction\n"
        for body in ("0\tx\n", "0\tx\ty", ""):
            (run.folder / "dev.tsv").write_text(head + body)
            with pytest.raises(NoAnswersError, match="not a table of answers"):
                read_answers(run)


def test_the_best_of_each_task(tmp_path: Path) -> None:
    """By the task's first metric, whatever the run was chosen by; only with an adapter."""
    for seed, (accuracy, f1) in enumerate([(0.9, 0.7), (0.8, 0.8), (0.7, 0.9)]):
        metrics = {"f1": f1, "accuracy": accuracy}
        write_run(tmp_path / f"{seed}", f1, task="mrpc", seed=seed, metrics=metrics)
    (tmp_path / "2" / "adapter.safetensors").unlink()
    write_run(tmp_path / "own", 0.99, task="tickets")
    best = best_of_each_task(find_runs(tmp_path).runs)
    assert {task: run.name for task, run in best.items()} == {"mrpc": "1"}

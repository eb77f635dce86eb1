"""``spafit predict`` with several runs at once.

Oracle: the same command with one run after the other.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command_line import Capture, call, table
from support.small_runs import SmallRun, make_dataset, write_glue

from spafit.cli import main, predicting, trained
from spafit.runs import progress
from spafit.training.inference import Predictions
from weights_tools.tiny import make_tiny

KINDS, TONES = ("billing", "bug", "praise"), ("calm", "upset")


@pytest.fixture(scope="module")
def folder(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train runs of different tasks, methods, lengths and seeds on the columns of one table."""
    folder = tmp_path_factory.mktemp("many")
    with (folder / "mail.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "reply", "kind", "tone", "stars"])
        for row, each in enumerate(make_dataset("rte", 20, seed=7).examples):
            labels = [KINDS[row % 3], TONES[row // 2 % 2], row % 6 + row % 4]
            writer.writerow([f"T-{row}", each.text_a, each.text_b, *labels])
    write_glue(folder / "glue")
    make_tiny(folder / "another", seed=5)
    usual = "--epochs 1 --batch-size 6 --learning-rate 1e-2 --device cpu --quiet --dev mail.csv"
    for out, options in (
        ("kind", "--label kind --method SPAFIT-0-1-II --r 3"),
        ("tone", "--label tone --method full --max-length 9"),
        ("stars", "--label stars --regression --method bitfit"),
        ("seeds", "--label tone --method bitfit --seeds 1 2"),
        ("more/kind", "--label kind --method linear-probe"),
        ("agree", "--label tone --text2 reply --method lora-i --r 3"),
        ("split", "--label tone --method bitfit --split-special-tokens"),
        ("reply", "--text reply --label tone --method bitfit"),
        ("based", "--label tone --method bitfit"),
    ):
        base = folder / "another" if out == "based" else small.folder
        words = f"train --data mail.csv {usual} {options} --model {base} --out runs/{out}"
        words = words.replace("mail.csv", str(folder / "mail.csv"))
        assert main(words.replace("runs/", f"{folder}/runs/").split()) == 0
    words = f"train --task rte --data {folder}/glue --model {small.folder} --method SPAFIT-0-1-II"
    words += f" --epochs 1 --max-length 16 --device cpu --quiet --out {folder}/runs/rte"
    assert main(words.split()) == 0
    return folder


class TestSameAsOneAfterTheOther:
    @pytest.mark.parametrize("form", ["tsv", "csv", "jsonl"])
    def test_files(self, capsys: Capture, folder: Path, tmp_path: Path, form: str) -> None:
        names = ["kind", "stars", "tone"]
        runs = [folder / "runs" / name for name in names]

        def predicted(*runs: Path) -> list[dict[str, Any]]:
            out = tmp_path / f"{len(runs)}.{form}"
            given = ["predict", *runs, "--input", folder / "mail.csv", "--output", out]
            assert call(capsys, *given) == (0, f"written: {out} (20 predictions)\n", "")
            if form == "jsonl":
                return [json.loads(line) for line in out.read_text().splitlines()]
            return table(out.read_text(), "," if form == "csv" else "\t")

        alone = [predicted(run) for run in runs]
        together = predicted(*runs)
        assert list(together[0]) == ["id", "reply", "tone (2)", "stars (2)", *names]
        for row, found in enumerate(together):
            assert found["id"] == alone[0][row]["id"]
            assert found["kind"] == alone[0][row]["prediction"]
            assert found["tone"] == alone[2][row]["prediction"]
            score = float(alone[1][row]["prediction"])
            assert float(found["stars"]) == pytest.approx(score, abs=1e-4)
        assert len({row["stars"] for row in together}) > 10

    def test_progress_moves_by_batches(
        self, capsys: Capture, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By a clock on which each batch takes 20 s; two runs of other lengths share the rows."""
        data, out = tmp_path / "many.csv", tmp_path / "out.csv"
        data.write_text("text\n" + "it crashes\n" * 70)
        kind, tone = (folder / "runs" / name for name in ("kind", "tone"))
        shown = ["64 rows", "70 rows"]

        def lines(*given: str | Path) -> list[str]:
            ticks = itertools.count(step=20.0)
            clock = SimpleNamespace(perf_counter=lambda: next(ticks))
            monkeypatch.setattr(progress, "time", clock)
            code, _, err = call(capsys, "predict", *given, "--input", data)
            assert code == 0
            return [line.partition(",")[0] for line in err.splitlines()]

        assert lines(kind, tone, "--output", out) == ["32 rows", "35 rows", "67 rows", "70 rows"]
        assert lines(kind) == shown  # the answers go to a pipe
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert lines(kind, "--output", out) == shown
        assert lines(kind) == []

    def test_probabilities(self, capsys: Capture, folder: Path) -> None:
        runs = [folder / "runs" / name for name in ("tone", "kind")]
        more = ("--input", folder / "mail.csv", "--probabilities")
        code, out, err = call(capsys, "predict", *runs, *more)
        assert (code, err) == (0, "")
        alone = [table(call(capsys, "predict", run, *more)[1]) for run in runs]
        header = ["tone", *(f"tone_p_{each}" for each in TONES)]
        header += ["kind", *(f"kind_p_{each}" for each in KINDS)]
        assert list(table(out)[0])[-7:] == header
        for row, found in enumerate(table(out)):
            for name, labels, one in (("tone", TONES, alone[0]), ("kind", KINDS, alone[1])):
                assert found[name] == one[row]["prediction"]
                for label in labels:
                    sure = float(one[row][f"p_{label}"])
                    assert float(found[f"{name}_p_{label}"]) == pytest.approx(sure, abs=2e-5)

    def test_a_task_of_glue(self, capsys: Capture, folder: Path, tmp_path: Path) -> None:
        """And the same name of two folders."""
        (tmp_path / "rte").symlink_to(folder / "runs" / "rte", target_is_directory=True)
        words = f"train --task rte --data {folder}/glue --method bitfit --epochs 1 --max-length 16"
        about = json.loads((folder / "runs" / "rte" / "run.json").read_text())["about"]
        words += f" --device cpu --quiet --model {about['model']} --out {tmp_path}/runs/rte"
        assert main(words.split()) == 0
        runs = folder / "runs" / "rte", tmp_path / "runs" / "rte"
        dev = folder / "glue" / "RTE" / "dev.tsv"
        rows = table(call(capsys, "predict", *runs, "--input", dev)[1])
        names = [f"{folder.name}/runs/rte", f"{tmp_path.name}/runs/rte"]
        assert list(rows[0]) == ["index", *names]
        for name, run in zip(names, runs, strict=True):
            alone = table(call(capsys, "predict", run, "--input", dev)[1])
            assert [row[name] for row in rows] == [row["prediction"] for row in alone]

    def test_texts_and_a_stream(
        self, capsys: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs = [folder / "runs" / "kind", folder / "runs" / "more" / "kind"]
        code, out, _ = call(capsys, "predict", *runs, "--text", "it crashes", "my bill")
        assert code == 0
        assert list(table(out)[0]) == ["row", "runs/kind", "more/kind"]
        for name, run in zip(("runs/kind", "more/kind"), runs, strict=True):
            alone = table(call(capsys, "predict", run, "--text", "it crashes", "my bill")[1])
            assert [row[name] for row in table(out)] == [row["prediction"] for row in alone]
        whole = call(capsys, "predict", *runs, "--input", folder / "mail.csv")
        monkeypatch.setattr(predicting, "_CHUNK", 7)

        class Stdin:
            buffer = io.BufferedReader(io.BytesIO((folder / "mail.csv").read_bytes()))  # type: ignore[arg-type]

        monkeypatch.setattr(sys, "stdin", Stdin)
        assert call(capsys, "predict", *runs, "--input", "-") == whole

    def test_pairs_of_columns_with_other_names(self, capsys: Capture, folder: Path) -> None:
        runs = [folder / "runs" / name for name in ("agree", "rte")]
        texts = ("--text", "a cat sees", "dog", "--text2", "the child", "cat")
        rows = table(call(capsys, "predict", *runs, *texts)[1])
        for name, run in zip(("agree", "rte"), runs, strict=True):
            alone = table(call(capsys, "predict", run, *texts)[1])
            assert [row[name] for row in rows] == [row["prediction"] for row in alone]

    def test_seeds(self, capsys: Capture, folder: Path) -> None:
        """The best of them, or the mean of their probabilities."""
        seeds, tone = folder / "runs" / "seeds", folder / "runs" / "tone"
        more = ("--text", "it crashes", "--probabilities")
        best = json.loads((seeds / "summary.json").read_text())["best"]
        code, out, err = call(capsys, "predict", tone, seeds, *more)
        assert (code, err) == (0, f"{seeds}: the best of 2 seeds, {best}\n")
        [alone] = table(call(capsys, "predict", seeds / best, *more)[1])
        assert table(out)[0]["seeds"] == alone["prediction"]
        again = folder / "runs" / "again"
        again.mkdir()
        members = [f"../{each}" for each in ("tone", "reply")]
        (again / "summary.json").write_text(json.dumps({"runs": members, "best": "../tone"}))
        [row] = table(call(capsys, "predict", seeds, again, *more, "--average")[1])
        every = [
            table(call(capsys, "predict", seeds / f"seed-{seed}", *more)[1])[0] for seed in (1, 2)
        ]
        mean = statistics.mean(float(each["p_calm"]) for each in every)
        assert float(row["seeds_p_calm"]) == pytest.approx(mean, abs=1e-5)


class TestWhatIsShared:
    def test_one_base_and_a_pass_for_each_length(
        self, capsys: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Oracle: what is loaded and called."""
        loaded, passes = [], []
        load, together = trained.load_pretrained, trained.predict_all

        def loading(*arguments: Any, **settings: Any) -> Any:
            loaded.append(arguments)
            return load(*arguments, **settings)

        def passing(*arguments: Any, **settings: Any) -> dict[str, Predictions]:
            found = together(*arguments, **settings)
            passes.append((settings["max_length"], [Path(each).name for each in found]))
            return found

        monkeypatch.setattr(trained, "load_pretrained", loading)
        monkeypatch.setattr(trained, "predict_all", passing)
        runs = [folder / "runs" / name for name in ("kind", "tone", "stars")]
        assert call(capsys, "predict", *runs, "--input", folder / "mail.csv")[0] == 0
        assert len(loaded) == 1
        assert passes == [(53, ["kind", "stars"]), (9, ["tone"])]

    def test_seeds_that_are_averaged_share_theirs(
        self, capsys: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Oracle: the scores of one run, which is averaged with itself."""
        loaded, load = [], trained.load_pretrained

        def loading(*arguments: Any, **settings: Any) -> Any:
            loaded.append(arguments)
            return load(*arguments, **settings)

        monkeypatch.setattr(trained, "load_pretrained", loading)
        twice = folder / "runs" / "twice"
        twice.mkdir()
        shutil.copytree(folder / "runs" / "tone", twice / "b")
        summary = {"runs": ["../tone", "b"], "best": "b"}
        (twice / "summary.json").write_text(json.dumps(summary))
        code, out, _ = call(capsys, "eval", twice, "--average")
        assert (code, len(loaded)) == (0, 1)
        alone = call(capsys, "eval", twice / "b")[1]
        assert out.partition("mistakes")[0] == alone.partition("mistakes")[0]
        [row] = table(call(capsys, "predict", twice, "--average", "--text", "my bill")[1])
        assert list(row) == ["row", "prediction"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("runs", "more", "said"),
        [
            ("kind based", "--text x", "kind and {}/based do not have the same base; predict"),
            ("kind split", "--text x", "kind and {}/split do not have the same tokenizer; pred"),
            ("kind agree", "--text x", "kind and {}/agree do not have the same number of texts"),
            ("kind kind", "--text x", "{}/kind is named twice"),
            ("kind ../runs/kind", "--text x", "{}/../runs/kind is named twice"),
            ("seeds/seed-1 seeds/seed-2", "--text x --average", "is one run; --average is for a f"),
            ("kind stars", "--text x --probabilities", "mail has scores, which have no --probabil"),
            ("kind tone", "--text x --text2 y", "mail needs one text: leave out --text2"),
            ("kind reply", "--input mail.csv", "(text; reply); predict with one after the other"),
            ("rte agree", "--input mail.csv", "(sentence1, sentence2; text, reply); predict with"),
            ("kind nowhere", "--text x", "{}/nowhere is not there; name the folder of a run"),
            ("rte kind", "--submission new", "--submission is for one run; give one after the ot"),
        ],
    )
    def test_runs(self, capsys: Capture, folder: Path, runs: str, more: str, said: str) -> None:
        given = [f"{folder}/runs/{name}" for name in runs.split()]
        more = more.replace("mail.csv", str(folder / "mail.csv"))
        code, out, err = call(capsys, "predict", *given, *more.split())
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("spafit: ")
        assert err.count("\n") == 1
        assert said.replace("{}", f"{folder}/runs") in err

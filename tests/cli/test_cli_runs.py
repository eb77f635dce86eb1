"""Train, evaluate and predict from the command line, on a small model and real formats."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import Capture, call
from support.interruptions import differences, everything
from support.small_runs import N_DEV, N, SmallRun, loss_failing_from, make_dataset, write_glue

import spafit
import spafit.training.fit
import spafit.training.step
from spafit import glue
from spafit.cli import evaluating, main, trained, training
from spafit.errors import ConfigError
from spafit.tasks.own_files import TableForm
from spafit.training.inference import Predictor
from spafit.weights.safefile import SafeFile, save_tensors
from weights_tools.tiny import make_tiny


def train_arguments(small: SmallRun, root: Path, *more: str) -> list[str]:
    """Return the arguments of a small run, at whose end more may stand."""
    settings = "--task rte --method SPAFIT-0-1-II --r 5 --epochs 2 --batch-size 6 --max-length 16"
    places = ["--model", str(small.folder), "--data", str(root / "glue")]
    return ["train", *settings.split(), "--learning-rate=1e-2", "--device=cpu", *places, *more]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with GLUE's RTE in small, its test file of full size."""
    root = tmp_path_factory.mktemp("root")
    write_glue(root / "glue", test_rows=3000)
    return root


@pytest.fixture(scope="module")
def process(small: SmallRun, root: Path) -> subprocess.CompletedProcess[str]:
    """Train once, in a process of its own, as a user does."""
    arguments = train_arguments(small, root, "--out", "runs/rte", "--seed", "1")
    command = [sys.executable, "-m", "spafit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


@pytest.fixture
def run(process: subprocess.CompletedProcess[str], root: Path) -> Path:
    """Return the run folder, which tests only read."""
    assert process.returncode == 0, process.stderr
    return root / "runs" / "rte"


def record_of(run: Path) -> dict[str, Any]:
    record = json.loads((run / "run.json").read_text())
    assert isinstance(record, dict)
    return record


def refuse(capsys: Capture, *arguments: str | Path) -> str:
    """Expect exit code 2 and one line."""
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert len([line for line in err.splitlines() if not line.startswith("spafit: note: ")]) == 1
    return err


def config_with(**settings: Any) -> Callable[[Path], None]:
    """Return a function that changes settings of a folder's config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


def of_lower_case(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')


def two_words_exchanged(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    words = (folder / "vocab.txt").read_text().splitlines()
    cat, dog = words.index("cat"), words.index("dog")
    words[cat], words[dog] = words[dog], words[cat]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


class TestTrain:
    """Oracle: run.json, and the same run in this process."""

    def test_one_screen(self, process: subprocess.CompletedProcess[str], run: Path) -> None:
        result = record_of(run)["result"]
        majority, cut = result["majority"]["accuracy"], result["truncated"]
        screen = process.stdout[process.stdout.index("\n      task") :]
        for line in (
            "      task  RTE, SPAFIT-0-1-II",
            f"       dev  accuracy {result['metrics']['accuracy']:.4f}   "
            f"(always the commonest class: {majority:.4f})",
            f"      best  epoch {result['best_epoch']}, step {result['best_step']}",
            f"   trained  {result['trainable']:,} numbers, {result['percent']:.2f} % of the model",
            f" truncated  {cut['train']} of train, {cut['dev']} of dev",
            "   written  runs/rte/adapter.safetensors",
            "            runs/rte/dev.tsv",
            "            runs/rte/log.jsonl",
            "            runs/rte/run.json",
        ):
            assert f"\n{line}" in screen, screen
        assert re.search(r"\n     speed  \d+\.\d examples/s in training, \d+ s\n", screen)
        assert re.search(r"\n    memory  [\d,]+ MiB at the peak\n", screen)
        assert process.stdout.startswith("loaded 71 tensors")
        assert "│ group 3" in process.stdout
        assert "step 10/10, epoch 2" in process.stderr
        assert "Traceback" not in process.stderr

    def test_is_the_run_of_the_python_interface(
        self, small: SmallRun, root: Path, run: Path
    ) -> None:
        """Bit for bit: the loss of every step."""
        model = spafit.load_pretrained(small.folder, num_labels=2, seed=1)
        spafit.adapt(model, spafit.plan("SPAFIT-0-1-II", 4, r=5), seed=1)
        train, dev = (glue.load("rte", split, root / "glue") for split in ("train", "dev"))
        config = spafit.TrainConfig(
            seed=1,
            epochs=2,
            batch_size=6,
            learning_rate=1e-2,
            max_length=16,
            device="cpu",
            quiet=True,
        )
        result = spafit.fit(model, small.tokenizer, train, dev, config)
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert tuple(row["loss"] for row in rows if "loss" in row) == result.losses

    def test_a_hub_name_is_asked_for_again_as_it_was_given(
        self,
        capsys: Capture,
        small: SmallRun,
        root: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The commit is recorded beside it; the pin makes it the same one offline."""
        asked = []

        def from_hub(load: Any) -> Any:
            def instead(name: str, *, revision: str | None = None, **settings: Any) -> Any:
                asked.append((name, revision))
                return load(small.folder, **settings)

            return instead

        for module in (training, trained):
            monkeypatch.setattr(module, "load_pretrained", from_hub(spafit.load_pretrained))
            monkeypatch.setattr(module, "load_tokenizer", from_hub(spafit.load_tokenizer))
        monkeypatch.setattr(training, "local_folder", from_hub(lambda *_, **__: small.folder))
        monkeypatch.setattr("spafit.runs.record.pinned_revision", lambda *_: "c" * 40)
        for number, revision in enumerate((["--revision", "v2"], [])):
            name = "owner/bert" if revision else "owner/bert@v1"
            out = tmp_path / str(number)
            arguments = train_arguments(small, root, "--out", str(out), "--quiet", *revision)
            assert call(capsys, *arguments, "--model", name, "--epochs", "1")[0] == 0
            assert call(capsys, "eval", out)[0] == 0
            assert set(asked) == {(name, "v2" if revision else None)}
            assert len(asked) == 5
            about = record_of(out)["about"]
            assert (about["model"], about["commit"]) == (name, "c" * 40)
            asked.clear()

    def test_what_is_recorded_to_find_everything_again(
        self, small: SmallRun, root: Path, run: Path
    ) -> None:
        about = record_of(run)["about"]
        assert about["model"] == str(small.folder)
        assert about["data"] == str(root / "glue")
        assert about["revision"] is None

    def test_seeds_apart(
        self, capsys: Capture, small: SmallRun, root: Path, tmp_path: Path
    ) -> None:
        """Oracle: the losses of the first epoch, of the Python interface with these seeds."""
        out = tmp_path / "apart"
        seeds = ["--seed", "1", "--order-seed", "2", "--dropout-seed", "3", "--init-seed", "4"]
        arguments = train_arguments(small, root, "--out", str(out), "--quiet", "--epochs", "1")
        assert call(capsys, *arguments, *seeds)[0] == 0
        model = spafit.load_pretrained(small.folder, num_labels=2, seed=4)
        spafit.adapt(model, spafit.plan("SPAFIT-0-1-II", 4, r=5), seed=4)
        train, dev = (glue.load("rte", split, root / "glue") for split in ("train", "dev"))
        config = spafit.TrainConfig(
            seed=0, order_seed=2, dropout_seed=3, epochs=1, batch_size=6, learning_rate=1e-2,
            max_length=16, device="cpu", quiet=True,
        )  # fmt: skip
        result = spafit.fit(model, small.tokenizer, train, dev, config)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert tuple(row["loss"] for row in rows if "loss" in row) == result.losses
        record = record_of(out)
        assert record["about"]["init_seed"] == 4
        assert record["settings"]["order_seed"] == 2 and record["settings"]["dropout_seed"] == 3
        assert "init_seed is 4, asked for is 5" in refuse(capsys, *arguments, *seeds[:-1], "5")

    def test_started_from_a_run(
        self,
        capsys: Capture,
        small: SmallRun,
        root: Path,
        run: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Oracle: the values and the logits of the run that it begins with."""
        out = ["--out", str(tmp_path / "next"), "--quiet", "--learning-rate", "1e-30"]
        arguments = train_arguments(small, root, *out, "--start-from", str(run))
        assert call(capsys, *arguments)[0] == 0
        tensors = [load_file(folder / "adapter.safetensors") for folder in (run, tmp_path / "next")]
        assert tensors[0].keys() == tensors[1].keys()
        for name, value in tensors[0].items():
            assert torch.equal(tensors[1][name], value)
        digest = hashlib.sha256((run / "adapter.safetensors").read_bytes()).hexdigest()
        assert record_of(tmp_path / "next")["about"]["started_from"] == digest
        said = refuse(capsys, *train_arguments(small, root, *out))
        assert f"started_from is '{digest}', asked for is None" in said
        with monkeypatch.context() as patched:  # before the weights are read
            patched.setattr(training, "load_pretrained", None)
            said = refuse(capsys, *arguments, "--out", str(tmp_path / "x"), "--method", "bitfit")
        assert "is not the same plan; give its --method" in said
        seeds = tmp_path / "seeds"
        seeds.mkdir()
        (seeds / "summary.json").write_text('{"runs": ["a", "b"], "best": "b"}', encoding="utf-8")
        shutil.copytree(run, seeds / "b")
        model = spafit.load_pretrained(small.folder, num_labels=2)
        spafit.load_adapter(model, run / "adapter.safetensors")
        assert model.adaptation is not None and model.adaptation.labels is not None
        model.adaptation.labels = model.adaptation.labels[::-1]  # a head with another order
        spafit.save_adapter(model, seeds / "b" / "adapter.safetensors")
        out[1] = str(tmp_path / "best")
        best = train_arguments(small, root, *out, "--start-from", str(seeds), "--seeds", "1", "2")
        code, _, err = call(capsys, *best)
        assert (code, err) == (0, f"{seeds}: the best of 2 seeds, b\n")
        for seed in (1, 2):
            found = load_file(tmp_path / "best" / f"seed-{seed}" / "adapter.safetensors")
            assert torch.equal(found["classifier.weight"], tensors[0]["classifier.weight"])
        nowhere = train_arguments(small, root, "--start-from", str(tmp_path))
        assert str(tmp_path / "adapter.safetensors") in refuse(capsys, *nowhere)

    def test_several_seeds(self, capsys: Capture, small: SmallRun, root: Path) -> None:
        out = root / "runs" / "seeds"
        arguments = train_arguments(small, root, "--out", str(out), "--quiet", "--epochs", "1")
        code, text, err = call(capsys, *arguments, "--seeds", "4", "0", "7")
        assert (code, err) == (0, "")
        records = [record_of(out / f"seed-{seed}") for seed in (4, 0, 7)]
        assert [record["settings"]["seed"] for record in records] == [4, 0, 7]
        assert text.count("numbers train (") == 1  # the plan is drawn once
        assert text.count("      task  RTE") == 3
        scores = [record["result"]["metrics"]["accuracy"] for record in records]
        assert text.partition("\nwritten: ")[0].endswith(
            "\n3 seeds (4, 0, 7)\n"
            f"  accuracy  mean {statistics.mean(scores):.4f}, standard deviation "
            f"{statistics.stdev(scores):.4f}, maximum {max(scores):.4f}\n"
            "            (always the commonest class: 0.5455)\n"
        )
        heads = {(out / f"seed-{seed}" / "adapter.safetensors").read_bytes() for seed in (4, 0, 7)}
        assert len(heads) == 3

    def test_seeds_together(
        self, capsys: Capture, small: SmallRun, root: Path, tmp_path: Path, computed: list[int]
    ) -> None:
        """Oracle: the same seeds one after the other, with their own hidden states in memory."""
        frozen = ["--no-dropout-in-group-1", "--quiet", "--epochs", "1", "--seeds", "4", "0"]
        screens = []
        for name, more, times in (
            ("own", ["--cache-prefix", "memory"], 2),
            ("", ["--together"], 1),
        ):
            arguments = train_arguments(small, root, "--out", str(tmp_path / f"runs{name}"))
            computed.clear()
            code, text, err = call(capsys, *arguments, *frozen, *more)
            assert (code, err) == (0, "")
            assert sum(computed) == times * (N + N_DEV)
            screens.append(re.sub(r"\n +(speed|memory) .*", "", text.replace("runsown", "runs")))
        once = "\n\ngroup 1 is computed once for all 2 seeds\n"
        assert once in screens[1]
        assert screens[1].replace(once, "\n") == screens[0]
        for seed in (4, 0):
            own, ours = (tmp_path / name / f"seed-{seed}" for name in ("runsown", "runs"))
            assert differences(everything(ours), everything(own)) == []

    def test_seeds_that_cannot_be_trained_together(
        self, capsys: Capture, small: SmallRun, root: Path, tmp_path: Path
    ) -> None:
        arguments = train_arguments(small, root, "--out", str(tmp_path / "runs"), "--together")
        assert "--together is for several seeds" in refuse(capsys, *arguments, "--seeds", "4")
        arguments += ["--seeds", "4", "0"]
        assert "(--no-dropout-in-group-1)" in refuse(capsys, *arguments)
        assert "no frozen layers" in refuse(capsys, *arguments, "--method", "bitfit")
        arguments += ["--no-dropout-in-group-1"]
        assert "leave out cache_prefix" in refuse(capsys, *arguments, "--cache-prefix", "off")
        assert not list((tmp_path / "runs").rglob("*.*"))

    def test_a_run_that_is_there_stops_all_seeds_before_the_first(
        self, capsys: Capture, small: SmallRun, root: Path, tmp_path: Path
    ) -> None:
        """One of another task or seed, or damaged; with ``--overwrite`` it is replaced."""
        there = tmp_path / "out" / "seed-2"
        there.mkdir(parents=True)
        arguments = train_arguments(small, root, "--out", str(tmp_path / "out"))
        arguments += ["--seeds", "1", "2", "--quiet", "--epochs", "1"]
        for record, named in (
            ("{}", "task is None, asked for is 'rte'; seed is None, asked for is 2"),
            ('{"task": "rte", "settings": {"seed": 1}}', "seed is 1, asked for is 2"),
            ('{"task": "cola", "settings": {"seed": 2}}', "task is 'cola', asked for is 'rte'"),
            ('{"task": "rte", "settings": []}', "seed is None, asked for is 2"),
            (
                '{"task": "rte", "settings": {"seed": 2, "max_length": 9, "epochs": 7}}',
                "max_length is 9, asked for is 16",
            ),
        ):
            (there / "run.json").write_text(record)
            assert f"seed-2 holds another run: {named}. Give" in refuse(capsys, *arguments)
            assert [path.name for path in (tmp_path / "out").iterdir()] == ["seed-2"]
            assert [path.name for path in there.iterdir()] == ["run.json"]
            assert (there / "run.json").read_text() == record
        (there / "run.json").write_text("{")
        assert "run.json cannot be read" in refuse(capsys, *arguments)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["seed-2"]
        assert call(capsys, *arguments, "--overwrite")[0] == 0
        assert record_of(there)["result"]["best_step"] == 5

    def test_seeds_that_are_finished_are_not_trained_again(
        self, capsys: Capture, small: SmallRun, root: Path, tmp_path: Path
    ) -> None:
        """The screens are those of the first time, but for the memory and the seconds."""

        def screens(*seeds: str) -> list[str]:
            code, text, err = call(capsys, *arguments, "--seeds", *seeds)
            assert (code, err) == (0, "")
            lines = re.split(r"\n\d seeds ", text)[0].splitlines()
            return [line for line in lines if not re.match(r" +(speed|memory) ", line)]

        arguments = train_arguments(small, root, "--out", str(tmp_path), "--quiet", "--epochs", "1")
        both = screens("4", "0")
        logs = {seed: (tmp_path / f"seed-{seed}" / "log.jsonl").read_text() for seed in (4, 0)}
        three = screens("4", "0", "7")
        assert three[: len(both)] == both
        assert len(three) > len(both)
        for seed, log in logs.items():
            after = (tmp_path / f"seed-{seed}" / "log.jsonl").read_text()
            (note,) = after.removeprefix(log).splitlines()
            assert "finished already after step 5" in note
        assert len(record_of(tmp_path / "seed-7")["result"]["history"]) == 1

    def test_overwrite(self, capsys: Capture, small: SmallRun, root: Path, tmp_path: Path) -> None:
        arguments = train_arguments(small, root, "--out", str(tmp_path), "--quiet", "--epochs", "1")
        assert call(capsys, *arguments)[0] == 0
        assert "(--overwrite)" in refuse(capsys, *arguments, "--seed", "1")
        assert record_of(tmp_path)["settings"]["seed"] == 0
        assert call(capsys, *arguments, "--seed", "1", "--overwrite")[0] == 0
        assert record_of(tmp_path)["settings"]["seed"] == 1

    @pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "a\u202eb"])
    def test_a_folder_whose_name_does_not_print(
        self, capsys: Capture, small: SmallRun, root: Path, tmp_path: Path, name: str
    ) -> None:
        """One that is there may have any name; what is shown of it is one line that prints."""
        out = tmp_path / name
        out.mkdir()
        arguments = train_arguments(small, root, "--quiet", "--epochs", "1", "--out", str(out))
        code, text, _ = call(capsys, *arguments)
        assert code == 0
        assert "\n   written  " in text
        assert all(line.isprintable() for line in text.splitlines())
        assert (out / "adapter.safetensors").is_file()

    def test_without_out_nothing_is_written(
        self,
        capsys: Capture,
        small: SmallRun,
        root: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code, text, _ = call(capsys, *train_arguments(small, root, "--quiet", "--epochs", "1"))
        assert code == 0
        assert "written" not in text
        assert list(tmp_path.iterdir()) == []

    def test_a_sick_loss_is_exit_code_1(
        self,
        capsys: Capture,
        small: SmallRun,
        root: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(spafit.training.step, "loss_function", loss_failing_from(3))
        arguments = train_arguments(small, root, "--out", str(tmp_path), "--quiet")
        code, _, err = call(capsys, *arguments, "--epochs", "6")
        assert code == 1
        form = (
            r"spafit: the loss or the gradient of 25 steps in a row, up to step 27 \(epoch 6\), "
            r"was NaN or infinite \(the last loss is nan\), .*\n"
        )
        assert re.fullmatch(form, err)
        err = refuse(capsys, "eval", tmp_path)
        assert "has no adapter.safetensors: its run is failed" in err

    def test_bad_rows(self, capsys: Capture, small: SmallRun, root: Path, tmp_path: Path) -> None:
        shutil.copytree(root / "glue", tmp_path / "glue")
        with (tmp_path / "glue" / "RTE" / "train.tsv").open("a") as file:
            file.write("25\ta row of two fields\n")
        arguments = train_arguments(small, tmp_path, "--quiet", "--epochs", "1")
        assert "line 27: expected 4 fields" in refuse(capsys, *arguments)
        code, _, err = call(capsys, *arguments, "--max-bad-rows", "1")
        assert code == 0
        assert err.endswith("train.tsv: 1 malformed row left out\n")

    def test_weights_that_are_not_to_be_mapped(
        self, capsys: Capture, small: SmallRun, root: Path, run: Path, monkeypatch: Any
    ) -> None:
        """Each verb hands the option on; without it the size decides."""
        asked: list[bool | None] = []

        def load(name: str, *, mapped: bool | None, **settings: Any) -> Any:
            asked.append(mapped)
            return spafit.load_pretrained(name, **settings)

        for module in (training, trained):
            monkeypatch.setattr(module, "load_pretrained", load)
        rows = root / "glue" / "RTE" / "dev.tsv"
        for arguments in (
            train_arguments(small, root, "--quiet", "--epochs", "1"),
            ["eval", str(run)],
            ["predict", str(run), "--input", str(rows)],
        ):
            assert call(capsys, *arguments)[0] == 0
            assert call(capsys, *arguments, "--no-mapped")[0] == 0
        assert asked == [None, False] * 3

    @pytest.mark.parametrize(
        "name",
        ["\u7a7a\u3000\u767d", "\u3000", " ", "nb\u00a0sp", "new\nline", "ml\udce9", "\x1b[1m"],
        ids=ascii,
    )
    def test_a_folder_that_is_there_may_have_any_name(
        self, capsys: Capture, small: SmallRun, root: Path, tmp_path: Path, name: str
    ) -> None:
        r"""Also one whose name is not UTF-8: \udce9 is the byte E9, as os.fsdecode gives it."""
        folder, out = tmp_path / name, tmp_path / "run"
        folder.symlink_to(small.folder)
        assert call(capsys, "plan", "SPAFIT-0-1-II", "--model", folder)[0] == 0
        if name not in ("ml\udce9", "new\nline"):
            return
        shutil.copytree(small.folder, tmp_path / f"copy of {name}")
        folder = tmp_path / f"copy of {name}"
        arguments = train_arguments(small, root, "--out", str(out), "--quiet", "--epochs", "1")
        code, text, err = call(capsys, *arguments, "--model", folder)
        assert (code, err) == (0, "")
        assert ascii(name)[1:-1] in text.splitlines()[0]
        assert record_of(out)["about"]["model"] == str(folder)
        assert call(capsys, "eval", out)[::2] == (0, "")


class TestLowercase:
    """Oracle: the tokenizers that load with the argument of the same name; and what is printed."""

    @pytest.fixture
    def folder(self, small: SmallRun, tmp_path: Path) -> Path:
        """Make a model whose tokenizer's files contradict each other, with keys of its trainer."""
        folder = tmp_path / "model"
        shutil.copytree(small.folder, folder)
        assert not json.loads((folder / "tokenizer.json").read_text())["normalizer"]["lowercase"]
        for name, changes in (
            ("tokenizer_config.json", {"do_lower_case": True}),
            ("config.json", {"total_flos": 5, "mlm_probability": 0.1}),
        ):
            content = json.loads((folder / name).read_text()) | changes
            (folder / name).write_text(json.dumps(content))
        return folder

    @staticmethod
    def arguments(small: SmallRun, root: Path, folder: Path, *more: str) -> list[str]:
        brief = ("--epochs", "1", "--model", str(folder), "--quiet")
        return train_arguments(small, root, *brief, *more)

    def test_the_mend_of_the_message(
        self, capsys: Capture, small: SmallRun, root: Path, folder: Path
    ) -> None:
        error = refuse(capsys, *self.arguments(small, root, folder))
        assert "(spafit train --lowercase or --no-lowercase)" in error

    @pytest.mark.parametrize("choice", [True, False])
    def test_recorded_and_used_again(
        self,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
        small: SmallRun,
        root: Path,
        folder: Path,
        tmp_path: Path,
        choice: bool,
    ) -> None:
        option = "--lowercase" if choice else "--no-lowercase"
        more = ("--out", str(tmp_path), option, "--seeds", "0", "1")
        assert main(self.arguments(small, root, folder, *more)) == 0
        note = (
            f"spafit: note: {folder / 'config.json'} sets mlm_probability, total_flos, which "
            "spafit does not know; ignored, as nothing that a BERT encoder computes depends on it\n"
        )
        assert capsys.readouterr().err == note, "once for both seeds"
        record = record_of(tmp_path / "seed-1")
        assert record["about"]["lowercase"] is choice
        expected = spafit.load_tokenizer(folder, lowercase=choice)
        assert record["tokenizer_fingerprint"] == expected.fingerprint
        used: list[str] = []
        encode = spafit.text.tokenization.Tokenizer.encode

        def noting(tokenizer: Any, *texts: Any, **settings: Any) -> Any:
            used.append(tokenizer.fingerprint)
            return encode(tokenizer, *texts, **settings)

        monkeypatch.setattr(spafit.text.tokenization.Tokenizer, "encode", noting)
        rows = root / "glue" / "RTE" / "dev.tsv"
        for command in ("eval",), ("predict", "--input", str(rows)):
            assert main([command[0], str(tmp_path / "seed-1"), *command[1:]]) == 0
            assert capsys.readouterr().err == note
        assert set(used) == {expected.fingerprint}

    def test_left_to_the_files(self, run: Path) -> None:
        assert record_of(run)["about"]["lowercase"] is None

    def test_a_damaged_record(self, capsys: Capture, run: Path, tmp_path: Path) -> None:
        shutil.copytree(run, tmp_path / "run")
        record = record_of(run)
        record["about"]["lowercase"] = "yes"
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        assert main(["eval", str(tmp_path / "run")]) == 2
        assert "lowercase is 'yes', expected true or false" in capsys.readouterr().err


class TestEval:
    """Oracle: the score that the run itself recorded."""

    def test_dev_and_train(self, capsys: Capture, run: Path) -> None:
        result = record_of(run)["result"]
        code, out, err = call(capsys, "eval", run)
        assert (code, err) == (0, "")
        score = f"accuracy {result['metrics']['accuracy']:.4f}"
        majority = f"{result['majority']['accuracy']:.4f}"
        assert out.startswith(
            f"RTE dev ({N_DEV} examples): {score}   (always the commonest class: {majority})\n"
        )
        code, out, _ = call(capsys, "eval", run, "--split", "train")
        assert code == 0
        assert out.startswith(f"RTE train ({N} examples): accuracy 0.")

    def test_moved_data_and_model(
        self, capsys: Capture, small: SmallRun, root: Path, run: Path, tmp_path: Path
    ) -> None:
        usual = call(capsys, "eval", run)
        shutil.copytree(small.folder, tmp_path / "model")
        shutil.copytree(root / "glue" / "RTE", tmp_path / "RTE")
        moved = call(capsys, "eval", run, "--model", tmp_path / "model", "--data", tmp_path)
        assert moved == usual

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (
                config_with(layer_norm_eps=0.05),
                "base_config.layer_norm_eps is 1e-12, loaded is 0.05",
            ),
            (
                config_with(num_attention_heads=4),
                "base_config.num_attention_heads is 3, loaded is 4",
            ),
            (of_lower_case, "tokenizer_fingerprint is '"),
            (two_words_exchanged, "tokenizer_fingerprint is '"),
        ],
    )
    def test_another_configuration_or_tokenizer_is_refused_by_name(
        self,
        capsys: Capture,
        small: SmallRun,
        root: Path,
        run: Path,
        tmp_path: Path,
        change: Callable[[Path], None],
        named: str,
    ) -> None:
        """As on resuming; an older record that lacks the entry cannot tell."""
        model, older = tmp_path / "model", tmp_path / "older"
        shutil.copytree(small.folder, model)
        change(model)
        dev = root / "glue" / "RTE" / "dev.tsv"
        for arguments in (["eval", run], ["predict", run, "--input", dev]):
            err = refuse(capsys, *arguments, "--model", model)
            assert f"rte holds a run that was trained with something else: {named}" in err
        shutil.copytree(run, older)
        lacking = ("base_config", "tokenizer_fingerprint")
        record = {key: value for key, value in record_of(run).items() if key not in lacking}
        (older / "run.json").write_text(json.dumps(record))
        assert call(capsys, "eval", older, "--model", model)[0] == 0

    @pytest.mark.parametrize(
        ("key", "value", "named"),
        [
            ("task", "qnli", "task is 'rte', loaded is 'qnli'"),
            ("labels", ["a", "b"], "labels.0 is 'entailment', loaded is 'a'"),
        ],
    )
    def test_an_adapter_of_another_task_is_refused(
        self, capsys: Capture, run: Path, tmp_path: Path, key: str, value: Any, named: str
    ) -> None:
        shutil.copytree(run, tmp_path / "run")
        with SafeFile(run / "adapter.safetensors") as file:
            tensors = {name: file.read(name) for name in file.tensors}
            metadata = {**file.metadata, key: json.dumps(value)}
        save_tensors(tmp_path / "run" / "adapter.safetensors", tensors, metadata)
        assert named in refuse(capsys, "eval", tmp_path / "run")

    def test_the_record_of_another_base(self, capsys: Capture, run: Path, tmp_path: Path) -> None:
        """As where an adapter was put into the folder of another run."""
        shutil.copytree(run, tmp_path / "run")
        record = {**record_of(run), "base_fingerprint": "c" * 64}
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        assert "base_fingerprint is 'cccc" in refuse(capsys, "eval", tmp_path / "run")

    def test_a_run_that_did_not_end_well_is_spoken_of(
        self, capsys: Capture, run: Path, tmp_path: Path
    ) -> None:
        """Its record says "running", and nobody holds its lock: the process died."""
        shutil.copytree(run, tmp_path / "run")
        usual = call(capsys, "eval", run)
        record = {**record_of(run), "status": "running"}
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        for _ in range(2):
            code, out, err = call(capsys, "eval", tmp_path / "run")
            assert (code, out) == usual[:2]
            assert "its run is interrupted, its process ended without a word: " in err
            assert err.endswith("; this is its best adapter so far\n")
            assert len([line for line in err.splitlines() if ": note: " not in line]) == 1
        assert record_of(tmp_path / "run")["status"] == "interrupted"

    def test_another_base_is_refused(self, capsys: Capture, run: Path, tmp_path: Path) -> None:
        other = make_tiny(tmp_path / "other", seed=1)
        err = refuse(capsys, "eval", run, "--model", other)
        assert len(re.findall(r"\b[0-9a-f]{64}\b", err)) == 2

    def test_a_run_of_a_machine_with_a_gpu(
        self, capsys: Capture, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is not available here is named, and the nearest is taken."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        shutil.copytree(run, tmp_path / "run")
        usual = call(capsys, "eval", run)
        record = record_of(run)
        for changes in (
            {"device": "cuda", "precision": "fp16"},
            {"device": "cuda:3", "precision": "bf16"},
            {"device": "cpu", "precision": "fp16"},
            {"device": "a\n\x1b[31m", "precision": "float32"},
        ):
            settings = {**record["settings"], **changes}
            (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "settings": settings}))
            code, out, err = call(capsys, "eval", tmp_path / "run")
            assert (code, out) == usual[:2]
            assert err.startswith("using float32 on cpu: ")
            assert err.removesuffix("\n").isprintable()

    @pytest.mark.parametrize("damage", ["", "[]", '{"settings": {}}'])
    def test_a_damaged_record(
        self, capsys: Capture, run: Path, tmp_path: Path, damage: str
    ) -> None:
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / "run.json").write_text(damage)
        assert "run.json" in refuse(capsys, "eval", tmp_path / "run")

    def test_a_record_without_places(
        self, capsys: Capture, run: Path, small: SmallRun, root: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(run, tmp_path / "run")
        record = {**record_of(run), "about": {}}
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        with_data = ["eval", str(tmp_path / "run"), "--data", root / "glue"]
        assert "has no model; give --model" in refuse(capsys, *with_data)
        with_model = ["eval", str(tmp_path / "run"), "--model", str(small.folder)]
        assert "has no data; give --data" in refuse(capsys, *with_model)
        assert call(capsys, *with_model, "--data", root / "glue") == call(capsys, "eval", run)

    def test_mnli_is_scored_on_both_halves(
        self, capsys: Capture, small: SmallRun, tmp_path: Path
    ) -> None:
        """In JSONL; where one half is not there, that is said."""
        folder = tmp_path / "glue" / "MNLI"
        folder.mkdir(parents=True)
        for name, n in (("train", 9), ("dev_matched", 7), ("dev_mismatched", 5)):
            rows = [
                json.dumps({"premise": e.text_a, "hypothesis": e.text_b, "label": e.label})
                for e in make_dataset("mnli", n).examples
            ]
            (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        arguments = train_arguments(small, tmp_path, "--out", str(tmp_path / "run"), "--quiet")
        assert call(capsys, *arguments, "--task", "mnli", "--metric", "macro_f1")[0] == 0
        code, out, err = call(capsys, "eval", tmp_path / "run")
        assert (code, err) == (0, "")
        pattern = r"MNLI-m dev \(7 [^:]*: macro_f1 .*\nMNLI-mm dev \(5 [^:]*: macro_f1 "
        assert re.match(pattern, out, re.DOTALL)
        (folder / "dev_mismatched.jsonl").unlink()
        code, out, err = call(capsys, "eval", tmp_path / "run")
        assert code == 0
        assert re.match(r"MNLI-m dev \(7 .*\n", out)
        assert err.startswith("mnli-mm left out: no file for the dev split")


class TestFilesOfGlue:
    """Each task's own file is scored as the split that it is. Oracle: GLUE's reader."""

    ROWS: ClassVar = {
        "cola": ["x\t1\t\tthe cat", 'x\t0\t*\tcat "the'],
        "sst-2": ["sentence\tlabel", "the cat\t1", 'a 5" dog\t0'],
        "mrpc": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tthe cat\ta cat"],
        "qqp": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "5\t1\t2\tcat\tdog\t0"],
        "sts-b": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tg\tf\ty\t1\ts\ts\ta cat\tthe cat\t3.800",
        ],
    }

    @pytest.mark.parametrize("name", ROWS)
    def test_is_read_as_itself(self, tmp_path: Path, name: str) -> None:
        task, path = glue.get_task(name), tmp_path / "mine.tsv"
        path.write_text("\n".join(self.ROWS[name]) + "\n")
        run: Any = SimpleNamespace(task=task)
        [found] = evaluating.datasets(run, path, "dev", TableForm(), 0)
        assert found.examples == glue.read_file(name, path, "dev").examples
        assert (found.task, found.split) == (task, "mine.tsv")
        with pytest.raises(ConfigError, match=f"--unquoted is for .* {task.display} are"):
            evaluating.datasets(run, path, "dev", TableForm(quoted=False), 0)

    def test_a_table_is_read_as_one(self, tmp_path: Path) -> None:
        """By the names of its columns and labels; CoLA's own has no header to be told by."""
        path = tmp_path / "mine.tsv"
        run: Any = SimpleNamespace(task=glue.get_task("cola"))
        for encoding in ("utf-8", "utf-16"):
            table = "id\tsentence\tlabel\tx\n7\tthe cat\tacceptable\ty\n"
            path.write_text(table, encoding=encoding)
            [found] = evaluating.datasets(run, path, "dev", TableForm(), 0)
            assert (found.texts_a, found.labels) == (["the cat"], ["acceptable"])

    def test_of_train(self, tmp_path: Path) -> None:
        """MNLI's has other columns than that of dev."""
        task, path = glue.get_task("mnli"), tmp_path / "train.tsv"
        assert task.train is not None
        columns = task.train.columns
        fields = ["neutral" if name == "gold_label" else name for name in columns]
        path.write_text("\t".join(columns) + "\n" + "\t".join(fields) + "\n")
        [found] = evaluating.datasets(SimpleNamespace(task=task), path, "dev", TableForm(), 0)  # type: ignore[arg-type]
        assert found.labels == ["neutral"]


class TestBadRows:
    """Oracle: the same file without the bad row; the others keep their numbers."""

    @pytest.fixture
    def spoilt(self, capsys: Capture, small: SmallRun, root: Path, tmp_path: Path) -> Path:
        """Train with one row allowed; the dev file has one in its middle. Return the dev file."""
        shutil.copytree(root / "glue", tmp_path / "glue")
        dev = tmp_path / "glue" / "RTE" / "dev.tsv"
        lines = dev.read_text().splitlines()
        dev.write_text("\n".join([*lines[:4], "of one field", *lines[4:]]) + "\n")
        arguments = train_arguments(small, tmp_path, "--quiet", "--epochs", "1", "--seed", "1")
        arguments += ["--max-bad-rows", "1", "--out", str(tmp_path / "run")]
        assert call(capsys, *arguments)[0] == 0
        return dev

    def test_as_in_training_or_as_asked(
        self, capsys: Capture, root: Path, tmp_path: Path, spoilt: Path
    ) -> None:
        run = tmp_path / "run"
        told = f"{spoilt}: 1 malformed row left out\n"
        score = f"accuracy {record_of(run)['result']['metrics']['accuracy']:.4f}"
        code, out, err = call(capsys, "eval", run)
        assert (code, err) == (0, told)
        assert out.startswith(f"RTE dev ({N_DEV} examples): {score} ")
        code, out, err = call(capsys, "predict", run, "--input", spoilt)
        assert (code, err) == (0, told)
        clean = call(capsys, "predict", run, "--input", root / "glue" / "RTE" / "dev.tsv")[1]
        labels = [row.partition("\t")[2] for row in clean.splitlines()]
        rows = [row.split("\t") for row in out.splitlines()]
        assert [label for _, label in rows] == labels
        assert [index for index, _ in rows[1:]] == [*map(str, range(N_DEV))]  # the file's own
        for arguments in (["eval", run], ["predict", run, "--input", spoilt]):
            err = refuse(capsys, *arguments, "--max-bad-rows", "0")
            assert "allow more (--max-bad-rows)" in err
            assert call(capsys, *arguments, "--max-bad-rows", "2")[0] == 0

    def test_what_the_record_says_or_an_older_one_implies(
        self, capsys: Capture, tmp_path: Path, spoilt: Path
    ) -> None:
        record = record_of(tmp_path / "run")
        assert record["about"].pop("max_bad_rows") == 1
        file = tmp_path / "run" / "run.json"
        for about, data, code in (
            ({}, record["data"], 0),
            ({}, {"train": record["data"]["dev"], "dev": record["data"]["train"]}, 0),
            ({}, None, 2),
            ({"max_bad_rows": 1}, None, 0),
            ({"max_bad_rows": 0}, record["data"], 2),
            ({"max_bad_rows": -1}, record["data"], 2),
            ({"max_bad_rows": "1"}, record["data"], 2),
        ):
            found = {**record, "about": {**record["about"], **about}, "data": data}
            file.write_text(json.dumps(found))
            result = call(capsys, "eval", tmp_path / "run")
            assert result[0] == code
            is_damaged = about.get("max_bad_rows") in (-1, "1")
            assert ("record is damaged: max_bad_rows is" in result[2]) == is_damaged

    def test_a_submission_has_every_row(
        self, capsys: Capture, root: Path, run: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(root / "glue", tmp_path / "glue")
        with (tmp_path / "glue" / "RTE" / "test.tsv").open("a") as file:
            file.write("\n")
        arguments = ["predict", run, "--submission", tmp_path / "new", "--data", tmp_path / "glue"]
        err = refuse(capsys, *arguments)
        assert err.endswith(
            "line 3002: expected 3 fields (index, sentence1, sentence2), found 1: "
            "''. Bad row number 1, 0 allowed: correct the file\n"
        )
        err = refuse(capsys, *arguments, "--max-bad-rows", "1")
        assert err == "spafit: --max-bad-rows needs --input; a submission has every row\n"


class TestPredict:
    """Oracle: the Python interface, and GLUE's form of a submission."""

    @pytest.fixture
    def expected(self, small: SmallRun, root: Path, run: Path) -> list[str]:
        model = spafit.load_pretrained(small.folder)
        spafit.load_adapter(model, run / "adapter.safetensors")
        dev = glue.load("rte", "dev", root / "glue")
        labels = [
            str(label)
            for label in spafit.predict(model, small.tokenizer, dev, max_length=16).labels
        ]
        assert len(set(labels)) == 2
        return labels

    def test_a_file_with_labels_and_one_without(
        self, capsys: Capture, root: Path, run: Path, tmp_path: Path, expected: list[str]
    ) -> None:
        rows = "".join(f"{index}\t{label}\n" for index, label in enumerate(expected))
        labelled = root / "glue" / "RTE" / "dev.tsv"
        bare = tmp_path / "mine.tsv"
        lines = labelled.read_text().splitlines()
        bare.write_text("".join(line.rpartition("\t")[0] + "\n" for line in lines))
        for file in (labelled, bare):
            found = call(capsys, "predict", run, "--input", file)
            assert found == (0, f"index\tprediction\n{rows}", "")

    def test_a_table_of_a_spreadsheet_and_a_stream(
        self,
        capsys: Capture,
        root: Path,
        run: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Of a GLUE task too; a stream may be JSON."""
        dev = root / "glue" / "RTE" / "dev.tsv"
        whole = call(capsys, "predict", run, "--input", dev)
        names, *rows = [line.split("\t")[:3] for line in dev.read_text().splitlines()]
        with (tmp_path / "dev.csv").open("w", newline="") as file:
            csv.writer(file).writerows([names, *rows])
        assert call(capsys, "predict", run, "--input", tmp_path / "dev.csv") == whole
        text = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
        for content in (text.encode(), dev.read_bytes()):
            stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(content)))  # type: ignore[arg-type]
            monkeypatch.setattr(sys, "stdin", stdin)
            assert call(capsys, "predict", run, "--input", "-") == whole

    def test_files_with_other_columns(
        self, capsys: Capture, root: Path, run: Path, tmp_path: Path, expected: list[str]
    ) -> None:
        """A table and JSON; each row keeps all that is no text and no label."""
        _, *lines = (root / "glue" / "RTE" / "dev.tsv").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        table = "".join(f"{text}\tT-{k}\t{k}\t{text2}\n" for k, text, text2, _ in rows)
        (tmp_path / "x.tsv").write_text(f"sentence1\tID\tidx\tsentence2\n{table}")
        records = [
            {"ID": f"T-{k}", "sentence1": text, "idx": k, "sentence2": text2}
            for k, text, text2, _ in rows
        ]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        said = "".join(
            f"T-{row[0]}\t{row[0]}\t{e}\n" for row, e in zip(rows, expected, strict=True)
        )
        for name in ("x.tsv", "x.jsonl"):
            found = call(capsys, "predict", run, "--input", tmp_path / name)
            assert found == (0, f"ID\tidx\tprediction\n{said}", "")

    def test_output(
        self, capsys: Capture, root: Path, run: Path, tmp_path: Path, expected: list[str]
    ) -> None:
        arguments = ["predict", run, "--input", root / "glue" / "RTE" / "dev.tsv"]
        file = tmp_path / "predictions.tsv"
        _, shown, _ = call(capsys, *arguments)
        found = call(capsys, *arguments, "--output", file)
        assert found == (0, f"written: {file} ({N_DEV} predictions)\n", "")
        assert file.read_text() == shown
        err = refuse(capsys, *arguments, "--output", tmp_path / "nowhere" / "file")
        assert "cannot be written: No such file" in err

    @pytest.mark.parametrize("name", ["x.xlsx", "x.parquet"])
    def test_what_is_no_form_of_a_table(
        self, capsys: Capture, root: Path, run: Path, tmp_path: Path, name: str
    ) -> None:
        dev = root / "glue" / "RTE" / "dev.tsv"
        err = refuse(capsys, "predict", run, "--input", dev, "--output", tmp_path / name)
        assert f"as .{name[2:]}; end it in .tsv, .csv, .txt, .jsonl" in err
        code, out, err = call(capsys, "eval", run, "--errors", tmp_path / name)
        assert (code, out) == (2, "")  # before it is evaluated
        assert err.rstrip().endswith("; end it in .tsv, .csv, .txt")
        assert not (tmp_path / name).exists()

    def test_what_predicts_is_made_once(
        self, root: Path, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As for both halves of MNLI: the weights are merged once."""
        made = []

        def counting(*given: Any, **settings: Any) -> Predictor:
            made.append(settings["merges"])
            return Predictor(*given, **settings)

        monkeypatch.setattr(trained, "Predictor", counting)
        monkeypatch.setattr(trained, "WORTH_MERGING", N_DEV)
        its, dev = trained.Trained(run, None, None), glue.load("rte", "dev", root / "glue")
        labels = [its.predict(each)[0] for each in (dev, dev[:1], dev, dev[:1])]
        assert made == [True, False]
        assert labels[0] == labels[2] and labels[1] == labels[0][:1]

    def test_what_needs_no_weights_is_refused_before_them(
        self,
        capsys: Capture,
        root: Path,
        run: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(trained, "load_pretrained", None)
        monkeypatch.setattr(sys, "stdin", None)
        dev = root / "glue" / "RTE" / "dev.tsv"
        for arguments, says in (
            (["predict", run, "--input", dev, "--output", tmp_path / "x.xlsx"], "end it in .tsv"),
            (["predict", run, "--input", tmp_path / "no.tsv"], "cannot read"),
            (["predict", run, "--input", "-"], "standard input is closed; name a file"),
            (["predict", run, "--submission", tmp_path / "s", "--data", tmp_path], "no file for"),
            (["eval", run, "--errors", tmp_path / "x.xlsx"], "end it in .tsv"),
            (["eval", run, "--data", tmp_path / "no"], "no file for the dev split"),
        ):
            assert says in refuse(capsys, *arguments)

    def test_a_submission(self, capsys: Capture, root: Path, run: Path, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "submissions"
        code, out, err = call(capsys, "predict", run, "--submission", folder)
        assert (code, err) == (0, "")
        lines = (folder / "RTE.tsv").read_text().split("\n")
        assert lines[0] == "index\tprediction"
        assert lines[-1] == ""
        rows = [line.split("\t") for line in lines[1:-1]]
        assert [index for index, _ in rows] == [str(index) for index in range(3000)]
        assert {label for _, label in rows} == {"entailment", "not_entailment"}
        with zipfile.ZipFile(folder / "submission.zip") as archive:
            assert archive.namelist() == ["RTE.tsv"]
            assert archive.read("RTE.tsv") == (folder / "RTE.tsv").read_bytes()
        assert f"written: {folder / 'RTE.tsv'} (3000 predictions)\n" in out
        assert "still missing for GLUE's server: CoLA.tsv, SST-2.tsv" in out
        test = root / "glue" / "RTE" / "test.tsv"
        _, shown, _ = call(capsys, "predict", run, "--input", test)
        assert shown == (folder / "RTE.tsv").read_text()

    def test_a_test_file_that_is_not_whole(
        self, capsys: Capture, run: Path, tmp_path: Path
    ) -> None:
        write_glue(tmp_path / "glue", test_rows=7)
        arguments = ["predict", run, "--data", tmp_path / "glue"]
        err = refuse(capsys, *arguments, "--submission", tmp_path / "submissions")
        assert "RTE.tsv needs 3000 predictions" in err
        assert not (tmp_path / "submissions" / "RTE.tsv").exists()

    def test_refusals(self, capsys: Capture, root: Path, run: Path, tmp_path: Path) -> None:
        refuse(capsys, "predict", run, "--input", tmp_path / "nothing.tsv")
        refuse(capsys, "predict", run, "--input", tmp_path)
        (tmp_path / "text.txt").write_text("hello")
        refuse(capsys, "predict", run, "--input", tmp_path / "text.txt")
        (tmp_path / "other.tsv").write_text("a\tb\n1\t2\n")
        refuse(capsys, "predict", run, "--input", tmp_path / "other.tsv")
        data = ["--data", str(root / "glue")]
        refuse(capsys, "predict", run, *data, "--submission", tmp_path / "text.txt")
        assert (tmp_path / "text.txt").read_text() == "hello"
        both = ["--submission", tmp_path / "new", "--output", tmp_path / "out.tsv"]
        assert "--output needs --input" in refuse(capsys, "predict", run, *data, *both)
        assert not (tmp_path / "new").exists()

    def test_a_closed_pipe(
        self, root: Path, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """What a reader did not want is not a failure."""

        class Closed(io.StringIO):
            def flush(self) -> None:
                raise BrokenPipeError

            def fileno(self) -> int:
                return descriptor

        with (tmp_path / "stdout").open("w") as file:
            descriptor = file.fileno()
            monkeypatch.setattr(sys, "stdout", Closed())
            test = root / "glue" / "RTE" / "dev.tsv"
            assert main(["predict", str(run), "--input", str(test)]) == 0

    def test_a_closed_pipe_loses_no_file(
        self, root: Path, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """``spafit eval RUN --errors FILE | head -1`` writes all of the file."""

        class Closed(io.StringIO):
            def write(self, _: str) -> int:
                raise BrokenPipeError

        written = []
        for name in ("read.tsv", "closed.tsv"):
            assert main(["eval", str(run), "--errors", str(tmp_path / name)]) == 0
            written.append((tmp_path / name).read_text())
            monkeypatch.setattr(sys, "stdout", Closed())
        assert written[0] == written[1]

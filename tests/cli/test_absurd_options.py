"""Absurd values for every option of every command: a one-line error, exit code 2, no files.

The options are read from the parser itself, so that a new one without an entry in the table fails.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from support.absurd_values import LONG, NO_FLAG, PAIRS, TABLE
from support.small_runs import SmallRun, write_glue

from spafit.cli import main, option_types, trained, training
from spafit.cli import parser as cli
from spafit.methods import plan
from spafit.training.settings import complete


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each verb, and of none."""
    top = cli.build_parser()
    verbs = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    return {"": top, **verbs.choices}


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {(a.option_strings or [a.dest])[0]: a for a in parser._actions}


def snapshot(root: Path) -> dict[str, tuple[int, bytes | str]]:
    """Take down everything below a folder."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            content: bytes | str = b""
            if stat.S_ISREG(mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(mode):
                content = str(path.readlink())
            found[str(path)] = (mode, content)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small: SmallRun) -> Path:
    """Make a folder with a bit of everything; no test changes it, which each of them checks."""
    root = tmp_path_factory.mktemp("place")
    write_glue(root / "glue")
    write_glue(root / "long", rows=50)  # enough for a search
    for name, content in (
        ("file", "hello"),
        ("file.json", "{"),
        ("rows.tsv", (root / "glue" / "RTE" / "dev.tsv").read_text()),
        ("bad.tsv", "a\tb\n"),
        ("empty.tsv", ""),
        ("grid.json", '{"cells": [{"task": "rte", "method": "bitfit"}]}'),
    ):
        (root / name).write_text(content)
    (root / "plan.json").write_text(plan("bitfit", 24).to_json())
    for name in ("folder", "folder.json", "damaged", "run-of-another-seed"):
        (root / name).mkdir()
    (root / "damaged" / "run.json").write_text('{"task": "rte"}')
    for name in ("pipe", "pipe.json"):
        os.mkfifo(root / name)
    for name, to in (
        ("circle", "circle"),
        ("circle.json", "circle.json"),
        ("dangling", "nowhere"),
        ("to-pipe", "pipe"),
        ("link.tsv", "rows.tsv"),
    ):
        (root / name).symlink_to(to)
    arguments = train_arguments(small, "--epochs", "1", "--max-length", "8", "--out", "run")
    before = Path.cwd()
    os.chdir(root)
    try:
        assert main(arguments) == 0
        record = (root / "run" / "run.json").read_text()
        assert record.count('"seed": 0') == 1
        another = record.replace('"seed": 0', '"seed": 7')
        (root / "run-of-another-seed" / "run.json").write_text(another)
    finally:
        os.chdir(before)
    return root


def train_arguments(small: SmallRun, *more: str) -> list[str]:
    base = f"train --task=rte --method=SPAFIT-0-1-II --model={small.folder} --data=glue --quiet"
    return [*base.split(), "--device=cpu", *more]


@pytest.fixture
def refuse(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[list[str]], str]]:
    """Run a command that must be refused, and give what it says."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("SPAFIT_CACHE", str(place / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hf"))
    asked: list[Any] = []

    def ask(*address: Any, **_: Any) -> Any:
        asked.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(socket.socket, "connect", ask)

    def begin(*_: Any, **__: Any) -> None:
        raise AssertionError("training has begun")

    monkeypatch.setattr(torch.Tensor, "backward", begin)
    monkeypatch.setattr(torch.autograd, "backward", begin)
    alarm = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(300)
    before = snapshot(place)

    def check(arguments: list[str]) -> str:
        capsys.readouterr()
        start = time.process_time()  # what others do on the machine is not counted
        try:
            code: Any = main(arguments)
        except SystemExit as end:  # argparse leaves so
            code = end.code
        took = time.process_time() - start
        out, err = capsys.readouterr()
        shown = [f"{each:.60}" for each in arguments]
        assert code == 2, (shown, code, out[-300:], err)
        assert err.endswith("\n"), (shown, err)
        assert len(err.splitlines()) == 1, (shown, err)
        assert err.rstrip("\n").isprintable(), (shown, err)
        assert re.match(r"spafit( \w+)?: .{10,}", err), (shown, err)
        assert len(err) < 1_500, (shown, len(err))
        assert not re.search(r"written|Next:|^ +dev  |prediction\n", out, re.MULTILINE), (
            shown,
            out,
        )
        assert took < 5, (shown, took)
        assert asked == [], (shown, asked)
        return err

    yield check
    signal.alarm(0)
    signal.signal(signal.SIGALRM, alarm)
    assert snapshot(place) == before


def base_of(verb: str, small: SmallRun) -> list[str]:
    """Return the arguments of a sound command, positional ones first."""
    return {
        "": ["plan", "bitfit"],
        "doctor": ["doctor"],
        "demo": ["demo", f"--model={small.folder}", "--out=new"],
        "plan": ["plan", "SPAFIT-4-9-II"],
        "download": ["download", "glue", "rte", "--folder=new"],
        "eval": ["eval", "run"],
        "predict": ["predict", "run", "--input=rows.tsv"],
        "probe": [
            *f"probe --task=rte --model={small.folder} --data=glue --quiet".split(),
            "--out=new",
        ],
        "search": [
            *f"search --task=rte --model={small.folder} --data=long --quiet".split(),
            "--out=new",
        ],
        "inspect": [
            *"inspect run --forgetting --merging --tasks=rte --data=glue --quiet".split(),
            "--out=new",
        ],
        "report": ["report", "run", "--submission=new"],
        "train": train_arguments(small, "--out=new"),
        "grid": ["grid", "grid.json", f"--model={small.folder}", "--data=glue", "--out=new"],
    }[verb]


def with_option(base: list[str], verb: str, option: str, value: str) -> list[str]:
    """Put a value into a command in the place of its own."""
    if option == "verb":
        return [value, *base[1:]]
    if not option.startswith("-"):
        index = {"names": 2}.get(option, 1)
        return [*base[:index], value, *base[index + 1 :]]
    if verb == "":
        return [f"{option}={value}", *base]
    others = [each for each in base if not each.startswith(f"{option}=")]
    if verb == "predict" and option in ("--submission", "--data"):
        others = [each for each in others if not each.startswith("--input=")]
    if verb == "predict" and option == "--data":
        others.append("--submission=new")
    return [*others, f"{option}={value}" if option != "-h" else f"--help={value}"]


CASES = [(verb, option) for verb, entries in TABLE.items() for option in entries]


class TestEveryOption:
    """Oracle: exit code 2, one line, and a tree of files that is as it was."""

    def test_the_table_has_every_option_of_every_verb(self) -> None:
        """A new option needs an entry here."""
        found = {verb: set(options(parser)) for verb, parser in parsers().items()}
        assert found == {verb: set(entries) for verb, entries in TABLE.items()}

    def test_every_kind_of_option_has_the_values_of_its_kind(self) -> None:
        for verb, parser in parsers().items():
            for name, action in options(parser).items():
                absurd = set(TABLE[verb][name].absurd)
                if action.type in (
                    option_types.as_whole,
                    option_types.as_seed,
                    option_types.as_size,
                ):
                    assert absurd >= {
                        "",
                        "1_000",
                        "\u0663",
                        "nan",
                        "1.5",
                        "1e308",
                        "9" * 5_000,
                        "-1",
                    }
                elif action.type is option_types.as_number:
                    assert absurd >= {"", "1_000", "\u0663", "nan", "inf", "1e999", "9" * 5_000}
                elif action.type is option_types.as_path:
                    assert absurd >= {"", " ", "\0", LONG}
                elif action.nargs == 0:
                    assert absurd == set(NO_FLAG)
                else:
                    assert absurd >= {"", " ", "\0", LONG}, (verb, name)
                assert action.type not in (int, float, Path), (verb, name)

    @pytest.mark.parametrize(("verb", "option"), CASES)
    def test_absurd_values(
        self,
        refuse: Callable[[list[str]], str],
        small: SmallRun,
        promise: Callable[[str, int, str], None],
        verb: str,
        option: str,
    ) -> None:
        for value in TABLE[verb][option].absurd:
            refuse(with_option(base_of(verb, small), verb, option, value))
        count = len(TABLE[verb][option].absurd)
        promise("absurd settings", count, "all refused, nothing made")

    @pytest.mark.parametrize(
        "line", [line for line in PAIRS.splitlines() if line.strip()], ids=str.strip
    )
    def test_what_goes_wrong_only_together(
        self,
        refuse: Callable[[list[str]], str],
        small: SmallRun,
        promise: Callable[[str, int, str], None],
        line: str,
    ) -> None:
        train = " ".join(train_arguments(small))
        probe, search = (" ".join(base_of(verb, small)) for verb in ("probe", "search"))
        refuse(line.format(train=train, probe=probe, search=search, model=small.folder).split())
        promise("absurd settings", 1, "all refused, nothing made")

    def test_a_sound_command_is_not_refused(
        self, place: Path, small: SmallRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each command goes on to its work: what the tests above see refused is the value."""
        monkeypatch.chdir(place)

        class Reached(BaseException):
            pass

        def reached(*_: Any, **__: Any) -> None:
            raise Reached

        for module, name in ((training, "fit"), (training, "adapt"), (trained, "Predictor")):
            monkeypatch.setattr(module, name, reached)
        monkeypatch.setattr("spafit.tasks.download.download_glue", reached)
        monkeypatch.setattr("spafit.strata.adapt", reached)
        monkeypatch.setattr("spafit.demo.run.run_demo", reached)
        monkeypatch.setattr("spafit.cli.examining.report", reached)
        monkeypatch.setattr("spafit.cli.reporting.make_report", reached)
        monkeypatch.setattr("spafit.experiments.grid.start.begin", reached)
        monkeypatch.setattr("spafit.experiments.probe.report.probe", reached)
        monkeypatch.setattr("spafit.cli.inspecting.probe_scores", reached)
        monkeypatch.setattr("spafit.experiments.search.start.begun_before", reached)
        for verb in TABLE:
            with pytest.raises(Reached):
                main(base_of(verb, small))

    @pytest.mark.parametrize(
        ("option", "value"), [(o, v) for o, entry in TABLE["train"].items() for v in entry.legal]
    )
    def test_values_that_only_look_absurd(
        self,
        place: Path,
        small: SmallRun,
        monkeypatch: pytest.MonkeyPatch,
        option: str,
        value: str,
    ) -> None:
        """They pass every check of train's command; the table says why."""
        monkeypatch.chdir(place)
        made = []
        monkeypatch.setattr(
            training, "fit", lambda *arguments, **_: made.append(arguments) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            main(with_option(base_of("train", small), "train", option, value))
        model, _, train, _, config = made[0]
        assert config.out == Path("new")
        assert complete(config, model, train).device == "cpu"


class TestTerminals:
    """Oracle: exit code 0 where the terminal has no letter for what is shown."""

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
    @pytest.mark.parametrize("name", [b"plan.json", b"pl\xe4n.json", "東京.json".encode()])
    def test_what_cannot_be_shown_is_no_failure(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, name: bytes
    ) -> None:
        """The drawing has lines that ASCII lacks, and a name of a file may be no text at all."""
        monkeypatch.chdir(tmp_path)
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        assert main(["plan", "SPAFIT-4-9-II", "--save", os.fsdecode(name)]) == 0
        out, err = (stream.buffer.getvalue() for stream in streams)  # type: ignore[attr-defined]
        assert out.startswith(b"SPAFIT-4-9-II: 7,485,443 of ")
        assert err == b""
        assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [name]

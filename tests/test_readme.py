"""The README is true: its commands and snippets run, and what it prints is what they print.

Oracle: the README's own text. ``FOLDER``, ``DATA``, ``FILE.tsv``, ``tickets.csv`` and ``new.csv``
stand in it for a folder of weights, GLUE's root and files of the reader's; here they are a tiny
checkpoint and a few rows.
"""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import spafit
from spafit.cli import main
from spafit.cli.parser import _parser
from weights_tools.tiny import make_tiny

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, text in BLOCKS
    if language == ""
    for line in text.splitlines()
    if line.startswith("spafit ")
]
INLINE = re.findall(r"`(spafit [^`]+)`", README)
NEEDS_NETWORK = ("spafit download",)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """Make what the README's stand-ins stand for."""
    root = tmp_path_factory.mktemp("readme")
    folder = make_tiny(root / "weights", num_hidden_layers=6)
    rte = root / "glue" / "RTE"
    rte.mkdir(parents=True)
    texts = [("the cat sat", "a cat sat"), ("no dog ran", "a dog ran"), ("it is so", "is it so")]
    for split, repeats in (("train", 8), ("dev", 4), ("test", 1000)):
        labelled = split != "test"
        lines = ["index\tsentence1\tsentence2" + ("\tlabel" if labelled else "")]
        for index in range(repeats * len(texts)):
            first, second = texts[index % len(texts)]
            label = ("\tnot_entailment", "\tentailment")[index % 2] if labelled else ""
            lines.append(f"{index}\t{first}\t{second}{label}")
        (rte / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = "".join(f'"{a}, {b}",{"ab"[k % 2]}\n' for k, (a, b) in enumerate(texts * 6))
    for name in ("tickets.csv", "new.csv"):
        (root / name).write_text("text,label\n" + rows, encoding="utf-8")
    return {
        "tickets.csv": str(root / "tickets.csv"),
        "new.csv": str(root / "new.csv"),
        "FOLDER": str(folder),
        "DATA": str(root / "glue"),
        "FILE.tsv": str(rte / "dev.tsv"),
        "ROOT": str(root),
    }


def fill_in(text: str, places: dict[str, str]) -> str:
    for name in ("FOLDER", "DATA", "FILE.tsv", "tickets.csv", "new.csv"):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", places[name].replace("\\", "/"), text)
    return text


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) >= 4
    assert len(COMMANDS) >= 6


def test_the_snippets_run_from_top_to_bottom(places, monkeypatch):
    monkeypatch.chdir(places["ROOT"])
    names = {"FOLDER": places["FOLDER"], "DATA": places["DATA"]}
    quick = spafit.TrainConfig

    def short(**settings):
        return quick(**settings, epochs=1, max_length=32, quiet=True)

    monkeypatch.setattr(spafit, "TrainConfig", short)
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["result"].best_epoch == 1
    assert set(names["state"]) == set(
        spafit.load_pretrained(places["FOLDER"], num_labels=2).state_dict()
    )


def test_the_commands_run_in_order(places, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    for command in COMMANDS:
        arguments = shlex.split(fill_in(command, places))[1:]
        if command.startswith(NEEDS_NETWORK):
            _parser().parse_args(arguments)
            continue
        if arguments[0] == "train":
            arguments += ["--epochs", "1", "--max-length", "32", "--quiet"]
        assert main(arguments) == 0, (command, capsys.readouterr().err)
    assert (tmp_path / "submissions" / "RTE.tsv").read_text().count("\n") == 3001


@pytest.mark.parametrize("command", INLINE)
def test_commands_within_sentences_parse(command):
    _parser().parse_args(shlex.split(command)[1:])


def test_the_plan_that_is_printed_is_the_plan(capsys):
    assert main(["plan", "SPAFIT-4-9-II"]) == 0
    printed = capsys.readouterr().out
    assert any(text == printed for _, text in BLOCKS), "README.md shows another plan"


def test_the_modules_that_python_runs_are_there():
    named = re.findall(r"python -m ([\w.]+)", README)
    assert {"benchmarks", "weights_tools", "benchmarks.train_step"} <= set(named)
    for module in named:
        assert importlib.util.find_spec(module) is not None, module


def test_links_lead_somewhere():
    root = Path(__file__).resolve().parents[1]
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (root / target).exists(), target


def test_make_has_the_targets_it_names():
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target

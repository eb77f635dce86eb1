"""An option that a message offers is one of the command that shows it.

Oracle: the parser. What is read are the strings of the package's files, not which function calls
which: of a file in ``SHOWN_BY`` every option must be one of all these verbs, of any other file one
of some verb. So a file that is missing there is not checked for each verb, and neither are messages
put together from pieces that split an option's name. The demo trains with its own settings: of its
messages only those that refuse a folder are checked.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import spafit
from spafit.cli import parser as cli

PACKAGE = Path(spafit.__file__).parent
SHOWN_BY = {
    "text/vocabulary.py": ("train", "eval", "predict", "plan", "probe", "search", "inspect"),
    "tasks/glue.py": ("train", "eval", "predict", "probe", "search", "inspect"),
    "training/inference.py": ("train", "eval", "predict", "inspect"),
    "runs/record.py": ("eval", "predict", "inspect"),
    "cli/inspecting.py": ("inspect",),
    "tasks/download.py": ("download",),
    "runs/folder.py": ("train",),
    "runs/identity.py": ("train", "demo"),
    "training/settings.py": ("train",),
    "training/loop.py": ("train",),
    "training/prefix/kept.py": ("train",),
    "experiments/probe/report.py": ("probe",),
    "experiments/inspect/masked.py": ("inspect",),
    "experiments/search/candidates.py": ("search",),
    "experiments/search/report.py": ("search",),
    "experiments/search/start.py": ("search",),
    "experiments/search/asked.py": ("search",),
    **{f"cli/verbs/{verb}.py": (verb,) for verb in cli.VERBS},
}
OF_A_VERB = re.compile(r"(--[a-z][a-z0-9-]*) of spafit ([a-z]+)|spafit ([a-z]+) [^\n]*")
OF_PIP = re.compile(r"pip install [^\n]*")
OF_TORCHRUN = re.compile(r"--(nproc-per-node|rdzv-endpoint)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def known() -> dict[str, set[str]]:
    """Return the names of each verb's options."""
    top = cli.build_parser()
    [verbs] = [each for each in top._actions if isinstance(each, argparse._SubParsersAction)]
    return {
        verb: {name for action in parser._actions for name in action.option_strings}
        for verb, parser in {"": top, **verbs.choices}.items()
    }


def texts(source: str) -> Iterator[str]:
    """Yield the strings of a file that are not docstrings."""
    tree = ast.parse(source)
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def wrong(source: str, verbs: tuple[str, ...]) -> list[str]:
    """Return the options named in a file that are not those of the verbs."""
    have, found = known(), []
    for text in texts(source):
        text = OF_TORCHRUN.sub("", OF_PIP.sub("", text))
        for match in OF_A_VERB.finditer(text):
            verb = match[2] or match[3]
            if verb in have:
                found += [each for each in OPTION.findall(match[0]) if each not in have[verb]]
        for option in OPTION.findall(OF_A_VERB.sub("", text)):
            holders = [verb for verb in have if option in have[verb]]
            if not holders or not set(verbs) <= set(holders):
                found.append(option)
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_every_option_is_one_of_the_verbs_that_show_it() -> None:
    found = {file: wrong((PACKAGE / file).read_text(), SHOWN_BY.get(file, ())) for file in FILES}
    assert {file: names for file, names in found.items() if names} == {}
    assert SHOWN_BY.keys() <= set(FILES)


@pytest.mark.parametrize(
    ("text", "verbs", "expected"),
    [
        ("allow more (--max-bad-rows)", ("train", "eval"), []),
        ("truncate more (--max-length)", ("train", "eval"), ["--max-length"]),
        ("truncate more (--max-length of spafit train)", ("train", "eval"), []),
        ("truncate more (--max-length of spafit eval)", ("train",), ["--max-length"]),
        ("try --no-such-option", (), ["--no-such-option"]),
        ("spafit plan --epochs 3", (), ["--epochs"]),
        ("spafit train --epochs 3", ("eval",), []),
    ],
)
def test_it_finds_what_is_wrong(text: str, verbs: tuple[str, ...], expected: list[str]) -> None:
    assert wrong(f'"""--nothing."""\nx = f"{text}{{1}}"', verbs) == expected

"""The reference of the command line has every verb, with every option."""

import commands
import pytest

from spafit.cli.parser import VERBS, build_parser


@pytest.mark.parametrize("name", VERBS)
def test_every_option_is_there(name: str) -> None:
    text = commands.reference()
    _, _, section = text.partition(f"\n## {name}\n")
    section = section.partition("\n## ")[0]
    assert f"| [`spafit {name}`](#{name}) | {VERBS[name].SUMMARY} |" in text
    assert VERBS[name].EXAMPLES.splitlines()[0] in section
    hidden = "--no-frozen-dropout"  # an older name, which help leaves out
    for option in set(build_parser().verbs[name].options()) - {hidden}:
        assert option in section


def test_it_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        texts.append(commands.reference())
    assert texts[0] == texts[1]

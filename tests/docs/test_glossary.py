"""Every name in the glossary is where the glossary says.

Oracles: the sources; the techniques and methods that there are.
"""

import ast
import re

import pytest
import sources
from support import REPOSITORY

import spafit
from spafit import adapters
from spafit.methods import METHODS, OTHERS, SHORT
from spafit.techniques import TECHNIQUES

PAGE = REPOSITORY / "docs" / "reference" / "glossary.md"
TEXT = PAGE.read_text(encoding="utf-8")
TABLES = [
    [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, flags=re.MULTILINE)
]
ROWS = [row for table in TABLES for row in table[2:]]
NAME = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[([\w.]+)\]\(\.\./\.\./([\w./]+\.py)\)")
LINKS = sorted(set(LINK.findall(TEXT)))


def source_of(name: str, file: str) -> str:
    """Return the source of an object of a file."""
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    line = sources.line_of(REPOSITORY / file, name)
    [node] = [
        each
        for each in ast.walk(ast.parse(text))
        if isinstance(each, ast.stmt) and each.lineno == line
    ]
    return ast.get_source_segment(text, node) or ""


@pytest.mark.parametrize(("name", "file"), LINKS)
def test_a_link_leads_to_what_it_names(name: str, file: str) -> None:
    assert (REPOSITORY / file).name == name or sources.line_of(REPOSITORY / file, name)


@pytest.mark.parametrize("row", [row for row in ROWS if LINK.search(" ".join(row))], ids=repr)
def test_a_name_stands_where_the_glossary_says(row: list[str]) -> None:
    [(where, file)] = {link for cell in row for link in LINK.findall(cell)}
    names = NAME.findall(row[1])
    assert names, row
    text = source_of(where, file)
    for name in names:
        # H3 and H6 are only in the comment that gives the print.
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), (name, where)


def test_sizes_are_those_of_bert_large_and_of_the_paper() -> None:
    """Oracle: the defaults."""
    config, lora = spafit.BertConfig(), adapters.LoRA()
    said = {}
    for _, code, words in TABLES[0][2:]:
        if sized := re.search(r": (\d+)(?: in |$)", words):
            said[NAME.findall(code)[0]] = int(sized[1])
    assert len(said) == 7
    for name, size in said.items():
        assert size == getattr(config if hasattr(config, name) else lora, name), name


def test_all_techniques_and_methods_are_named() -> None:
    built_in = {name for name, each in TECHNIQUES.items() if each.__module__ == adapters.__name__}
    assert {NAME.findall(row[1])[0] for row in TABLES[3][2:]} == built_in
    named = {row[0].strip("`") for row in TABLES[5][2:]}
    assert {each for each in METHODS if "SPAFIT" not in each} | {*OTHERS} < named
    assert {row[1].strip("`") for row in TABLES[5][2:]} - {""} == set(SHORT)
    for name in named:
        assert spafit.plan(name, 24).num_layers == 24

"""Every equation is computed somewhere and tested somewhere.

Oracles: the paper's numbers, the registered techniques, and what the modules say that they merge.
"""

import inspect
import re

import equations
from support import REPOSITORY

from spafit import adaptable, adapters
from spafit.techniques import TECHNIQUES

COMPUTED = {place.label for place in equations.computed()}
TESTED = {place.label for place in equations.tested()}

# The techniques that come with spafit and add something, by their names in Python.
ADDED = {
    repr(technique()).partition("(")[0]: technique
    for technique in TECHNIQUES.values()
    if technique.__module__ == adapters.__name__ and not technique().writes_pretrained
}


def test_every_equation_of_the_paper_has_a_line() -> None:
    departures = {"5'", "7'", "10'"}
    assert {str(number) for number in range(1, 11)} | departures <= COMPUTED


def test_every_technique_has_a_line_and_so_has_its_merged_form() -> None:
    modules = [
        each
        for place in (adaptable, adapters)
        for _, each in inspect.getmembers(place, inspect.isclass)
        if issubclass(each, adaptable.Adaptable)
    ]
    merges = {name for module in modules for name in module.merges}
    merged = {f"{name} merged" for name, each in ADDED.items() if merges & set(each.trains)}
    assert len(merged) >= 4 and len(ADDED) >= 7
    assert ADDED.keys() | merged <= COMPUTED


def test_what_is_computed_is_tested_and_what_is_tested_is_computed() -> None:
    assert COMPUTED == TESTED


def test_the_table_has_a_row_for_each_and_its_links_lead_to_the_lines() -> None:
    rows = equations.table().splitlines()[2:]
    assert [re.match(r"\| `(.+?)` ", row)[1] for row in rows][:4] == ["1", "2", "3", "4"]
    assert len(rows) == len(list(equations.computed()))
    for row in rows:
        [code, *tests] = re.findall(r"\[([^]]+):(\d+)\]\(\.\./\.\./([^)]+)\)", row)
        assert tests, row
        assert code[2].endswith(code[0])
        for text, line, file in [("# Eq. (", *code[1:]), *tests]:
            lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
            assert text.replace(" ", "_") in lines[int(line) - 1].replace(" ", "_"), (file, line)

"""Thousands of damaged data files: each is read correctly, or refused with its name and line."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fuzzed_tsv import Case, make_case
from support.plain_reader import FIELDS, FORMS, LABELS, Expected
from support.sweeps import quick

from spafit import glue
from spafit.errors import DataError
from spafit.tasks import reading
from spafit.tasks.glue import TASKS

CHUNKS = 4


def outcome(root: Path, case: Case) -> Expected:
    """Read a case by the package; check what a refusal says."""
    path = root / case.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(case.content)
    try:
        if case.through_load:
            assert case.split is not None
            data = glue.load(case.name, case.split, root, max_bad_rows=case.max_bad)
        else:
            data = glue.read_file(case.name, path, case.split, max_bad_rows=case.max_bad)
    except DataError as error:
        message = str(error)
        assert message.startswith(str(path)), message
        assert len(message.splitlines()) == 1, message
        assert len(message) <= len(str(path)) + (600 if case.split else 900), message
        rest = message.removeprefix(f"{path}, line ")
        return Expected(refused=True, line=None if rest == message else int(rest.split(":")[0]))
    finally:
        path.unlink()
    assert data.sha256 == hashlib.sha256(case.content).hexdigest()
    assert (data.source, data.split) == (str(path), case.split or "input")
    rows = tuple((e.index, e.text_a, e.text_b, e.label) for e in data.examples)
    return Expected(rows, data.bad_rows)


def differing(root: Path, numbers: range) -> Iterator[tuple[Case, str]]:
    """Return the cases of which something else becomes than is to."""
    for number in numbers:
        case = make_case(number)
        try:
            found = outcome(root, case)
        except Exception as error:  # any at all is a finding
            yield case, f"{type(error).__name__}: {error!s:.500}"
            continue
        wanted = case.expected
        if found != wanted:
            yield case, f"found {found!r:.500}, expected {wanted!r:.500}"


class TestFuzz:
    """Oracle: plain_reader.expected, a reader of its own, in both directions."""

    @pytest.mark.parametrize("chunk", quick(range(CHUNKS), range(CHUNKS // 2)))
    def test_every_file_is_read_right_or_refused_at_its_line(
        self,
        tmp_path: Path,
        sized: Callable[[int, int], int],
        promise: Callable[[str, int, str], None],
        chunk: int,
    ) -> None:
        size = sized(5_000, 50_000) // CHUNKS
        for case, said in differing(tmp_path, range(chunk * size, (chunk + 1) * size)):
            pytest.fail(f"{case}: {said}")
        promise("fuzzed data files", size, "0 other exceptions")

    def test_the_files_are_of_all_kinds(self) -> None:
        """Both ends are tried often, of every task, split and kind, and every mutation."""
        cases = [make_case(number) for number in range(2_000)]
        wanted = [case.expected for case in cases]
        assert 0.3 < sum(each.refused for each in wanted) / len(cases) < 0.7
        assert sum(each.bad_rows > 0 for each in wanted) > 50
        assert sum(each.refused and each.line is None for each in wanted) > 20
        lines = Counter(each.line for each in wanted if each.refused)
        assert all(lines[number] > 10 for number in range(1, 7)), lines
        seen = Counter(
            (case.name, case.kind, each.refused) for case, each in zip(cases, wanted, strict=True)
        )
        assert len(seen) == 11 * 2 * 2
        assert {(case.name, case.form.file) for case in cases} == {
            (name, form.file) for name, forms in FORMS.items() for form in forms.values()
        }
        assert len({name for case in cases for name in case.made_by}) == 26
        assert make_case(7) == make_case(7)

    def test_the_oracles_table_is_that_of_the_package(self) -> None:
        """Both are written from GLUE's own files; a slip in one shows here."""
        for name, task in TASKS.items():
            assert LABELS[name] == dict(zip(task.spelling, task.labels, strict=True))
            assert FIELDS[name] == task.fields
            for split, form in FORMS[name].items():
                theirs = task.split(split)
                places = (theirs.text_a, theirs.text_b, theirs.label)
                assert places == (form.text_a, form.text_b, form.label)
                assert theirs.has_header == form.has_header
                assert len(theirs.columns) == len(form.header)
                assert theirs.columns == form.header or not form.has_header


def _text_mode(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removesuffix("\n")


def _split_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(path.read_text("utf-8-sig").splitlines(), start=1)
    except ValueError as error:
        raise DataError(f"{path}, line 1: {error}") from None


def _from_zero(path: Path) -> Iterator[tuple[int, str]]:
    return ((number - 1, line) for number, line in LINES(path))


def _any_float(task: glue.Task, text: str) -> glue.Label:
    if task.is_regression:
        try:
            return glue._checked_score(task, float(text))
        except ValueError:
            raise DataError("no number") from None
    return LABEL(task, text)


def _stripped(task: glue.Task, text: str) -> glue.Label:
    return LABEL(task, text.strip())


def _lenient(task: glue.Task, form: glue.Split, line: str) -> reading.Fields:
    fields = line.split("\t")
    return ROW(task, form, "\t".join(fields[: len(form.columns)]))


def _unchecked_form(
    task: glue.Task, split: str | None, path: Path
) -> tuple[glue.Split, Iterator[tuple[int, str]]]:
    form, lines = task.split(split or "test"), LINES(path)
    if form.has_header:
        next(lines, None)
    return form, lines


LINES, LABEL, ROW = reading.lines, glue._label_from_text, glue._from_line


class TestTheTester:
    """Oracle: readers with one fault each, such as are often written; all are found."""

    @pytest.mark.parametrize(
        ("function", "instead"),
        [
            ("lines", _text_mode),
            ("lines", _split_lines),
            ("lines", _from_zero),
            ("_label_from_text", _any_float),
            ("_label_from_text", _stripped),
            ("_from_line", _lenient),
            ("no_duplicates", dict),
            ("NUMBER", re.compile(r"[\d.]+")),
            ("shown", repr),
            ("_tsv_form", _unchecked_form),
            ("_checked_score", lambda _, score: float(score)),
        ],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )
    def test_a_wrong_reader_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, instead: object
    ) -> None:
        for module in (glue, reading):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, instead)
        found = next(differing(tmp_path, range(3_000)), None)
        assert found is not None
        monkeypatch.undo()
        assert outcome(tmp_path, found[0]) == found[0].expected

    def test_json_is_not_read_by_a_hook_that_takes_the_last(self) -> None:
        """What ``dict`` as a hook stands for above."""
        assert json.loads('{"a": 1, "a": 2}', object_pairs_hook=dict) == {"a": 2}

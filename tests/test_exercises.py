"""The exercises of docs/exercises: the solutions pass the students' tests, the skeletons do not."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support import REPOSITORY

EXERCISES = REPOSITORY / "docs" / "exercises"
NAMES = sorted(path.stem for path in (EXERCISES / "solutions").glob("*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def students_tests(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Callable[[], None]]:
    """Return the tests of an exercise, which find the answer of that folder under its name."""
    monkeypatch.setitem(sys.modules, name, load(folder / f"{name}.py"))
    module = load(EXERCISES / f"test_{name}.py")
    return [each for key, each in vars(module).items() if key.startswith("test_")]


@pytest.mark.parametrize("name", NAMES)
class TestExercises:
    """Oracle: the tests that a student runs."""

    def test_the_solution_passes(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        tests = students_tests(name, EXERCISES / "solutions", monkeypatch)
        assert tests
        for test in tests:
            test()

    def test_the_skeleton_fails(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for test in students_tests(name, EXERCISES, monkeypatch):
            with pytest.raises(NotImplementedError):
                test()

    def test_the_page_shows_it(self, name: str) -> None:
        """Skeleton, command and solution, under the number that they have themselves."""
        page = (EXERCISES / "index.md").read_text("utf-8")
        [section] = [each for each in page.split("\n## ") if f" {name}.py" in each]
        for shown in (f" solutions/{name}.py", f"exercises/test_{name}.py"):
            assert shown in section
        number = section.partition(".")[0]
        for file, words in (
            (f"{name}.py", "Exercise"),
            (f"test_{name}.py", "Tests of exercise"),
            (f"solutions/{name}.py", "Solution"),
        ):
            first = (EXERCISES / file).read_text("utf-8").splitlines()[0]
            assert re.match(rf'"""{words} {number}[.:]', first), first


def test_nothing_lies_there_without_a_solution() -> None:
    files = {path.stem.removeprefix("test_") for path in EXERCISES.glob("*.py")}
    assert files == set(NAMES)

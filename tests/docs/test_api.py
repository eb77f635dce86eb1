"""The reference documents every public name, under the headings of ``__all__``."""

import re

import api

import spafit


def test_every_public_name_is_documented_once() -> None:
    """Oracle: ``__all__``; the version, which is no capability, has no heading there."""
    text = api.reference()
    documented = re.findall(r"^\.\. auto\w+:: spafit\.([\w.]+)$", text, flags=re.MULTILINE)
    assert [each for each in documented if "." not in each] == [
        each for each in spafit.__all__ if each != "__version__"
    ]
    assert len(set(documented)) == len(documented)


def test_a_module_is_documented_with_its_own_names_alone() -> None:
    text = api.reference()
    assert ".. autofunction:: spafit.glue.load" in text
    assert "spafit.glue.Dataset" not in text
    assert ".. autoclass:: spafit.interop.TrainerModel" in text


def test_two_names_with_one_description_stay_together() -> None:
    lines = ["Attributes", "a, b : int", "    Two.", "c : int, optional", "d, e and f"]
    api._keep_names_together(None, "class", "C", None, {}, lines)
    assert lines[1] == "a,\u00a0b : int"
    assert lines[3:] == ["c : int, optional", "d, e and f"]


def test_the_headings_are_those_of_the_list() -> None:
    assert list(api.names())[:2] == ["The model and its weights", "Text"]
    assert api.names()["Errors"][0] == "SpafitError"

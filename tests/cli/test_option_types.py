"""The values of options for data of one's own. Oracle: written out by hand."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from spafit.cli.option_types import as_class_weights, as_delimiter, as_name


@pytest.mark.parametrize("text", ["tab", "\\t", "\t", ";"])
def test_delimiters(text: str) -> None:
    assert as_delimiter(text) == (";" if text == ";" else "\t")


@pytest.mark.parametrize("text", ["", "ab", '"', " ", "\n", "\x07"])
def test_what_is_no_delimiter(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not one character"):
        as_delimiter(text)


def test_a_folder_that_is_there_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a\nb"
    with pytest.raises(argparse.ArgumentTypeError, match="nor a folder that is there"):
        as_name(str(folder))
    folder.mkdir()
    assert as_name(str(folder)) == str(folder)


def test_class_weights(tmp_path: Path) -> None:
    assert as_class_weights("balanced") == "balanced"
    file = tmp_path / "weights.json"
    file.write_text('{"spam": 2.0, "ham": 1}')
    assert as_class_weights(str(file)) == {"spam": 2.0, "ham": 1}
    file.write_text("[2.0, 1]")
    with pytest.raises(argparse.ArgumentTypeError, match="holds no JSON object of labels"):
        as_class_weights(str(file))

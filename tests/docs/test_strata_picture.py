"""The picture of the strata, in README.md, shows what the plan trains."""

import strata


def test_the_picture_is_drawn_from_the_plan() -> None:
    """Oracle: the picture drawn anew."""
    drawn = strata.draw(strata.summary())
    assert strata.PICTURE.read_text(encoding="utf-8") == drawn, "python docs/_ext/strata.py"

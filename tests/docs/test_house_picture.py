"""The picture of the house shows the imports as they are."""

import re
from collections import defaultdict

import house
from support.house import ROOMS, rooms


def test_the_picture_is_of_the_imports_as_they_are() -> None:
    """Oracle: the picture drawn anew."""
    assert house.PICTURE.read_text(encoding="utf-8") == house.draw(), "python docs/_ext/house.py"


def test_its_arrows_lead_to_all_that_a_room_imports_and_to_nothing_else() -> None:
    """Oracle: walking along the arrows."""
    to = defaultdict(set)
    for room, other in house.arrows():
        to[room].add(other)
    for room, imports in rooms().items():
        found, left = set(), [room]
        while left:
            ahead = to[left.pop()]
            found |= ahead
            left += ahead
        assert imports <= found
        assert to[room] <= imports


def test_every_room_has_a_box_that_says_what_it_is_for() -> None:
    drawn = house.draw()
    named = re.findall(r'class="name"[^>]*>(\w+)', drawn)
    assert sorted(named) == sorted(ROOMS)
    assert "Text to token ids" in drawn and "The command line." in drawn

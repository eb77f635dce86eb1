"""The pages that users read: README.md, then docs/guide in the order that its index gives."""

from __future__ import annotations

import re

from support import REPOSITORY

GUIDE = "docs/guide/"
INDEX = GUIDE + "index.md"


def page(name: str) -> str:
    """Return the text of a page, which is named from the root."""
    return (REPOSITORY / name).read_text(encoding="utf-8")


PAGES = {
    name: page(name)
    for name in (
        "README.md",
        INDEX,
        *(GUIDE + file for file in re.findall(r"^- \[.*\]\((\w+\.md)\)", page(INDEX), re.M)),
    )
}
EVERY_PAGE = "\n".join(PAGES.values())


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and the text of each fenced block."""
    return re.findall(r"^```([\w{}]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)

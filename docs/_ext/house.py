"""Draw the rooms of the package and what each imports, from the imports: ``docs/house.svg``.

``python docs/_ext/house.py`` draws it anew. An arrow leads from a room to one that it imports; an
import that a way over a third room says already is not drawn.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.house import PACKAGE, rooms  # noqa: E402

PICTURE = ROOT / "docs" / "house.svg"
_WIDTH, _BOX, _HEIGHT, _GAP = 1020, 320, 92, 34
_CORE = "The paper: spafit/*.py, kernels/ and trunk/. It imports torch and numpy alone."


def arrows() -> list[tuple[str, str]]:
    """Return the imports between rooms that no way over a third room says already."""
    imports = rooms()

    def reached(room: str) -> set[str]:
        return imports[room].union(*map(reached, imports[room]))

    return [
        (room, other)
        for room, others in imports.items()
        for other in sorted(others)
        if not any(other in reached(between) for between in others)
    ]


def levels() -> dict[str, int]:
    """Return the floor of each room: one above the highest room that it imports."""
    found: dict[str, int] = {}
    for room, others in rooms().items():  # from the ground up
        found[room] = 1 + max((found[each] for each in others), default=-1)
    return found


def _said(room: str) -> str:
    """Return what a room is for: the first line of its docstring."""
    if room == "core":
        return _CORE
    text = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].replace("``", "")


def draw() -> str:
    """Return the picture as SVG, legible on a light and on a dark page."""
    floors = levels()
    height = _GAP + (1 + max(floors.values())) * (_HEIGHT + _GAP)
    middle, boxes = {}, []
    for room, floor in floors.items():
        beside = [each for each in floors if floors[each] == floor]
        left = (_WIDTH - len(beside) * _BOX - (len(beside) - 1) * 24) // 2
        x = left + beside.index(room) * (_BOX + 24)
        y = height - (1 + floor) * (_HEIGHT + _GAP)
        middle[room] = (x + _BOX // 2, y)
        title = room if room == "core" else f"{room}/"
        boxes.append(f'<rect x="{x}" y="{y}" width="{_BOX}" height="{_HEIGHT}" rx="6"/>')
        boxes.append(f'<text class="name" x="{x + 12}" y="{y + 25}">{title}</text>')
        for number, line in enumerate(textwrap.wrap(_said(room), 38)):
            boxes.append(f'<text x="{x + 12}" y="{y + 46 + 17 * number}">{escape(line)}</text>')
    lines = []
    for room, other in arrows():
        (x, y), (to_x, to_y) = middle[room], middle[other]
        lines.append(f'<path d="M{x} {y + _HEIGHT} L{to_x} {to_y - 3}"/>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">
<title>The rooms of spafit: each imports those that its arrows lead to, and all below them</title>
<style>
text {{ font: 14px sans-serif; fill: #222; }}
.name {{ font: bold 17px monospace; }}
rect {{ fill: #f4f4f4; stroke: #333; stroke-width: 1.5; }}
path {{ stroke: #333; stroke-width: 2; marker-end: url(#tip); }}
</style>
<marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7"
orient="auto"><polygon points="0 0 10 5 0 10" fill="#333"/></marker>
<rect width="{_WIDTH}" height="{height}" style="fill: white; stroke: none"/>
{chr(10).join(lines + boxes)}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")

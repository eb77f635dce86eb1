"""Weight files that are damaged on purpose: each is made from a seed and its number alone.

A real file is split into parts, and one to four mutations are applied to the parts
(:mod:`hostile_headers`), the header's text or the bytes.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from support.hostile_headers import (
    STRUCTURAL,
    Draft,
    change_inside,
    dump,
    get,
    is_whole,
    parse,
    put,
)

# The header's text, whose length is set right again.


def mutate_text(draw: random.Random, text: bytes) -> bytes:
    """Pad, cut, overwrite or lengthen a header's text."""
    place = draw.randrange(len(text) + 1)
    action = draw.randrange(7)
    if action == 0:
        blanks = bytes(draw.choices(b" \t\n\r", k=draw.choice((1, 8, 300))))
        return draw.choice((blanks + text, text + blanks))
    if action == 1:
        return draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"[", b"1")) + text
    if action == 2:
        return text + draw.choice((b"}", b"{}", b"\0" * 8, b"x", b",", b"\xff"))
    if action == 3:
        put_in = (
            b"\xff",
            b"\xed\xa0\x80",
            b"\xc0\x80",
            b"\n",
            b"\0",
            b'"',
            b"\\",
            b"\\ud800",
            b"9",
        )
        return text[:place] + draw.choice(put_in) + text[place:]
    if action == 4:
        return text[:place] + text[place + draw.choice((1, 2, 30)) :]
    if action == 5:
        return text[:place] + bytes([draw.randrange(256)]) + text[place + 1 :]
    other = draw.randrange(len(text) + 1)
    return text[:place] + text[min(place, other) : max(place, other)] + text[place:]


def mutate_bytes(draw: random.Random, raw: bytes) -> bytes:
    """Flip, cut, add, remove or repeat bytes of a whole file."""
    content = bytearray(raw)
    header_end = min(len(content), 8 + int.from_bytes(content[:8], "little"))
    # Somewhere, in the length, in the header, at the header's end.
    limit = draw.choice((len(content), 8, header_end, header_end))
    place = draw.randrange(max(1, min(limit, len(content))))
    action = draw.randrange(8)
    if not content or action == 0:
        content += draw.choice((b"\0", b"\0" * 8, draw.randbytes(5)))
    elif action in (1, 2):
        content[place] ^= 1 << draw.randrange(8)
    elif action == 3:
        content[place] = draw.randrange(256)
    elif action == 4:
        del content[draw.choice((place, len(content) - 1)) :]
    elif action == 5:
        content[place:place] = draw.randbytes(draw.choice((1, 4, 8)))
    elif action == 6:
        del content[place : place + draw.choice((1, 4, 8))]
    else:
        (length,) = struct.unpack("<Q", bytes(content[:8]).ljust(8, b"\0"))
        length += draw.choice((-8, -1, 1, 8, 100, 10**6, 2**40))
        content[:8] = struct.pack("<Q", length % 2**64)
    return bytes(content)


@dataclass
class Case:
    """One folder of files, and how it was made."""

    files: dict[str, bytes]
    steps: list[str] = field(default_factory=list)


def mutate(draw: random.Random, raw: bytes, others: list[bytes], case: Case) -> bytes:
    """Do one to four things to a sound file; others lend their headers, entries and data."""
    draft = Draft.of(raw)
    count = draw.choice((1, 1, 1, 2, 2, 3, 4))
    kinds = draw.choices(("parts", "text", "bytes", "splice"), (14, 2, 3, 1), k=count)
    for kind in kinds:
        if kind == "parts":
            change = draw.choice(STRUCTURAL)
            change(draw, draft)
            case.steps.append(change.__name__)
        elif kind == "splice":
            splice(draw, draft, Draft.of(draw.choice(others)))
            case.steps.append(kind)
    text = dump(draft.header).encode("utf-8")
    for kind in kinds:
        if kind == "text":
            text = mutate_text(draw, text)
            case.steps.append(kind)
    content = draft.raw(text)
    for kind in kinds:
        if kind == "bytes":
            content = mutate_bytes(draw, content)
            case.steps.append(kind)
    return content


def splice(draw: random.Random, draft: Draft, other: Draft) -> None:
    """Take the header, the data or some entries from another file."""
    action = draw.randrange(3)
    if action == 0:
        draft.header = other.header
    elif action == 1:
        draft.data = other.data
    else:
        taken = other.header[draw.randrange(len(other.header)) :]
        draft.header += taken
        if draw.random() < 0.5:  # so that they fit again
            shift = len(draft.data)
            draft.data += other.data
            for _, each in taken:
                if is_whole(each):
                    put(each, "data_offsets", [at + shift for at in get(each, "data_offsets")])


INDEX = "model.safetensors.index.json"


def mutate_folder(draw: random.Random, files: dict[str, bytes], case: Case) -> dict[str, bytes]:
    """Damage a folder of several files: its index, one of the files, or which is which."""
    files = dict(files)
    shards = [name for name in files if name != INDEX]
    action = draw.randrange(5)
    case.steps.append(f"folder {action}")
    if action == 0:
        name = draw.choice(shards)
        files[name] = mutate(draw, files[name], [files[each] for each in shards], case)
    elif action == 1:
        node = parse(files[INDEX].decode())
        for _ in range(draw.randint(1, 2)):
            node = change_inside(draw, node)
        files[INDEX] = dump(node).encode()
    elif action == 2:
        files[INDEX] = mutate_text(draw, files[INDEX])
    elif action == 3:
        one, other = draw.sample(shards, 2)
        files[one], files[other] = files[other], files[one]
    else:
        files.pop(draw.choice(list(files)))
    return files


def make_case(
    seed: str, number: int, seeds: dict[str, dict[str, bytes]], only: str | None = None
) -> Case:
    """Make the folder of a number, from that and the seed alone.

    Parameters
    ----------
    seed, number
        Which.
    seeds : dict
        Name -> the files of a sound folder. One file is mutated as a file.
    only : str, optional
        The sound folder to take; None draws one.
    """
    draw = random.Random(f"{seed} {number}")
    name = draw.choice(list(seeds)) if only is None else only
    case = Case({}, [name])
    singles = [next(iter(files.values())) for files in seeds.values() if len(files) == 1]
    files = seeds[name]
    if len(files) > 1:
        case.files = mutate_folder(draw, files, case)
    else:
        case.files = {key: mutate(draw, raw, singles, case) for key, raw in files.items()}
    return case

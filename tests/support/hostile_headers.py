"""The header of a weight file in parts, and the mutations that make it hostile.

Order, duplicate keys and unusual literals are kept. Some mutations keep the file valid, so that
reading is tested too, and not only refusals.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4,
    "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""The types of the format that are read, and the bytes of one element."""


class Pairs(list[Any]):
    """A JSON object as a list of [key, value], in which a key may stand twice."""


class Raw(str):
    """JSON text to be written as it is, valid or not."""

    __slots__ = ()


def parse(text: str) -> Any:
    """Read JSON into lists, :class:`Pairs` and plain values."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


def dump(value: Any) -> str:
    """Write what :func:`parse` reads."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{dump(key)}:{dump(each)}" for key, each in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def clone(value: Any) -> Any:
    """Copy lists and Pairs, however deep."""
    return type(value)(map(clone, value)) if isinstance(value, list) else value


def get(pairs: Any, key: str) -> Any:
    """Return the first value of a key, or None."""
    return next((value for name, value in pairs if name == key), None)


@dataclass
class Draft:
    """A safetensors file in parts."""

    header: Pairs
    data: bytearray

    @classmethod
    def of(cls, raw: bytes) -> Draft:
        """Take a sound file apart."""
        (length,) = struct.unpack("<Q", raw[:8])
        return cls(parse(raw[8 : 8 + length].decode()), bytearray(raw[8 + length :]))

    def copy(self) -> Draft:
        """Copy it, to be changed."""
        return Draft(clone(self.header), bytearray(self.data))

    def raw(self, text: bytes | None = None) -> bytes:
        """Put the file together, with another header's text where it is given."""
        text = dump(self.header).encode() if text is None else text
        return struct.pack("<Q", len(text)) + text + self.data

    def entries(self) -> list[Any]:
        """List the [name, entry] pairs whose entries are whole."""
        return [pair for pair in self.header if pair[0] != "__metadata__" and is_whole(pair[1])]

    def pick(self, draw: random.Random) -> Any:
        """Draw one of them; a new one where there is none."""
        if not (entries := self.entries()):
            add_tensor(draw, self)
            entries = self.entries()
        return draw.choice(entries)


def is_whole(entry: Any) -> bool:
    """Return whether an entry still has a shape, a known type and two offsets that are numbers."""
    if not isinstance(entry, Pairs) or get(entry, "dtype") not in tuple(SIZES):
        return False
    offsets = get(entry, "data_offsets")
    numbers = isinstance(offsets, list) and all(type(offset) is int for offset in offsets)
    return numbers and len(offsets) == 2 and isinstance(get(entry, "shape"), list)


def put(pairs: Any, key: str, value: Any) -> None:
    """Replace the first value of a key."""
    for pair in pairs:
        if pair[0] == key:
            pair[1] = value
            return


def entry(dtype: str, shape: list[Any], offsets: list[Any]) -> Pairs:
    """Make the entry of a tensor."""
    return Pairs([["dtype", dtype], ["shape", shape], ["data_offsets", offsets]])


NAMES = (
    "", " ", "x", "__class__", "__metadata__", "__init__", "bert", "bert.", "a\nb", "a\rb", "\0",
    "\x1b[31m", "ä" * 50, "x" * 3000, "..", "../x", "classifier", "classifier.weight", "\u2028",
    "bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight", "cls.x", "cls.\n",
    "embeddings.position_ids", "embeddings.position_ids\n", "bert.encoder.layer.0.lora_A",
    "bert.embeddings.LayerNorm.gamma", "bert.encoder.layer.1.output.dense.bias_delta\n",
    Raw('"\\ud800"'), Raw('"a\\udc00b"'), Raw('"\\u0061"'),
)  # fmt: skip
NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 16, 255, -1, -8, 2**31, 2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63,
    2**64 - 1, 2**64, -(2**63), 10**30, Raw("9" * 4000), Raw("9" * 5000), 1.0, 0.5, -0.0,
    Raw("1e3"), Raw("1e999"), Raw("-1E-999"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"),
)  # fmt: skip
JUNK = (
    None, True, False, "", "F32", "4", "\n\n", [], Pairs(), [[]], [None], [1, 2], "x" * 3000,
    Pairs([["a", Pairs([["a", []]])]]), Raw("[" * 200 + "]" * 200), Raw("[" * 980 + "]" * 980),
    Raw("[" * 3000 + "]" * 3000), Raw('{"a":' * 300 + "1" + "}" * 300), Raw("[" * 50_000),
    Raw('"\\ud83d"'), Raw("nul"), Raw("'a'"), Raw("01"), Raw("+1"), Raw("1_000"), Raw("0x4"),
    Raw('"\\x41"'), Raw("[1,]"), Raw('{"a":1,"a":2}'), Raw("/* */ 1"), Raw(""),
)  # fmt: skip
DTYPES = (*SIZES, "f32", "F31", "", "F4", "F8_E8M0", "C64", "F32 ", "BF32", "I128", "float32")


def odd(draw: random.Random) -> Any:
    """Draw any value that has no place in a header."""
    return clone(draw.choice(draw.choice((NUMBERS, JUNK))))


# What follows changes a draft; the first group keeps a sound file sound.


def reorder(draw: random.Random, draft: Draft) -> None:
    """Write the header's entries in another order."""
    draw.shuffle(draft.header)


def reshape(draw: random.Random, draft: Draft) -> None:
    """Declare the same elements in another shape."""
    shape = get(draft.pick(draw)[1], "shape")
    if draw.random() < 0.5:
        shape.insert(draw.randint(0, len(shape)), 1)
    else:
        draw.shuffle(shape)


def retype(draw: random.Random, draft: Draft) -> None:
    """Declare another type of as many bytes."""
    _, one = draft.pick(draw)
    size = SIZES[get(one, "dtype")]
    put(one, "dtype", draw.choice([code for code, other in SIZES.items() if other == size]))


def rename(draw: random.Random, draft: Draft) -> None:
    """Give a tensor another name, which may be taken."""
    pair = draft.pick(draw)
    names = NAMES if draw.random() < 0.7 else [name for name, _ in draft.header]
    pair[0] = draw.choice(names)


def swap_names(draw: random.Random, draft: Draft) -> None:
    """Exchange the names of two tensors."""
    one, other = draft.pick(draw), draft.pick(draw)
    one[0], other[0] = other[0], one[0]


def swap_offsets(draw: random.Random, draft: Draft) -> None:
    """Exchange the places of two tensors, of one length where there are such."""
    one, other = draft.pick(draw)[1], draft.pick(draw)[1]
    start, end = get(one, "data_offsets")
    for _, each in draft.entries():
        first, last = get(each, "data_offsets")
        if last - first == end - start and draw.random() < 0.3:
            other = each
    places = get(one, "data_offsets"), get(other, "data_offsets")
    put(one, "data_offsets", places[1])
    put(other, "data_offsets", places[0])


def add_tensor(draw: random.Random, draft: Draft) -> None:
    """Add a tensor with its data at the end."""
    code = draw.choice(list(SIZES))
    shape = [draw.choice((0, 1, 2, 3, 6)) for _ in range(draw.randint(0, 3))]
    count = SIZES[code]
    for size in shape:
        count *= size
    start = len(draft.data)
    draft.data += bytes(draw.choice((0, 1)) for _ in range(count))
    name = draw.choice((f"new.{draw.randint(0, 9)}", draw.choice(NAMES)))
    place = draw.randint(0, len(draft.header))
    draft.header.insert(place, [name, entry(code, shape, [start, start + count])])


def remove_tensor(draw: random.Random, draft: Draft) -> None:
    """Take a tensor out; mostly with its data, and with what follows moved up."""
    pair = draft.pick(draw)
    draft.header.remove(pair)
    if draw.random() < 0.3:
        return
    start, end = get(pair[1], "data_offsets")
    if not 0 <= start <= end <= len(draft.data):
        return
    del draft.data[start:end]
    for _, each in draft.entries():
        offsets = get(each, "data_offsets")
        if offsets[0] >= end:
            put(each, "data_offsets", [offset - (end - start) for offset in offsets])


def new_values(draw: random.Random, draft: Draft) -> None:
    """Write other bytes over some data."""
    if draft.data:
        start = draw.randrange(len(draft.data))
        stop = min(len(draft.data), start + draw.choice((1, 4, 32)))
        draft.data[start:stop] = draw.randbytes(stop - start)


def sick_values(draw: random.Random, draft: Draft) -> None:
    """Write a NaN or an infinity over an element, of its type or of another."""
    _, one = draft.pick(draw)
    start, end = get(one, "data_offsets")
    code = get(one, "dtype")
    patterns = {
        "F64": (b"\0\0\0\0\0\0\xf8\x7f", b"\0\0\0\0\0\0\xf0\xff", b"\1\0\0\0\0\0\xf0\x7f"),
        "F32": (b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\1\0\x80\x7f"),
        "F16": (b"\0\x7e", b"\0\xfc", b"\1\x7c"),
        "BF16": (b"\xc0\x7f", b"\x80\xff", b"\x81\x7f"),
        "F8_E4M3": (b"\x7f", b"\xff"),
        "F8_E5M2": (b"\x7e", b"\xfc", b"\x7d"),
    }
    pattern = draw.choice(patterns.get(code, (b"\xff\xff",)))
    count = (end - start) // len(pattern)
    if count > 0 and 0 <= start <= end <= len(draft.data):
        place = start + len(pattern) * draw.choice((0, count - 1, draw.randrange(count)))
        draft.data[place : place + len(pattern)] = pattern


def change_metadata(draw: random.Random, draft: Draft) -> None:
    """Change, add, remove or double a key of the metadata, or replace them all."""
    metadata = get(draft.header, "__metadata__")
    if not isinstance(metadata, Pairs) or draw.random() < 0.1:
        draft.header.insert(0, ["__metadata__", draw.choice((Pairs(), Pairs([["a", "b"]])))])
        return
    action = draw.randrange(5)
    if action == 0 or not metadata:
        metadata.append([draw.choice(NAMES), draw.choice(("", "x", "pt", "a\nb", "x" * 3000))])
    elif action == 1:
        metadata.remove(draw.choice(metadata))
    elif action == 2:
        metadata.append(clone(draw.choice(metadata)))
    elif action == 3:
        draw.choice(metadata)[1] = draw.choice((odd(draw), draw.choice(NAMES)))
    else:
        put(draft.header, "__metadata__", odd(draw))


# The texts inside an adapter's metadata.

PLAN_VALUES = (
    "lora", "full", "frozen", "bias-delta", "bias-direct", "LoRA", "query", "layer.output.dense",
    "output.dense", "layer.attention.output.LayerNorm", "embeddings", "rte", "spafit-plan-1", "r",
)  # fmt: skip


def places(node: Any) -> list[tuple[Any, int]]:
    """List every (list, index) below a JSON value at which a value or a pair stands."""
    found = []
    if isinstance(node, list):
        for index, each in enumerate(node):
            found.append((node, index))
            found += places(each)
    return found


def change_inside(draw: random.Random, node: Any) -> Any:
    """Change one value, key or number somewhere in a JSON value."""
    found = places(node)
    if not found or draw.random() < 0.05:
        return odd(draw)
    inside, index = draw.choice(found)
    value = inside[index]
    action = draw.randrange(6)
    if type(value) is int:
        inside[index] = value + draw.choice((-1, 1, 0, 5))
    elif type(value) is float:
        inside[index] = value * draw.choice((0.5, -1, 2))
    elif isinstance(value, str) and action < 3:
        inside[index] = draw.choice((draw.choice(NAMES), draw.choice(PLAN_VALUES)))
    elif action == 3 and not (isinstance(inside, list) and len(inside) == 2):
        inside.insert(draw.randint(0, len(inside)), clone(value))
    elif action == 4 and not isinstance(value, list):
        inside[index] = odd(draw)
    elif action == 5 and isinstance(value, list) and type(inside) is not list:
        del inside[index]
    elif isinstance(value, list) and value:
        draw.shuffle(value)
    return node


def change_told(draw: random.Random, draft: Draft) -> None:
    """Change the plan, the task, the labels or the fingerprint that an adapter tells of."""
    metadata = get(draft.header, "__metadata__")
    told = ["plan", "plan", "plan", "task", "labels", "base_fingerprint", "spafit_adapter"]
    key = draw.choice(told)
    text = get(metadata, key) if isinstance(metadata, Pairs) else None
    if not isinstance(text, str):
        change_metadata(draw, draft)
        return
    if key not in ("plan", "task", "labels") or draw.random() < 0.1:
        place = draw.randrange(len(text) + 1)
        put(metadata, key, text[:place] + draw.choice(("0", " ", "\n", "\0", "}")) + text[place:])
        return
    try:
        node = parse(text)
    except (ValueError, RecursionError):
        return
    put(metadata, key, dump(change_inside(draw, node)))


# The header, by its parts.


def double(draw: random.Random, draft: Draft) -> None:
    """Write an entry, or a key inside of one, twice."""
    pair = draft.pick(draw)
    inside = draft.header if draw.random() < 0.5 else pair[1]
    again = clone(draw.choice(inside))
    if draw.random() < 0.3 and isinstance(again[1], list):
        again[1] = clone(draw.choice(draft.entries())[1])
    inside.insert(draw.randint(0, len(inside)), again)


def wrong_field(draw: random.Random, draft: Draft) -> None:
    """Put something else in the place of a type, a shape, the offsets or one number of theirs."""
    _, one = draft.pick(draw)
    key = draw.choice(("dtype", "shape", "data_offsets"))
    value = get(one, key)
    if key == "dtype":
        put(one, key, draw.choice((draw.choice(DTYPES), odd(draw))))
    elif draw.random() < 0.7 and isinstance(value, list) and value:
        value[draw.randrange(len(value))] = clone(draw.choice(NUMBERS))
    else:
        put(one, key, odd(draw))


def wide_shape(draw: random.Random, draft: Draft) -> None:
    """Declare an empty tensor of a shape that no memory could hold, or of many dimensions."""
    shapes = ([0, 2**62, 2**62], [2**40, 0, 2**40], [0] * 65, [0, 2**64], [1] * 80, [0] * 64)
    shape = list(draw.choice(shapes))
    start = len(draft.data) if draw.random() < 0.7 else 0
    draft.header.append(["wide", entry(draw.choice(("U8", "F64")), shape, [start, start])])


def move_offsets(draw: random.Random, draft: Draft) -> None:
    """Move a start, an end or both a little."""
    offsets = get(draft.pick(draw)[1], "data_offsets")
    step = draw.choice((-8, -4, -1, 1, 4, 8, 64))
    for index in draw.choice(((0,), (1,), (0, 1))):
        offsets[index] += step


def wrong_keys(draw: random.Random, draft: Draft) -> None:
    """Rename, remove or add a key of an entry, or put something else in the entry's place."""
    pair = draft.pick(draw)
    action = draw.randrange(4)
    if action == 0:
        draw.choice(pair[1])[0] = draw.choice(("shapes", "DTYPE", "", "offsets", "shape\0"))
    elif action == 1:
        pair[1].remove(draw.choice(pair[1]))
    elif action == 2:
        pair[1].append([draw.choice(("extra", "stride", "")), odd(draw)])
    else:
        pair[1] = odd(draw)


STRUCTURAL: tuple[Callable[[random.Random, Draft], None], ...] = (
    reorder, reshape, retype, rename, swap_names, swap_offsets, add_tensor, remove_tensor,
    new_values, sick_values, change_metadata, change_told, change_told, double, wrong_field,
    wrong_field, wide_shape, move_offsets, wrong_keys,
)  # fmt: skip

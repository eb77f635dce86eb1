"""Damaged GLUE files: ``make_case(i)`` makes the i-th from (SEED, i) alone.

plain_reader.py gives the expected result for each.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from support.plain_reader import BOM, FIELDS, FORMS, LABELS, Expected, Form, expected

SEED = 20_240_501

_WORDS = (
    'the a dog barked "quoted" "un quoted\' don\'t naïve 東京 שלום 😀 é \u200b\u200d \x08 \x1c '
    "\x0b \x0c \u0085 \u2028 \u2029 \xa0 \ufeff \ufffd \x00 \x7f \x1b[31m \\t \\N NULL nan "
    "-1 0 1 , ; # //"
).split(" ")
_ODD_LABELS = (
    " 1|1 |1.0|01|+1|-1|-0|2|nan|inf|-inf|1e3|1e0|1_0|0x1|\u0663|\uff11|\u00bd|yes|True|None|"
    "Entailment|entailment |not_entailment|neutral|contradiction|5.0001|5.|.5|4.99|-0.0|1e-400|"
    "1e400|0|1|5|3.8|\xa03|3\x00|1.2.3|e|.|+|999999999999999999999999|not entailment|acceptable"
).split("|")
ODD_LABELS = ["", *_ODD_LABELS, "9" * 5000, "0." + "1" * 5000, "x" * 10_000, "\ud7ff" * 300]


@dataclass
class Case:
    """One damaged file and how it is read."""

    number: int
    name: str
    split: str | None
    form: Form
    kind: str
    """"tsv" or "jsonl"."""
    max_bad: int
    through_load: bool
    content: bytes
    made_by: list[str]
    """The mutations, in order."""

    @property
    def file(self) -> str:
        """The path below GLUE's root."""
        return f"{self.form.folder}/{self.form.file.removesuffix('tsv')}{self.kind}"

    @property
    def expected(self) -> Expected:
        """What is to become of it."""
        return expected(self.content, self.name, self.split, self.max_bad, self.kind)

    def __str__(self) -> str:
        return (
            f"fuzzed_tsv.make_case({self.number}): {self.file} as {self.name}, split {self.split}, "
            f"max_bad_rows {self.max_bad}, load {self.through_load}, by {self.made_by}"
        )


def make_case(number: int) -> Case:
    """Make the file of a number, the same at every call."""
    draw = random.Random(f"{SEED}:{number}")
    name = draw.choice(list(FORMS))
    split = draw.choice(list(FORMS[name]))
    form = FORMS[name][split]
    kind = "jsonl" if draw.random() < 0.2 else "tsv"
    lines = _fresh(draw, name, form, kind)
    made_by: list[str] = []
    for _ in range(draw.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        mutate = draw.choice(_OF_LINES if kind == "tsv" else _OF_RECORDS)
        made_by.append(mutate.__name__.strip("_"))
        lines = mutate(draw, name, form, lines)
    end = draw.choice((b"\n", b"\n", b"\n", b"\r\n"))
    content = end.join(line.encode("utf-8", "surrogatepass") for line in lines)
    if draw.random() < 0.8:
        content += end
    if draw.random() < 0.1:
        content = BOM + content
    if draw.random() < 0.35:
        for _ in range(draw.randint(1, 3)):
            harm = draw.choice(_OF_BYTES)
            made_by.append(harm.__name__.strip("_"))
            content = harm(draw, content)
    max_bad = draw.choice((0, 0, 0, 1, 2, 5, 1000))
    is_load = draw.random() < 0.15
    asked = None if not is_load and draw.random() < 0.3 else split
    return Case(number, name, asked, form, kind, max_bad, is_load, content, made_by)


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(0, 7)))


def _fresh(draw: random.Random, name: str, form: Form, kind: str) -> list[str]:
    """Make the lines of a sound file."""
    lines = ["\t".join(form.header)] if form.has_header and kind == "tsv" else []
    for i in range(draw.choice((1, 2, 3, 5, 8, 13))):
        spelt = f"{draw.uniform(0, 5):.3f}" if name == "sts-b" else draw.choice(list(LABELS[name]))
        if kind == "tsv":
            fields = [str(i)] + [_text(draw) for _ in form.header[1:]]
            for place in (form.text_a, form.text_b):
                if place is not None:
                    fields[place] = _text(draw)
            if form.label is not None:
                fields[form.label] = spelt
            lines.append("\t".join(fields))
            continue
        record: dict[str, Any] = {field: _text(draw) for field in FIELDS[name]}
        if form.label is None:
            record["label"] = -1
        elif name == "sts-b":
            record["label"] = float(spelt)
        else:
            names = list(LABELS[name])
            record["label"] = draw.choice((names.index(spelt), LABELS[name][spelt]))
        lines.append(json.dumps({**record, "idx": i}, ensure_ascii=draw.random() < 0.5))
    return lines


def _put(lines: list[str], i: int, line: str) -> list[str]:
    return [*lines[:i], line, *lines[i + 1 :]]


def _any_row(draw: random.Random, lines: list[str]) -> int:
    """Choose a line, the header now and then."""
    return draw.randrange(len(lines))


Mutation = Callable[[random.Random, str, Form, list[str]], list[str]]


def _label_changed(draw: random.Random, name: str, form: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    fields = lines[i].split("\t")
    if form.label is not None and form.label < len(fields):
        fields[form.label] = draw.choice(ODD_LABELS)
    return _put(lines, i, "\t".join(fields))


def _tab_added(draw: random.Random, _: str, __: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    place = draw.randint(0, len(lines[i]))
    return _put(lines, i, lines[i][:place] + "\t" + lines[i][place:])


def _tab_removed(draw: random.Random, _: str, __: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    return _put(
        lines, i, lines[i].replace("\t", draw.choice(("", " ", "\\t")), draw.choice((1, 9)))
    )


def _row_cut(draw: random.Random, _: str, __: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    return _put(lines, i, lines[i][: draw.randint(0, len(lines[i]))])


def _row_split(draw: random.Random, _: str, __: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    place = draw.randint(0, len(lines[i]))
    return [*lines[:i], lines[i][:place], lines[i][place:], *lines[i + 1 :]]


def _empty_line(draw: random.Random, _: str, __: Form, lines: list[str]) -> list[str]:
    i = draw.randint(0, len(lines))
    return [*lines[:i], draw.choice(("", " ", "\r", "\t")), *lines[i:]]


def _something_in_a_text(draw: random.Random, _: str, form: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    fields = lines[i].split("\t")
    if form.text_a < len(fields):
        text = fields[form.text_a]
        place = draw.randint(0, len(text))
        odd = draw.choice(
            ('"', '""', '"a', "\r", "\r\r", "\u0085", "\u2028", "\x00", "\x1e", "\ufeff")
        )
        fields[form.text_a] = text[:place] + odd + text[place:]
    return _put(lines, i, "\t".join(fields))


def _huge_field(draw: random.Random, _: str, __: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    fields = lines[i].split("\t")
    place = draw.randrange(len(fields))
    fields[place] = draw.choice(("x", "9", "\x00", "é", "[")) * draw.choice((1000, 70_000))
    return _put(lines, i, "\t".join(fields))


def _columns_swapped(draw: random.Random, _: str, __: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    fields = lines[i].split("\t")
    draw.shuffle(fields)
    return _put(lines, i, "\t".join(fields))


def _header_changed(draw: random.Random, _: str, form: Form, lines: list[str]) -> list[str]:
    header = "\t".join(form.header)
    return draw.choice(
        (
            lines[1:] or [""],
            [header, *lines],
            [header.upper(), *lines[1:]],
            [header + " ", *lines[1:]],
            [header.replace("\t", ","), *lines[1:]],
            ["\t".join((*form.header, "more")), *lines[1:]],
            [*lines[1:], header],
            [header],
        )
    )


def _header_of_another_split(
    draw: random.Random, name: str, _: Form, lines: list[str]
) -> list[str]:
    other = draw.choice(list(FORMS[name].values()))
    return ["\t".join(other.header), *lines[1:]]


def _file_of_another_task(draw: random.Random, _: str, __: Form, ___: list[str]) -> list[str]:
    name = draw.choice(list(FORMS))
    return _fresh(draw, name, draw.choice(list(FORMS[name].values())), "tsv")


def _rows_doubled(draw: random.Random, _: str, __: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    return [*lines[:i], *[lines[i]] * draw.choice((2, 3, 40)), *lines[i + 1 :]]


_OF_LINES: tuple[Mutation, ...] = (
    _label_changed,
    _label_changed,
    _tab_added,
    _tab_removed,
    _row_cut,
    _row_split,
    _empty_line,
    _something_in_a_text,
    _something_in_a_text,
    _something_in_a_text,
    _huge_field,
    _columns_swapped,
    _header_changed,
    _header_of_another_split,
    _file_of_another_task,
    _rows_doubled,
)


def _value_changed(draw: random.Random, name: str, _: Form, lines: list[str]) -> list[str]:
    """Write something else for the label, a text or an unknown key."""
    i = _any_row(draw, lines)
    try:
        record = json.loads(lines[i])
    except (ValueError, RecursionError):
        return lines
    if not isinstance(record, dict):
        return lines
    key = draw.choice(("label", "label", "label", *FIELDS[name], "idx", "more"))
    value = draw.choice(
        (
            "0", "1", "2", "3", "5", "-1", "-1.0", "-2", "1.0", "0.5", "4.999", "5.01",
            "true", "false", "null", "NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "9" * 5000,
            '""', '"1"', '"entailment"', '"acceptable"', '"\\ud800"', '"\\ud83d\\ude00"',
            '"a\\u0000b\\nc"', "[]", "{}", '{"a": 1, "a": 2}', "[" * 90 + "]" * 90, "[" * 100_000,
            "\uff11", "1_0", "01", "+1", "'x'", "undefined", '"' + "x" * 70_000 + '"',
            '"\\x"', '"\t"', '"\u2028"',
        )
    )  # fmt: skip
    rest = {k: v for k, v in record.items() if k != key}
    written = json.dumps(rest, ensure_ascii=False)[1:-1]
    return _put(lines, i, "{" + ", ".join(filter(None, (written, f'"{key}": {value}'))) + "}")


def _key_twice(draw: random.Random, name: str, _: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    key = draw.choice(("label", *FIELDS[name], "idx", "a\\nb"))
    more = f'"{key}": 1, "{key}": "x", ' if "\\" in key else f'"{key}": 1, '
    return _put(lines, i, lines[i].replace("{", "{" + more, 1))


def _key_removed(draw: random.Random, name: str, _: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    key = draw.choice(("label", *FIELDS[name], "idx"))
    return _put(lines, i, lines[i].replace(f'"{key}"', f'"{key.upper()}"', 1))


def _no_object(draw: random.Random, _: str, __: Form, lines: list[str]) -> list[str]:
    i = _any_row(draw, lines)
    odd = ("[]", "null", "1", '"x"', "NaN", "[" + lines[i] + "]", lines[i] * 2, lines[i] + ",", "{")
    return _put(lines, i, draw.choice(odd))


_OF_RECORDS: tuple[Mutation, ...] = (
    _value_changed,
    _value_changed,
    _value_changed,
    _key_twice,
    _key_removed,
    _no_object,
    _row_cut,
    _row_split,
    _empty_line,
    _rows_doubled,
)


def _byte_flipped(draw: random.Random, content: bytes) -> bytes:
    if not content:
        return content
    i = draw.randrange(len(content))
    return content[:i] + bytes([content[i] ^ (1 << draw.randrange(8))]) + content[i + 1 :]


def _bytes_put_in(draw: random.Random, content: bytes) -> bytes:
    i = draw.randint(0, len(content))
    odd = (
        b"\x00",
        b"\r",
        b"\n",
        b"\r\n",
        b"\t",
        BOM,
        b"\xff\xfe",
        b"caf\xe9",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xc2\x85",
        b"\xe2\x80\xa8",
        b"\x80",
        b'"',
    )
    return content[:i] + draw.choice(odd) + content[i:]


def _bytes_removed(draw: random.Random, content: bytes) -> bytes:
    i = draw.randint(0, len(content))
    return content[:i] + content[i + draw.choice((1, 1, 2, 7, 60)) :]


def _cut(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randint(0, len(content))]


def _ends_mixed(draw: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    return b"".join(line + draw.choice((b"\n", b"\r\n", b"\n", b"\r")) for line in lines)


def _last_newline_removed(_: random.Random, content: bytes) -> bytes:
    return content.removesuffix(b"\n")


def _in_another_encoding(draw: random.Random, content: bytes) -> bytes:
    text = content.decode("utf-8", "replace")
    return text.encode(
        draw.choice(("latin-1", "utf-16", "utf-16-le", "utf-32", "utf-7")), "replace"
    )


def _packed(_: random.Random, content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def _emptied(draw: random.Random, _: bytes) -> bytes:
    return draw.choice((b"", BOM, b"\n", b"\r\n", b"\x00" * 4096))


Harm = Callable[[random.Random, bytes], bytes]
_OF_BYTES: tuple[Harm, ...] = (
    _byte_flipped,
    _byte_flipped,
    _byte_flipped,
    _bytes_put_in,
    _bytes_put_in,
    _bytes_removed,
    _cut,
    _ends_mixed,
    _last_newline_removed,
    _in_another_encoding,
    _packed,
    _emptied,
)

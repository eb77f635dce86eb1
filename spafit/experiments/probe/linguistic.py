"""Simple linguistic tasks that need no download: what a layer knows of a sentence's structure.

- ``pos``: is a word of the sentence, given as the second text, a noun or a verb there? Both words
  that are asked about can be either: "They dance before the play." and "They play before the
  dance."
- ``number``: is the subject singular or plural? "Behind the keys the cabinet near the books
  vanished." The verb does not show it, and another noun stands between it and the subject.
- ``depth``: how deep are the clauses nested, 1 to 4? "Anna knew that Ben guessed that Carla swore,
  and Dora wept ..." is 2 deep so far.
- ``order``: are two neighbouring words swapped? "The old farmer the followed dog."

A bag of words tells nothing of any label: the sentences come in groups, one for each label, whose
words are the same in another order (of ``depth``: whose kinds of words are the same, and as many
"that" and "and"; the rest is drawn). Train and dev share no noun, verb or name in question and no
sentence; the seed draws which are dev's. The labels are exactly balanced.

The same seed gives the same sentences on every machine and every version of Python: only
``random()`` of its random generator is used, the one method whose numbers Python keeps stable.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from spafit.errors import DataError
from spafit.tasks.task import Dataset, Example, Task

_Thing = TypeVar("_Thing")

_METRICS = ("accuracy",)
TASKS = {
    task.name: task
    for task in (
        Task("pos", ("sentence", "word"), ("noun", "verb"), _METRICS, display="Part of speech"),
        Task(
            "number",
            ("sentence",),
            ("singular", "plural"),
            _METRICS,
            display="Number of the subject",
        ),
        Task("depth", ("sentence",), ("1", "2", "3", "4"), _METRICS, display="Depth of nesting"),
        Task("order", ("sentence",), ("kept", "swapped"), _METRICS, display="Word order"),
    )
}
"""The tasks by name."""

# Words that are a noun and a verb in the same form, with any subject and after any article.
EITHER = """walk talk dance play drink fight call visit answer attack dream joke laugh smile sleep
    swim run ride race march protest vote test search travel work rest wait cry shout whisper climb
    fall jump kick kiss cough sneeze sail draw fish hunt camp debate dispute guess""".split()
_POS = """They {v} before the {n}.
    The {n} made us {v}.
    We often {v} after the {n}.
    During the {n} you should {v}.
    You {v} because the {n} was good.
    The long {n} let them {v} again.
    I will {v} when the {n} ends.
    After that {n} the children {v}.
    Most people {v} without their {n}.
    That {n} was why they {v}.
    To {v} is better than the {n}.
    If the {n} is over we can {v}.""".split("\n")

# Singular and plural.
NOUNS = """key keys|cabinet cabinets|teacher teachers|dog dogs|picture pictures|letter letters|
    farmer farmers|boat boats|bottle bottles|painter painters|chair chairs|lamp lamps|
    singer singers|horse horses|table tables|doctor doctors|wagon wagons|pilot pilots|
    basket baskets|ladder ladders|garden gardens|driver drivers|window windows|tower towers|
    nurse nurses|statue statues|bicycle bicycles|student students|kettle kettles|rabbit rabbits|
    engine engines|barrel barrels|actor actors|carpet carpets|bridge bridges|lawyer lawyers|
    hammer hammers|pigeon pigeons|blanket blankets|soldier soldiers|cottage cottages|tailor tailors|
    violin violins|candle candles|sailor sailors|trumpet trumpets|donkey donkeys|mirror mirrors"""
_NUMBERS = [tuple(pair.split()) for pair in NOUNS.split("|")]
_PLACES = "near beside behind beyond above below opposite by".split()
_EVENTS = """vanished arrived fell moved remained disappeared stayed changed
    suffered survived waited returned""".split()

NAMES = """Anna Ben Carla David Emma Frank Grace Henry Ivan Julia Karl Laura Martin Nina Oscar Paula
    Robert Sarah Thomas Victor Wendy Peter Helen George Alice Simon Ruth Daniel Clara Philip Martha
    Edward Lucy Walter Rose Hugo""".split()
# Each can stand alone, and with a clause.
SAYING = """knew guessed swore shouted whispered dreamed forgot remembered understood agreed
    answered boasted complained believed noticed replied heard saw explained worried insisted
    objected promised confessed""".split()
_ADVERBS = "often never always once later still soon also then".split()

_ADJECTIVES = "old young tall quiet clever tired hungry happy brave angry little strange".split()
_ACTIONS = """followed watched helped found painted carried pushed loved feared admired
    avoided visited""".split()

_Group = dict[tuple[str, str | None], str]
"""Texts with their labels, each label as often."""


class _Draw:
    """Draws from lists by ``random()`` alone."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def one(self, words: Sequence[_Thing]) -> _Thing:
        return words[int(self.rng.random() * len(words))]

    def shuffled(self, things: Sequence[_Thing]) -> list[_Thing]:
        return sorted(things, key=lambda _: self.rng.random())

    def some(self, words: Sequence[str], count: int) -> list[str]:
        return self.shuffled(words)[:count]


def _pos(draw: _Draw, number: int, words: list[str]) -> _Group:
    pattern = _POS[number % len(_POS)].strip()
    group: _Group = {}
    x, y = draw.some(words, 2)
    for n, v in ((x, y), (y, x)):
        sentence = pattern.format(n=n, v=v)
        group |= {(sentence, n): "noun", (sentence, v): "verb"}
    return group


def _number(draw: _Draw, number: int, words: list[str]) -> _Group:
    """Two sentences whose subject and one other noun have changed places.

    In every other pair this one stands before the subject, and a third, of any number, between
    subject and verb: so neither the first noun tells the subject's number, nor how many are plural.
    """
    one, two, three = (noun.split() for noun in draw.some(words, 3))
    place, other, event = draw.one(_PLACES), draw.one(_PLACES), draw.one(_EVENTS)
    adverb = draw.one(["", *(f" {each}" for each in _ADVERBS)])
    last = draw.one(three)
    singular, plural = draw.shuffled([f"{one[0]} {two[1]}", f"{two[0]} {one[1]}"])[0].split()
    group: _Group = {}
    for subject, another, label in (
        (singular, plural, "singular"),
        (plural, singular, "plural"),
    ):
        if number % 2:
            text = f"The {subject} {place} the {another}{adverb} {event}."
        else:
            text = f"{other.capitalize()} the {another} the {subject} {place} the {last}"
            text += f"{adverb} {event}."
        group[text, None] = label
    return group


# How many clauses after "that" hang below each of four sentences, four in all: by the deepest.
_NESTED: dict[str, list[tuple[int, ...]]] = {
    str(depth): [
        below
        for below in itertools.product(range(5), repeat=4)
        if sum(below) == 4 and max(below) == depth
    ]
    for depth in (1, 2, 3, 4)
}


def _depth(draw: _Draw, number: int, words: list[str]) -> _Group:
    """Four sentences of eight clauses each, four of them after "that", three after "and"."""
    group: _Group = {}
    for label, forms in _NESTED.items():
        verbs = iter(draw.some([each for each in words if each in SAYING], 8))
        names = iter(draw.some([each for each in words if each in NAMES], 8))
        parts = []
        for below in draw.one(forms):
            clauses = []
            for _ in range(1 + below):
                adverb = draw.one(["", "", *(f"{each} " for each in _ADVERBS)])
                clauses.append(f"{next(names)} {adverb}{next(verbs)}")
            parts.append(" that ".join(clauses))
        group[", and ".join(parts) + ".", None] = label
    return group


def _order(draw: _Draw, number: int, words: list[str]) -> _Group:
    """Return a sentence, and the same with two neighbours swapped, but for its first word.

    No two neighbours are of a kind, so that no swap gives another sentence.
    """
    nouns = [noun for pair in draw.some(words, 3) for noun in [draw.one(pair.split())]]
    text = f"the {draw.one(_ADJECTIVES)} {nouns[0]} {draw.one(_ACTIONS)} the {nouns[1]}"
    text += f" {draw.one(_PLACES)} the {draw.one(_ADJECTIVES)} {nouns[2]}"
    kept = ["The", *text.split()[1:]]
    at = 1 + int(draw.rng.random() * (len(kept) - 2))
    swapped = [*kept[:at], kept[at + 1], kept[at], *kept[at + 2 :]]
    return {(" ".join(kept) + ".", None): "kept", (" ".join(swapped) + ".", None): "swapped"}


_PAIRS_OF_NOUNS = [" ".join(pair) for pair in _NUMBERS]
_MAKERS: dict[str, tuple[Callable[[_Draw, int, list[str]], _Group], tuple[list[str], ...]]] = {
    "pos": (_pos, (EITHER,)),
    "number": (_number, (_PAIRS_OF_NOUNS,)),
    "depth": (_depth, (NAMES, SAYING)),
    "order": (_order, (_PAIRS_OF_NOUNS,)),
}


def datasets(
    name: str, seed: int = 0, train_size: int = 2000, dev_size: int = 1000
) -> tuple[Dataset, Dataset]:
    """Return train and dev as :func:`spafit.glue.load` returns those of a GLUE task.

    All sentences are distinct (those of ``pos`` are asked about twice, once for each word).

    Parameters
    ----------
    name : str
        One of :data:`TASKS`.
    seed : int
        Determines which words are dev's, and the choice and the order of the sentences.
    train_size, dev_size : int
        Numbers of rows, multiples of 4 up to 4,000: of ``pos`` there are few more.

    Raises
    ------
    DataError
        If there is no such task, or a size is none of these.
    """
    if name not in TASKS:
        raise DataError(f"{name!r:.80} is no linguistic task; they are {', '.join(TASKS)}")
    for size in (train_size, dev_size):
        if size % 4 or not 4 <= size <= 4_000:
            raise DataError(f"the sizes must be multiples of 4 from 4 to 4,000, found {size}")
    make, pools = _MAKERS[name]
    draw = _Draw(3 * seed)
    for_train: list[str] = []
    for_dev: list[str] = []
    for pool in pools:
        words = draw.shuffled(pool)
        third = len(pool) // 3
        for_dev += words[:third]
        for_train += words[third:]
    parts = []
    for number, (split, size, words) in enumerate(
        (("train", train_size, for_train), ("dev", dev_size, for_dev)), start=1
    ):
        rows = _rows(make, _Draw(3 * seed + number), size, words)
        examples = tuple(
            Example(index, text, word, label) for index, ((text, word), label) in enumerate(rows)
        )
        source = f"spafit.experiments.probe.linguistic, {name}, seed {seed}"
        parts.append(Dataset(TASKS[name], split, examples, source))
    return parts[0], parts[1]


def _rows(
    make: Callable[[_Draw, int, list[str]], _Group], draw: _Draw, size: int, words: list[str]
) -> list[tuple[tuple[str, str | None], str]]:
    found: _Group = {}
    number = 0
    while len(found) < size:
        group = make(draw, number, words)
        number += 1
        if not group.keys() & found.keys():
            found |= group
    return sorted(found.items(), key=lambda _: draw.rng.random())

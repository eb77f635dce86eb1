"""A generated task that needs no download: the sentiment of a sentence, turned round by negation.

"The soup was superb" is positive and "The soup was never superb" negative; with "dreadful" it is
the other way round. The sentences come in fours: one pattern and one noun, a good and a bad
adjective, each affirmed and negated. So a score above one half means that adjective and negation
were read together, and in sentences of a new kind:

- each word, pattern, negation and length is as often in positive sentences as in negative ones;
- train and dev share no adjective, noun or pattern.

The same seed gives the same sentences on every machine and every version of Python: only
``random()`` of its random generator is used, the one method whose numbers Python keeps stable.
"""

from __future__ import annotations

import hashlib
import random
import re

from spafit.tasks.task import Dataset, Example, Task

NEGATIVE, POSITIVE = "negative", "positive"
TASK = Task(
    "sentiment-under-negation",
    ("sentence",),
    (NEGATIVE, POSITIVE),
    ("accuracy",),
    display="Sentiment under negation",
)

GOOD = {
    "train": """good great wonderful excellent lovely pleasant superb splendid fantastic beautiful
        enjoyable impressive terrific perfect amazing nice fabulous gorgeous fine agreeable
        satisfying thrilling elegant memorable""".split(),
    "dev": """brilliant delightful charming marvellous magnificent outstanding admirable glorious
        appealing refreshing""".split(),
}
BAD = {
    "train": """bad awful terrible horrible poor nasty ugly boring disappointing lousy miserable
        annoying disgusting atrocious horrid tedious shabby abysmal rotten hideous pathetic useless
        dreary irritating""".split(),
    "dev": """dreadful appalling frustrating dull mediocre repulsive depressing dismal tiresome
        revolting""".split(),
}
NOUNS = {
    "train": """soup hotel film song garden meeting teacher jacket bridge poem car holiday phone
        speech waiter kitchen match lamp""".split(),
    "dev": "cake novel concert doctor museum chair journey coat painting sandwich".split(),
}
# [affirmed|negated]: the rest of a pattern says nothing good or bad.
PATTERNS = {
    "train": (
        "The {noun} [was|was not] {adjective}.",
        "To my mind the {noun} [is|isn't] {adjective}.",
        "Last year we had a {noun} that [was|wasn't] {adjective}.",
        "I [often|never] found the {noun} {adjective}.",
        "My sister [thinks|does not think] that the {noun} is {adjective}.",
        "It [was|was hardly] a {adjective} {noun}.",
        "[Everyone|Nobody] called it a {adjective} {noun}.",
        "Compared with ours, the {noun} [seems|doesn't seem] {adjective}.",
        "In the end it [became|did not become] a {adjective} {noun}.",
        "This {noun} has [always|never] been {adjective}.",
        "As for the {noun}, it [turned|did not turn] out {adjective}.",
        "You [will|won't] see a {adjective} {noun} there.",
        "The {noun} [could|could not] be described as {adjective}.",
        "I [would|wouldn't] say that her {noun} is {adjective}.",
        "I [have|have not] called the {noun} {adjective}.",
        "[Yes|No], the {noun} [is|is not] {adjective}.",
        "Is the {noun} {adjective}? [It is|It isn't].",
        "{adjective} is what the {noun} [was|was not].",
        "A {adjective} {noun} [was|wasn't] among them.",
        "[Both|Neither] of my uncles had a {adjective} {noun}.",
    ),
    "dev": (
        "Our guests [considered|never considered] this {noun} {adjective}.",
        "If you ask me, that {noun} [is|is not] a {adjective} one.",
        "The {noun} which he mentioned [looked|didn't look] {adjective}.",
        "There was [something|nothing] {adjective} about the {noun}.",
        "What they called a {adjective} {noun} [was|wasn't] one.",
        "How {adjective} is the {noun}? [Very|Not very].",
        "After an hour, {adjective} [was|was not] my word for the {noun}.",
        "[Most|None] of us had a {adjective} {noun} in those days.",
    ),
}


def datasets(seed: int = 0, train_size: int = 2400, dev_size: int = 400) -> tuple[Dataset, Dataset]:
    """Return train and dev as :func:`spafit.glue.load` returns those of a GLUE task.

    All sentences are distinct.

    Parameters
    ----------
    seed : int
        Determines the choice and the order of the sentences.
    train_size, dev_size : int
        Numbers of sentences, multiples of 4.
    """
    sizes = {"train": train_size, "dev": dev_size}
    train, dev = (_dataset(split, size, seed) for split, size in sizes.items())
    return train, dev


def unlabelled(sentences: list[str], source: str) -> Dataset:
    """Return a reader's own sentences, to be predicted."""
    examples = tuple(Example(n, text, None, None) for n, text in enumerate(sentences))
    return Dataset(TASK, "input", examples, source)


def _dataset(split: str, size: int, seed: int) -> Dataset:
    rng = random.Random(2 * seed + (split == "dev"))  # two streams for each seed

    def any_of(words: list[str]) -> str:
        return words[int(rng.random() * len(words))]

    labels: dict[str, str] = {}
    while len(labels) < size:
        pattern = PATTERNS[split][len(labels) // 4 % len(PATTERNS[split])]
        noun = any_of(NOUNS[split])
        four = {
            _fill(pattern, negated, noun, adjective): POSITIVE if good != negated else NEGATIVE
            for adjective, good in ((any_of(GOOD[split]), True), (any_of(BAD[split]), False))
            for negated in (False, True)
        }
        if not four.keys() & labels.keys():
            labels |= four
    rows = sorted(labels.items(), key=lambda _: rng.random())
    lines = "".join(f"{label}\t{text}\n" for text, label in rows)
    return Dataset(
        task=TASK,
        split=split,
        examples=tuple(Example(n, text, None, label) for n, (text, label) in enumerate(rows)),
        source=f"spafit.demo.sentiment, seed {seed}",
        bad_rows=0,
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
    )


def _fill(pattern: str, negated: bool, noun: str, adjective: str) -> str:
    text = re.sub(r"\[(.*?)\|(.*?)\]", r"\2" if negated else r"\1", pattern)
    text = text.format(noun=noun, adjective=adjective)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]

"""A generated task that needs no download: the sentiment of a sentence, turned round by negation.

"The soup was superb" is positive and "The soup was never superb" negative; with "dreadful" it is
the other way round. The sentences come in fours: one pattern and one noun, a good and a bad
adjective, each affirmed and negated. So a score above one half means that adjective and negation
were read together, and in sentences of a new kind:

- each word, pattern, negation and length is as often in positive sentences as in negative ones;
- train and dev share no adjective, noun or pattern; each seed draws anew which are dev's.

The same seed gives the same sentences on every machine and every version of Python: only
``random()`` of its random generator is used, the one method whose numbers Python keeps stable.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence

from spafit.tasks.task import Dataset, Example, Task

NEGATIVE, POSITIVE = "negative", "positive"
TASK = Task(
    "sentiment-under-negation",
    ("sentence",),
    (NEGATIVE, POSITIVE),
    ("accuracy",),
    display="Sentiment under negation",
)

# Words for good and bad, things that may be either, and ways to say so, [affirmed|negated]; the
# rest of a pattern is neither good nor bad. A third of the words and a quarter of the patterns,
# drawn by the seed, are dev's.
GOOD = """good great wonderful excellent lovely pleasant superb splendid fantastic beautiful
    enjoyable impressive terrific perfect amazing nice fabulous gorgeous delightful charming
    marvellous magnificent outstanding admirable brilliant glorious appealing refreshing satisfying
    thrilling elegant exquisite stunning fascinating remarkable sublime""".split()
BAD = """bad awful terrible horrible poor nasty ugly boring disappointing lousy miserable annoying
    disgusting atrocious horrid tedious abysmal hideous pathetic useless dreary irritating dreadful
    appalling frustrating dull mediocre repulsive depressing dismal tiresome revolting shabby
    ghastly unbearable inferior""".split()
NOUNS = """soup hotel film song garden meeting teacher jacket bridge poem car holiday phone speech
    waiter kitchen lamp cake novel concert doctor museum chair journey coat painting sandwich dinner
    camera lecture""".split()
PATTERNS = [
    "The {noun} [is|is not] {adjective}.",
    "Her {noun} [was|was never] {adjective}.",
    "We [had|never had] a {adjective} {noun} at home.",
    "That {noun} [looks|doesn't look] {adjective} to me.",
    "[Everyone|No one] found the {noun} {adjective}.",
    "My neighbours [say|do not say] that the {noun} is {adjective}.",
    "It [is|is hardly] a {adjective} {noun}.",
    "There [is|isn't] a {adjective} {noun} in this town.",
    "I [would|would not] call this {noun} {adjective}.",
    "[All|None] of them thought the {noun} {adjective}.",
    "The {noun} he told us about [sounds|doesn't sound] {adjective}.",
    "Since Monday the {noun} [has|has not] been {adjective}.",
    "Was the {noun} {adjective}? [It was|It was not].",
    "By all accounts this {noun} [was|was not] {adjective}.",
    "At first sight the {noun} [seemed|did not seem] {adjective}.",
    "You [can|can't] say that the {noun} was {adjective}.",
    "[Both|Neither] of the reviewers called the {noun} {adjective}.",
    "Even after a year the {noun} [is|isn't] {adjective}.",
    "There was [something|nothing] {adjective} in that {noun}.",
    "[Something|Nothing] about the {noun} was {adjective}.",
    "The word for this {noun} [is|is not] {adjective}.",
    "{adjective}? The {noun} [was|was hardly] that.",
    "[Somebody|Nobody] here has a {adjective} {noun}.",
    "He writes that the {noun} [became|never became] {adjective}.",
    "In my eyes it [remains|doesn't remain] a {adjective} {noun}.",
    "Nowadays a {adjective} {noun} [is|is not] what you get.",
    "As far as I remember, the {noun} [was|wasn't] {adjective}.",
    "She [described|did not describe] it as a {adjective} {noun}.",
    "[One|None] of the three had a {adjective} {noun}.",
    "To tell the truth, this [is|isn't] a {adjective} {noun}.",
    "The {noun} on the left [is|is not] the {adjective} one.",
    "People [often|never] speak of it as a {adjective} {noun}.",
]


def datasets(seed: int = 0, train_size: int = 1200, dev_size: int = 400) -> tuple[Dataset, Dataset]:
    """Return train and dev as :func:`spafit.glue.load` returns those of a GLUE task.

    All sentences are distinct.

    Parameters
    ----------
    seed : int
        Determines what is dev's, and the choice and the order of the sentences.
    train_size, dev_size : int
        Numbers of sentences, multiples of 4.
    """
    rng = random.Random(3 * seed)
    shares = ((GOOD, 3), (BAD, 3), (NOUNS, 3), (PATTERNS, 4))
    for_train, for_dev = zip(*(_divided(pool, share, rng) for pool, share in shares), strict=True)
    return (
        _dataset("train", train_size, for_train, seed, random.Random(3 * seed + 1)),
        _dataset("dev", dev_size, for_dev, seed, random.Random(3 * seed + 2)),
    )


def _divided(pool: list[str], share: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Divide a pool by chance: the rest, and one of ``share``."""
    drawn = sorted(pool, key=lambda _: rng.random())
    size = len(pool) // share
    return drawn[size:], drawn[:size]


def _dataset(
    split: str, size: int, pools: Sequence[list[str]], seed: int, rng: random.Random
) -> Dataset:
    good, bad, nouns, patterns = pools

    def any_of(words: list[str]) -> str:
        return words[int(rng.random() * len(words))]

    labels: dict[str, str] = {}
    while len(labels) < size:
        pattern = patterns[len(labels) // 4 % len(patterns)]
        noun = any_of(nouns)
        four = {
            _fill(pattern, negated, noun, adjective): POSITIVE if is_good != negated else NEGATIVE
            for adjective, is_good in ((any_of(good), True), (any_of(bad), False))
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

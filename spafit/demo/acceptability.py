"""A generated task that needs no download: is a sentence acceptable or not.

It is similar to CoLA (Warstadt et al., 2018). Its sentences form minimal pairs, as in BLiMP
(Warstadt et al., 2020), from the templates of ``acceptability_templates.py`` and the words of
``acceptability_lexicon.py``. Its scores are meaningful because:

- half of the sentences are unacceptable, and each template uses the same forms and contexts equally
  often in both halves: neither words nor length distinguish them, only how words are combined;
- train and dev share no noun, verb, adjective, name or template, so that what is learned in
  training must generalize to other sentences.

The same seed gives the same sentences on every machine and every version of Python: only
``random()`` of its random generator is used, the one method whose numbers Python keeps stable.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spafit.demo.acceptability_lexicon import pools
from spafit.demo.acceptability_templates import TEMPLATES
from spafit.errors import ConfigError
from spafit.tasks import glue

TASK = replace(
    glue.TASKS["cola"],
    name="acceptability",
    display="Acceptability",
    folder="Acceptability",
    metrics=("matthews", "accuracy"),
    submission="Acceptability.tsv",
)
"""CoLA's row of the table under another name, with accuracy reported too."""

UNACCEPTABLE, ACCEPTABLE = TASK.labels

_SLOT = re.compile(r"\{(([a-z]+)\d?)")
_CONTEXT = re.compile(r"<([^<>|]*)\|([^<>|]*)>")
_FORM = re.compile(r"\[([^\[\]|]*)\|([^\[\]|]*)\]")
_ARTICLE = re.compile(r"\ba (?=[aeiou])")

_SQUARE = ((1, 1), (1, 2), (2, 2), (2, 1))
_VISIT = len(_SQUARE)
_TRIES = 1000


@dataclass(frozen=True)
class Sentence:
    """One sentence of the task.

    Attributes
    ----------
    text : str
        The sentence.
    label : str
        "acceptable" or "unacceptable".
    phenomenon : str
        What it tests, such as "agreement": a key of ``TEMPLATES``.
    template : str
        Its template, such as "agreement/train/0".
    """

    text: str
    label: str
    phenomenon: str
    template: str


# The phenomena that a small encoder starts to learn within three minutes; the others need longer
# training or a larger model.
QUICK = (
    "agreement",
    "auxiliary",
    "case",
    "determiner",
    "inversion",
    "order",
    "reflexive",
    "relative",
    "tense",
)


def generate(
    seed: int = 0,
    train_size: int = 3600,
    dev_size: int = 600,
    phenomena: Sequence[str] = QUICK,
) -> tuple[list[Sentence], list[Sentence]]:
    """Return the sentences of train and dev.

    All are distinct, half of each split is acceptable, and the phenomena are equally frequent to
    within four sentences.

    Parameters
    ----------
    seed : int
        Determines the choice and the order of the sentences.
    train_size, dev_size : int
        Numbers of sentences; positive multiples of 4.
    phenomena : sequence of str
        Keys of ``TEMPLATES``; the default, :data:`QUICK`, are about half of them.

    Raises
    ------
    ConfigError
        If a size is not such a number, or larger than the number of distinct sentences, or there is
        no such phenomenon.
    """
    unknown = [name for name in phenomena if name not in TEMPLATES]
    if unknown or not phenomena:
        raise ConfigError(
            f"there is no phenomenon {', '.join(unknown) or 'at all'}; there are "
            f"{', '.join(TEMPLATES)}"
        )
    return (
        _generate("train", train_size, seed, phenomena),
        _generate("dev", dev_size, seed, phenomena),
    )


def datasets(
    seed: int = 0,
    train_size: int = 3600,
    dev_size: int = 600,
    phenomena: Sequence[str] = QUICK,
) -> tuple[glue.Dataset, glue.Dataset]:
    """Return train and dev as :func:`spafit.glue.load` returns those of a GLUE task.

    Parameters and errors are those of :func:`generate`. ``source`` names the generator, and
    ``sha256`` is that of the sentences as lines of label, TAB and text.
    """
    parts = []
    for split, sentences in zip(
        ("train", "dev"), generate(seed, train_size, dev_size, phenomena), strict=True
    ):
        lines = "".join(f"{sentence.label}\t{sentence.text}\n" for sentence in sentences)
        parts.append(
            glue.Dataset(
                task=TASK,
                split=split,
                examples=tuple(
                    glue.Example(index, sentence.text, None, sentence.label)
                    for index, sentence in enumerate(sentences)
                ),
                source=f"spafit.demo.acceptability, seed {seed}",
                bad_rows=0,
                sha256=hashlib.sha256(lines.encode()).hexdigest(),
            )
        )
    train, dev = parts
    return train, dev


def _generate(split: str, size: int, seed: int, phenomena: Sequence[str]) -> list[Sentence]:
    """Generate four sentences at a time from the phenomena in turn, and each one's templates."""
    if size <= 0 or size % _VISIT:
        raise ConfigError(
            f"{split}_size is {size}; it must be a positive multiple of {_VISIT}, so that half of "
            "the sentences are acceptable"
        )
    rng = random.Random(2 * seed + (split == "dev"))  # two streams for each seed
    words = pools(split)
    sentences: dict[str, Sentence] = {}
    for visit in range(size // _VISIT):
        phenomenon = phenomena[visit % len(phenomena)]
        templates = TEMPLATES[phenomenon][split]
        number = visit // len(phenomena) % len(templates)
        for context, form in _SQUARE:
            for _ in range(_TRIES):
                text = _fill(templates[number], context, form, words, rng)
                if text not in sentences:
                    break
            else:
                raise ConfigError(
                    f"{split}_size is {size}, but {phenomenon}/{split}/{number} has no new "
                    f"sentences after {len(sentences)} in all; ask for fewer"
                )
            label = ACCEPTABLE if context == form else UNACCEPTABLE
            name = f"{phenomenon}/{split}/{number}"
            sentences[text] = Sentence(text, label, phenomenon, name)
    return sorted(sentences.values(), key=lambda _: rng.random())


def _fill(
    template: str,
    context: int,
    form: int,
    words: dict[str, tuple[str, ...]],
    rng: random.Random,
) -> str:
    """Fill a template with words, in one of its contexts and with one of its forms."""
    if not _CONTEXT.search(template):
        form, context = (1, 1) if context == form else (2, 1)
    text = _FORM.sub(rf"\{form}", _CONTEXT.sub(rf"\{context}", template))
    chosen: dict[str, str] = {}
    for slot, pool in _SLOT.findall(text):
        if slot not in chosen:
            left = [word for word in words[pool] if word not in chosen.values()]
            chosen[slot] = left[int(rng.random() * len(left))]
    text = _ARTICLE.sub("an ", text.format(**chosen))
    return text[0].upper() + text[1:]

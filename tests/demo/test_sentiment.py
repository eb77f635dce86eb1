"""The generated task: its promises, checked on its sentences."""

import re
from collections import Counter

import pytest

from spafit.demo.sentiment import BAD, GOOD, NOUNS, PATTERNS, datasets
from spafit.tasks.glue import Dataset

# Taken from datasets(0).
SHA256 = {
    "train": "3a519b9a00c3f7be4932cdf43a846b78c271eace0abadaa152f5ad1fb2a572e0",
    "dev": "66c8bab443f2a40646b7d2023f72478a5679fee64090c76eee98837cf8a512c6",
}
NEGATIONS = frozenset("not never hardly nobody neither no none nothing".split())


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[.,?]", text.lower())


def is_negated(text: str) -> bool:
    return any(word in NEGATIONS or word.endswith("n't") for word in words_of(text))


def pattern_of(text: str) -> str:
    """Return the one pattern that a sentence is of."""
    found = []
    for pattern in PATTERNS:
        regex = re.escape(pattern.replace("a {adj", "an? {adj").replace("A {adj", "An? {adj"))
        regex = regex.replace(r"n\?", "n?").replace(r"\[", "(").replace(r"\]", ")")
        regex = re.sub(r"\\\{\w+\\\}", r"\\w+", regex.replace(r"\|", "|"))
        if re.fullmatch(regex, text, flags=re.IGNORECASE):
            found.append(pattern)
    assert len(found) == 1, (text, found)
    return found[0]


@pytest.fixture(scope="module")
def parts() -> tuple[Dataset, Dataset]:
    return datasets()


class TestSentences:
    """Oracle: the promises of the module's docstring, counted on the sentences themselves."""

    def test_sizes(self, parts):
        assert [len(part) for part in parts] == [1200, 400]
        texts = [text for part in parts for text in part.texts_a]
        assert len(set(texts)) == len(texts)

    def test_well_formed(self, parts):
        for part in parts:
            for text in part.texts_a:
                assert re.fullmatch(r"[A-Z][A-Za-z', ]+([.?]|\? [A-Z][a-z' ]+\.)", text), text
                assert not re.search(
                    r"  | [,.?]|\ba [aeiou]|\ban (?!hour)[^aeiou]", text.lower()
                ), text

    def test_the_label_is_the_adjective_s_turned_round_by_a_negation(self, parts):
        for part in parts:
            for text, label in zip(part.texts_a, part.labels, strict=True):
                good = set(words_of(text)) & set(GOOD)
                bad = set(words_of(text)) & set(BAD)
                assert len(good) + len(bad) == 1, text
                assert (label == "positive") == (bool(good) != is_negated(text)), text

    @pytest.mark.parametrize("what", ["word", "number of words", "pattern", "negated"])
    def test_each_is_as_often_in_both_labels(self, parts, what: str):
        for part, kinds in zip(parts, (24, 8), strict=True):
            counts: dict[str, Counter] = {"positive": Counter(), "negative": Counter()}
            for text, label in zip(part.texts_a, part.labels, strict=True):
                if what == "word":
                    counts[label].update(words_of(text))
                elif what == "number of words":
                    counts[label][len(words_of(text))] += 1
                elif what == "pattern":
                    counts[label][pattern_of(text)] += 1
                else:
                    counts[label][is_negated(text), pattern_of(text)] += 1
            assert counts["positive"] == counts["negative"]
            if what == "pattern":
                assert len(counts["positive"]) == kinds

    @pytest.mark.parametrize("seed", [0, 1])
    def test_train_and_dev_share_no_adjective_noun_or_pattern(self, seed):
        parts = datasets(seed)
        for pool, size in ((GOOD, 36), (BAD, 36), (NOUNS, 30)):
            train, dev = (
                {w for text in part.texts_a for w in words_of(text)} & set(pool) for part in parts
            )
            assert not train & dev
            assert (len(set(pool)), len(train), len(dev)) == (size, size * 2 // 3, size // 3)
        train, dev = ({pattern_of(text) for text in part.texts_a} for part in parts)
        assert not train & dev
        assert (len(train), len(dev)) == (24, 8)
        assert not set(GOOD) & set(BAD)

    def test_each_seed_draws_what_is_dev_s(self):
        for pool in (GOOD, BAD, NOUNS):
            drawn = [
                {w for text in datasets(seed, 4, 400)[1].texts_a for w in words_of(text)}
                & set(pool)
                for seed in range(3)
            ]
            assert drawn[0] != drawn[1] != drawn[2] != drawn[0]

    @pytest.mark.parametrize("ngrams", [(1, 1), (1, 3)])
    def test_words_and_their_neighbours_do_not_tell(self, parts, ngrams):
        text = pytest.importorskip("sklearn.feature_extraction.text")
        linear = pytest.importorskip("sklearn.linear_model")
        train, dev = parts
        vectors = text.CountVectorizer(tokenizer=words_of, token_pattern=None, ngram_range=ngrams)
        model = linear.LogisticRegression()
        model.fit(vectors.fit_transform(train.texts_a), train.labels)
        assert abs(model.score(vectors.transform(dev.texts_a), dev.labels) - 0.5) < 0.06


class TestDatasets:
    """Oracle: the same call again, a hash written down once, and the task table's own form."""

    def test_pinned(self, parts):
        assert {part.split: part.sha256 for part in parts} == SHA256

    def test_a_function_of_the_seed(self, parts):
        assert datasets(5, 40, 20) == datasets(5, 40, 20)
        # The size of one part does not change the other.
        assert datasets(5, 80, 20)[1] == datasets(5, 40, 20)[1]
        shared = set(parts[0].texts_a) & set(datasets(1)[0].texts_a)
        assert len(shared) < 600

    def test_as_a_task(self, parts):
        for part in parts:
            assert part.task.labels == ("negative", "positive")
            assert part.task.metrics == ("accuracy",)
            assert part.texts_b is None
            assert [example.index for example in part.examples] == list(range(len(part)))
            assert "seed 0" in part.source

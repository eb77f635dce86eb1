"""The generated task: its promises, checked on its sentences."""

import re
from collections import Counter

import pytest

from spafit.demo.sentiment import BAD, GOOD, NOUNS, PATTERNS, datasets, unlabelled
from spafit.tasks.glue import Dataset

# Taken from datasets(0).
SHA256 = {
    "train": "85afe31a88268ffd9e44e60eb5d1095e1e1994f6f6707e0e0e5717635b7db954",
    "dev": "452f189340874ec9e82fcb95ee067ccddcfa1c9c7e1e14062324cde56ca14f89",
}
NEGATIONS = frozenset("not never hardly nobody neither none nothing".split())


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[.,?]", text.lower())


def is_negated(text: str) -> bool:
    return any(word in NEGATIONS or word.endswith("n't") for word in words_of(text))


def pattern_of(text: str, split: str) -> str:
    """Return the one pattern that a sentence is of."""
    found = []
    for pattern in PATTERNS[split]:
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
        assert [len(part) for part in parts] == [2400, 400]
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
        for part, split in zip(parts, ("train", "dev"), strict=True):
            for text, label in zip(part.texts_a, part.labels, strict=True):
                good = set(words_of(text)) & set(GOOD[split])
                bad = set(words_of(text)) & set(BAD[split])
                assert len(good) + len(bad) == 1, text
                assert (label == "positive") == (bool(good) != is_negated(text)), text

    @pytest.mark.parametrize("what", ["word", "number of words", "pattern", "negated"])
    def test_each_is_as_often_in_both_labels(self, parts, what: str):
        for part, split in zip(parts, ("train", "dev"), strict=True):
            counts: dict[str, Counter] = {"positive": Counter(), "negative": Counter()}
            for text, label in zip(part.texts_a, part.labels, strict=True):
                if what == "word":
                    counts[label].update(words_of(text))
                elif what == "number of words":
                    counts[label][len(words_of(text))] += 1
                elif what == "pattern":
                    counts[label][pattern_of(text, split)] += 1
                else:
                    counts[label][is_negated(text), pattern_of(text, split)] += 1
            assert counts["positive"] == counts["negative"]
            if what == "pattern":
                assert set(counts["positive"]) == set(PATTERNS[split])

    def test_train_and_dev_share_no_adjective_noun_or_pattern(self, parts):
        train, dev = ({w for text in part.texts_a for w in words_of(text)} for part in parts)
        for pool in (GOOD, BAD, NOUNS):
            assert not set(pool["train"]) & dev
            assert not set(pool["dev"]) & train
            assert len(set(pool["train"])) == len(pool["train"]) >= 18
            assert len(set(pool["dev"])) == len(pool["dev"]) >= 10
        assert not set(GOOD["train"] + GOOD["dev"]) & set(BAD["train"] + BAD["dev"])
        assert not set(PATTERNS["train"]) & set(PATTERNS["dev"])

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
        assert len(shared) < 1200

    def test_as_a_task(self, parts):
        for part in parts:
            assert part.task.labels == ("negative", "positive")
            assert part.task.metrics == ("accuracy",)
            assert part.texts_b is None
            assert [example.index for example in part.examples] == list(range(len(part)))
            assert "seed 0" in part.source

    def test_a_reader_s_own(self):
        own = unlabelled(["It rains.", "It pours."], "here")
        assert (own.texts_a, own.labels, own.source) == (
            ["It rains.", "It pours."], [None, None], "here"
        )  # fmt: skip

"""The linguistic tasks: their promises, checked on their sentences.

Oracle: the sentences themselves, and a naive Bayes on bags of words.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from spafit.errors import DataError
from spafit.experiments.probe import linguistic
from spafit.experiments.probe.linguistic import EITHER, NAMES, NOUNS, SAYING, TASKS, datasets
from spafit.tasks.task import Dataset

SIZES = (800, 400)

# Taken from datasets(name, 0, *SIZES).
SHA256 = {
    "pos": "abe426ff0cf67e7a122ddffbcdbde595c928c836d8708d7b9af2ab5954cc8065",
    "number": "e405706b7c32a357bd583bdb856f7b07067ef6b6b5324f8b20a624a0bc8a3f4e",
    "depth": "ba1663d679f777ceda5ca7df338da31348814d3b576d211162c25aa9fc443985",
    "order": "16b0de11c212ef1039daa56c003edc505a16fd0925f89c7771f6166726048965",
}


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[Dataset, Dataset]]:
    return {name: datasets(name, 0, *SIZES) for name in TASKS}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[.,]", text.lower())


def bag(example) -> Counter:
    return Counter(
        words(example.text_a) + ["asked " + each for each in words(example.text_b or "")]
    )


@pytest.mark.parametrize("name", TASKS)
class TestEveryTask:
    def test_sizes_and_balance(self, parts, name):
        for part, size in zip(parts[name], SIZES, strict=True):
            counts = Counter(part.labels)
            assert len(part) == size
            assert set(counts) == set(TASKS[name].labels)
            assert set(counts.values()) == {size // len(counts)}

    def test_no_row_twice_and_no_sentence_in_both(self, parts, name):
        rows = [(each.text_a, each.text_b) for part in parts[name] for each in part]
        assert len(set(rows)) == len(rows)
        train, dev = (set(part.texts_a) for part in parts[name])
        assert not train & dev

    def test_the_words_in_question_are_new_in_dev(self, parts, name):
        pools = {"pos": EITHER, "depth": NAMES + SAYING}
        pool = {each.lower() for each in pools.get(name, NOUNS.replace("|", " ").split())}
        train, dev = ({w for text in part.texts_a for w in words(text)} for part in parts[name])
        assert pool & train and pool & dev and not pool & train & dev

    def test_the_seed_decides(self, parts, name):
        again, other = datasets(name, 0, *SIZES), datasets(name, 1, *SIZES)
        assert [part.sha256 for part in again] == [part.sha256 for part in parts[name]]
        assert set(other[1].texts_a) != set(parts[name][1].texts_a)

    def test_the_sentences_are_these_on_every_machine(self, parts, name):
        assert parts[name][0].sha256 == SHA256[name]

    def test_a_bag_of_words_tells_nothing(self, parts, name):
        """Naive Bayes of train's bags is near chance on dev, and within train across a split."""
        train, dev = parts[name]
        half = len(train) // 2
        for known, asked in ((train, dev), (train[:half], train[half:])):
            vocabulary = sorted({word for each in known for word in bag(each)})
            labels = TASKS[name].labels
            counts = np.ones((len(labels), len(vocabulary)))
            place = {word: k for k, word in enumerate(vocabulary)}
            for each in known:
                for word, count in bag(each).items():
                    counts[labels.index(each.label), place[word]] += count
            scores = np.log(counts / counts.sum(1, keepdims=True))
            right = 0
            for each in asked:
                taken = [place[word] for word in bag(each).elements() if word in place]
                right += labels[int(scores[:, taken].sum(1).argmax())] == each.label
            assert right / len(asked) < 1 / len(labels) + 0.09, (name, right / len(asked))

    def test_neither_does_the_length(self, parts, name):
        train, _ = parts[name]
        lengths = {
            label: [len(words(each.text_a)) for each in train if each.label == label]
            for label in TASKS[name].labels
        }
        means = [float(np.mean(each)) for each in lengths.values()]
        assert max(means) - min(means) < 0.5
        assert len({length for each in lengths.values() for length in each}) > 1 or name == "order"


class TestLabels:
    """Oracle: a second reading of each sentence."""

    def test_pos(self, parts):
        """Whatever stands after an article or the like is the noun."""
        for part in parts["pos"]:
            for each in part:
                before = words(each.text_a)[words(each.text_a).index(each.text_b) - 1]
                is_noun = before in ("the", "long", "that", "their")
                assert each.label == ("noun" if is_noun else "verb"), each

    def test_pos_has_each_bag_with_both_labels(self, parts):
        for part in parts["pos"]:
            found = {}
            for each in part:
                found.setdefault(frozenset(bag(each).items()), []).append(each.label)
            assert {tuple(sorted(labels)) for labels in found.values()} == {("noun", "verb")}

    def test_number(self, parts):
        plural = {pair.split()[k]: k for pair in NOUNS.split("|") for k in (0, 1)}
        firsts, lasts, between = Counter(), Counter(), 0
        for each in parts["number"][0]:
            found = [word for word in words(each.text_a) if word in plural]
            subject = found[len(found) - 2]  # one stands before it, or none; and one after it
            assert each.label == ("plural" if plural[subject] else "singular"), each
            firsts[plural[found[0]] == plural[subject]] += 1
            lasts[plural[found[-1]] == plural[subject]] += 1
            between += words(each.text_a).index(found[-1]) > words(each.text_a).index(subject)
        assert between == len(parts["number"][0])
        assert firsts[True] == firsts[False]
        assert 0.15 < lasts[True] / len(parts["number"][0]) < 0.35

    def test_depth(self, parts):
        for each in parts["depth"][0]:
            clauses = re.findall(r"[A-Z]\w+( [a-z]+){1,2}?(?= that|,|\.)", each.text_a)
            chains = [part.count(" that ") for part in each.text_a.split(", and ")]
            assert len(clauses) == 8 and len(chains) == 4 and sum(chains) == 4
            assert each.label == str(max(chains))

    def test_order(self, parts):
        """A swapped sentence is a kept one of the same part but for two neighbours."""
        for part in parts["order"]:
            kept = {each.text_a for each in part if each.label == "kept"}
            pattern = r"The \w+ \w+ \w+ the \w+ \w+ the \w+ \w+\."
            assert all(re.fullmatch(pattern, text) for text in kept)
            places = Counter()
            for each in part:
                if each.label == "kept":
                    continue
                text = each.text_a.rstrip(".").split()
                back = [
                    at
                    for at in range(1, len(text) - 1)
                    for tried in [[*text[:at], text[at + 1], text[at], *text[at + 2 :]]]
                    if " ".join(tried) + "." in kept
                ]
                assert len(back) == 1, each
                places[back[0]] += 1
            assert set(places) == set(range(1, 9)), places


def test_a_group_that_repeats_a_row_is_left_out_whole():
    """Else the labels would not be balanced."""

    def make(draw, number, words):
        same = "same" if number < 2 else f"other {number}"
        return {(same, None): "kept", (f"swapped {number}", None): "swapped"}

    rows = linguistic._rows(make, linguistic._Draw(0), 4, [])
    assert {text for (text, _), _ in rows} == {"same", "swapped 0", "other 2", "swapped 2"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_real_model_knows_what_a_bag_of_words_does_not(name, minilm_folder):
    """The best layer of MiniLM is a tenth above chance or more; the last one and the first less."""
    from spafit import load_pretrained, load_tokenizer
    from spafit.experiments.probe.layers import probe
    from spafit.experiments.probe.states import layer_states
    from spafit.training.inference import encode

    model, tokenizer = load_pretrained(minilm_folder), load_tokenizer(minilm_folder)
    train, dev = datasets(name)
    data = {"train": train, "dev": dev}
    states = {s: layer_states(model, encode(model, tokenizer, d, None)) for s, d in data.items()}
    means = [each.scores["accuracy"].mean(1) for each in probe(states, train, dev, [0]).values()]
    best = max(means, key=max)
    chance = 1 / len(TASKS[name].labels)
    assert best.max() > chance + 0.1
    assert abs(best[0] - chance) < 0.03 and best[-1] < best.max() - 0.02


def test_what_is_refused():
    with pytest.raises(DataError, match="'rte' is no linguistic task; they are pos, number"):
        datasets("rte")
    with pytest.raises(DataError, match="multiples of 4 from 4 to 4,000, found 6"):
        datasets("pos", 0, 6, 4)
    with pytest.raises(DataError, match="found 4004"):
        datasets("pos", 0, 4, 4004)
    assert len(datasets("pos", 0, 4, 4000)[1]) == 4000  # of 4,368

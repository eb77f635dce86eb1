"""The generated task: its promises, checked on its sentences."""

import re
from collections import Counter

import pytest

from spafit.demo.acceptability import QUICK, TASK, Sentence, datasets, generate
from spafit.demo.acceptability_lexicon import WORDS, Noun, Phrase, Pronoun, Verb, pools
from spafit.demo.acceptability_templates import TEMPLATES
from spafit.errors import ConfigError

# Words of a closed class: the only ones that train and dev may share.
CLOSED_CLASS = frozenset(
    """
    a after all an and any anything are at away be because before beside both by can could did
    do does during each enough ever every for from had hardly has have he her herself him
    himself how i if in is it last many may me might more much must near never next no nobody
    none not of on one only other several she should so such than that the them themselves there
    these they this those to tomorrow two us very was we were what when where which who whom why
    will with yesterday
    """.split()
)
# Taken from generate(0), every phenomenon, by the function sha256_of below.
SHA256 = {
    "train": "c938809922beface1401c2c6e9eb1a372a99491e12c5bf4b7b65cfe46c2f40d1",
    "dev": "92c8b265389cbfffc4be51fcc638662f177b88655ab9a7ab9f46f19d8eaf1cc8",
}


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


@pytest.fixture(scope="module")
def corpora() -> tuple[list[Sentence], list[Sentence]]:
    """Train and dev of the default size, of every phenomenon."""
    return generate(phenomena=tuple(TEMPLATES))


class TestSentences:
    """Oracle: the promises of the module's docstring, counted on the sentences themselves."""

    def test_sizes_and_balance(self, corpora):
        for sentences, size in zip(corpora, (3600, 600), strict=True):
            assert len(sentences) == size
            by_label = Counter(sentence.label for sentence in sentences)
            assert by_label == {"acceptable": size // 2, "unacceptable": size // 2}
            for what in ("phenomenon", "template"):
                pairs = Counter((getattr(s, what), s.label) for s in sentences)
                for (name, label), count in pairs.items():
                    assert count == pairs[name, "acceptable"], (name, label)
            counts = Counter(sentence.phenomenon for sentence in sentences).values()
            assert max(counts) - min(counts) <= 4

    def test_all_distinct_and_of_sensible_length(self, corpora):
        texts = [sentence.text for part in corpora for sentence in part]
        assert len(set(texts)) == len(texts)
        lengths = [len(text.split()) for text in texts]
        assert min(lengths) >= 4
        assert max(lengths) <= 20
        assert 7 < sum(lengths) / len(lengths) < 12

    def test_well_formed(self, corpora):
        for part in corpora:
            for sentence in part:
                assert re.fullmatch(r"[A-Z][A-Za-z', ]+[a-zI][.?]", sentence.text), sentence
                assert not re.search(r"  | [,.?]|\ba [aeiou]|\ban [^aeiou]", sentence.text)

    def test_train_and_dev_share_only_closed_class_words(self, corpora):
        train, dev = ({w for s in part for w in words_of(s.text)} for part in corpora)
        assert train & dev <= CLOSED_CLASS, sorted(train & dev - CLOSED_CLASS)
        assert len(train - CLOSED_CLASS) > 150
        assert len(dev - CLOSED_CLASS) > 100

    def test_train_and_dev_share_no_template(self):
        for halves in TEMPLATES.values():
            assert not set(halves["train"]) & set(halves["dev"])
            assert all(len(half) >= 2 and len(set(half)) == len(half) for half in halves.values())

    def test_enough_phenomena_by_default(self):
        assert len(QUICK) >= 8
        assert set(QUICK) <= set(TEMPLATES)
        assert {s.phenomenon for part in generate() for s in part} == set(QUICK)

    @pytest.mark.parametrize("phenomena", [QUICK, tuple(TEMPLATES)], ids=["quick", "all"])
    def test_words_and_length_do_not_tell(self, phenomena):
        text = pytest.importorskip("sklearn.feature_extraction.text")
        linear = pytest.importorskip("sklearn.linear_model")
        for seed in (0, 1):
            train, dev = generate(seed, phenomena=phenomena)
            y, z = ([s.label == "acceptable" for s in part] for part in (train, dev))
            vectorizer = text.CountVectorizer(token_pattern=r"[\w']+|[.?,]")
            model = linear.LogisticRegression(max_iter=1000)
            model.fit(vectorizer.fit_transform(s.text for s in train), y)
            assert abs(model.score(vectorizer.transform(s.text for s in dev), z) - 0.5) < 0.06
            # One indicator for each length in words, as free a use of it as there is.
            length = linear.LogisticRegression(max_iter=1000)
            one_hot = [
                [[n == len(s.text.split()) for n in range(21)] for s in p] for p in (train, dev)
            ]
            length.fit(one_hot[0], y)
            assert abs(length.score(one_hot[1], z) - 0.5) < 0.06


class TestMinimalPairs:
    """Oracle: sentences judged by hand, from templates that leave few choices."""

    @pytest.mark.parametrize(
        ("phenomenon", "pattern", "label"),
        [
            ("agreement", r"There is a ", "acceptable"),
            ("agreement", r"There are a ", "unacceptable"),
            ("agreement", r"There is two ", "unacceptable"),
            ("agreement", r"The \w+ and the \w+ was ", "unacceptable"),
            ("agreement", r"The \w+ beside the \w+ was ", "acceptable"),
            ("reflexive", r"The (king|boy|man|monk) \w+ himself ", "acceptable"),
            ("reflexive", r"The (king|boy|man|monk) \w+ herself ", "unacceptable"),
            ("reflexive", r"(Mary|Susan|Linda|Karen) \w+ that \w+ had \w+ himself", "acceptable"),
            ("reflexive", r"(Mary|Susan|Linda|Karen) \w+ that \w+ had \w+ herself", "unacceptable"),
            ("determiner", r"Every \w+s in the", "unacceptable"),
            ("determiner", r"All \w+s in the", "acceptable"),
            ("determiner", r"Those \w+[^s] in the", "unacceptable"),
            ("auxiliary", r"\w+ must \w+ing the", "unacceptable"),
            ("auxiliary", r"The \w+ has (taken|broken|stolen|chosen) ", "acceptable"),
            ("auxiliary", r"The \w+ will (taken|broken|stolen|chosen) ", "unacceptable"),
            ("case", r"(Him|Her|Them|Us|Me) \w+ the", "unacceptable"),
            ("case", r"(He|She|They|We|I) \w+ the", "acceptable"),
            ("inversion", r"When will \w+ \w+ the \w+\?", "acceptable"),
            ("inversion", r"When \w+ will \w+ the \w+\?", "unacceptable"),
            ("inversion", r"Nobody remembers when will ", "unacceptable"),
            ("order", r"\w+ had never \w+ such an? ", "acceptable"),
            ("order", r"The all ", "unacceptable"),
            ("tense", r"Yesterday the \w+ \w+ will ", "unacceptable"),
            ("tense", r"Tomorrow the \w+ \w+ will ", "acceptable"),
            ("relative", r"The (lamp|camera|clock) who ", "unacceptable"),
            ("relative", r"The (lamp|camera|clock) which ", "acceptable"),
        ],
    )
    def test_judged_by_hand(self, corpora, phenomenon: str, pattern: str, label: str):
        found = [
            sentence
            for part in corpora
            for sentence in part
            if sentence.phenomenon == phenomenon and re.match(pattern, sentence.text)
        ]
        assert found, "no sentence of this make"
        assert {sentence.label for sentence in found} == {label}


class TestInflection:
    """Oracle: the forms as a dictionary has them."""

    def test_nouns(self):
        nouns = ("nurse", "actress", "party", "boy", "woman", "wife", "box", "church", "match")
        plurals = "nurses actresses parties boys women wives boxes churches matches"
        assert [Noun(noun).pl for noun in nouns] == plurals.split()

    @pytest.mark.parametrize(
        "forms",
        [
            "repair repairs repaired repaired repairing",
            "hire hires hired hired hiring",
            "deny denies denied denied denying",
            "destroy destroys destroyed destroyed destroying",
            "crush crushes crushed crushed crushing",
            "admit admits admitted admitted admitting",
            "grab grabs grabbed grabbed grabbing",
            "forget forgets forgot forgotten forgetting",
            "take takes took taken taking",
            "sleep sleeps slept slept sleeping",
            "blush blushes blushed blushed blushing",
        ],
    )
    def test_verbs(self, forms: str):
        verb = Verb(forms.split()[0])
        assert [str(verb), verb.s, verb.past, verb.part, verb.ing] == forms.split()

    def test_phrases_and_pronouns(self):
        phrase = Phrase("throw_out")
        assert [str(phrase), phrase.past, phrase.tail] == ["throw", "threw", "out"]
        assert [Pronoun(p).obj for p in ("he", "she", "they", "we", "I")] == [
            "him", "her", "them", "us", "me"
        ]  # fmt: skip

    def test_every_slot_has_its_pool_and_every_word_its_side(self):
        train, dev = pools("train"), pools("dev")
        for halves in TEMPLATES.values():
            for template in (*halves["train"], *halves["dev"]):
                assert set(re.findall(r"\{([a-z]+)", template)) <= train.keys()
        shared = {w for p in train.values() for w in p} & {w for p in dev.values() for w in p}
        assert shared == set(WORDS["pronoun"][1].split())


class TestDeterminism:
    """Oracle: the same call again, and hashes written down once."""

    def sha256_of(self, split: str) -> str:
        train, dev = datasets(phenomena=tuple(TEMPLATES))
        return {"train": train, "dev": dev}[split].sha256

    @pytest.mark.parametrize("split", ["train", "dev"])
    def test_pinned(self, split: str):
        assert self.sha256_of(split) == SHA256[split]

    def test_a_function_of_the_seed(self):
        assert generate(5, 40, 20) == generate(5, 40, 20)
        texts = [{s.text for s in generate(seed, 400, 20)[0]} for seed in (0, 1)]
        assert len(texts[0] & texts[1]) < 40
        # The size of one part does not change the other.
        assert generate(5, 80, 20)[1] == generate(5, 40, 20)[1]


class TestDatasets:
    """Oracle: generate() itself, and the task table's own form."""

    def test_same_sentences_as_a_task(self):
        for dataset, sentences, split in zip(
            datasets(2, 40, 20), generate(2, 40, 20), ("train", "dev"), strict=True
        ):
            assert (dataset.task, dataset.split, dataset.bad_rows) == (TASK, split, 0)
            assert dataset.texts_a == [sentence.text for sentence in sentences]
            assert dataset.texts_b is None
            assert dataset.labels == [sentence.label for sentence in sentences]
            assert [example.index for example in dataset.examples] == list(range(len(sentences)))
            assert "seed 2" in dataset.source
        assert TASK.labels == ("unacceptable", "acceptable")
        assert TASK.metrics == ("matthews", "accuracy")

    def test_the_hash_follows_text_and_label(self):
        hashes = {d.sha256 for seed in (0, 1) for d in datasets(seed, 40, 20)}
        assert len(hashes) == 4

    @pytest.mark.parametrize("size", [0, -4, 10, 3])
    def test_impossible_sizes(self, size: int):
        with pytest.raises(ConfigError, match=rf"train_size is {size}; .* multiple of 4"):
            generate(0, size, 20)
        with pytest.raises(ConfigError, match=rf"dev_size is {size}"):
            generate(0, 20, size)

    def test_more_than_there_are(self):
        with pytest.raises(ConfigError, match=r"tense/dev/0 has no new sentences.*ask for fewer"):
            generate(0, 4, 4000, phenomena=("tense",))

    def test_unknown_phenomena(self):
        with pytest.raises(ConfigError, match="no phenomenon rhyme; there are agreement"):
            generate(phenomena=("order", "rhyme"))
        with pytest.raises(ConfigError, match="no phenomenon at all"):
            generate(phenomena=())

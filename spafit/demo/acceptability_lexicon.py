"""The words from which ``acceptability.py`` makes its sentences, and their inflected forms.

The words of train and those of dev are listed side by side. They share no noun, verb, adjective or
name. The words they do share are in the templates: articles, pronouns, auxiliaries, prepositions
and others of which English has too few to divide.
"""

from __future__ import annotations

_IRREGULAR_PLURALS = {"woman": "women", "man": "men", "wife": "wives"}
_IRREGULAR_VERBS = {  # past, participle
    "break": ("broke", "broken"),
    "bring": ("brought", "brought"),
    "choose": ("chose", "chosen"),
    "draw": ("drew", "drawn"),
    "forget": ("forgot", "forgotten"),
    "give": ("gave", "given"),
    "hide": ("hid", "hidden"),
    "know": ("knew", "known"),
    "put": ("put", "put"),
    "say": ("said", "said"),
    "sleep": ("slept", "slept"),
    "steal": ("stole", "stolen"),
    "take": ("took", "taken"),
    "think": ("thought", "thought"),
    "throw": ("threw", "thrown"),
}
_DOUBLED = ("admit", "forget", "grab", "put")  # admit, admitting
_OBJECT_FORMS = {"he": "him", "she": "her", "they": "them", "we": "us", "I": "me"}


class Noun(str):
    """A noun; the string itself is its singular."""

    @property
    def pl(self) -> str:
        """Plural."""
        return _IRREGULAR_PLURALS.get(self) or _with_s(self)


class Verb(str):
    """A verb; the string itself is its base form."""

    @property
    def s(self) -> str:
        """Third person singular."""
        return _with_s(self)

    @property
    def past(self) -> str:
        """Past tense."""
        return _IRREGULAR_VERBS[self][0] if self in _IRREGULAR_VERBS else self._with_ed

    @property
    def part(self) -> str:
        """Past participle."""
        return _IRREGULAR_VERBS[self][1] if self in _IRREGULAR_VERBS else self._with_ed

    @property
    def ing(self) -> str:
        """Present participle and gerund."""
        return self._stem.removesuffix("e") + "ing"

    @property
    def _with_ed(self) -> str:
        if self.endswith("y") and self[-2] not in "aeiou":
            return self[:-1] + "ied"
        return self._stem.removesuffix("e") + "ed"

    @property
    def _stem(self) -> str:
        return self + self[-1] if self in _DOUBLED else str(self)


class Phrase(Verb):
    """A verb with a particle or preposition, such as "pick_up"; the string is the verb alone."""

    tail: str

    def __new__(cls, phrase: str) -> Phrase:
        """Take the two apart."""
        verb, tail = phrase.split("_")
        word = super().__new__(cls, verb)
        word.tail = tail
        return word


class Pronoun(str):
    """A pronoun; the string itself is its subject form."""

    @property
    def obj(self) -> str:
        """Object form."""
        return _OBJECT_FORMS[self]


def _with_s(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


WORDS: dict[str, tuple[type[str], str, str]] = {
    # People, things, places, events. A pool is one where every word makes sense wherever another
    # of the pool does.
    "person": (
        Noun,
        "nurse teacher farmer lawyer student driver singer painter baker soldier tailor plumber "
        "engineer gardener neighbor pilot doctor banker hunter editor",
        "dancer chef judge sailor librarian carpenter professor dentist journalist tourist barber "
        "surgeon",
    ),
    "female": (
        Noun,
        "girl woman mother sister queen actress niece",
        "daughter aunt princess grandmother wife bride",
    ),
    "male": (
        Noun,
        "boy man father brother king nephew monk",
        "son uncle prince grandfather husband duke",
    ),
    "fname": (
        str,
        "Mary Susan Linda Karen Emily Laura Julia Rachel",
        "Anna Sarah Helen Nancy Diana Olivia",
    ),
    "mname": (
        str,
        "John David Kevin Robert Thomas Brian Daniel Peter",
        "Michael George Steven Paul Edward Oscar",
    ),
    "thing": (
        Noun,
        "basket lamp blanket ladder bottle hammer mirror guitar camera suitcase pillow umbrella "
        "candle helmet clock carpet",
        "bucket kettle violin telescope necklace jacket backpack vase radio curtain",
    ),
    "place": (
        Noun,
        "kitchen garden office museum school hospital market station",
        "theater hotel factory harbor airport basement",
    ),
    "event": (
        Noun,
        "meeting concert game lecture storm party",
        "wedding festival trial ceremony parade picnic",
    ),
    # Adjectives: of people, of things, and of things compared with -er and with more.
    "mood": (
        str,
        "tired nervous hungry happy angry proud famous",
        "anxious clever polite jealous cheerful thirsty",
    ),
    "quality": (str, "dirty heavy old cheap beautiful plain", "dusty strange ugly modern rare"),
    "er": (str, "older heavier cheaper larger", "newer smaller uglier lighter"),
    "long": (str, "expensive elegant popular beautiful", "valuable attractive unusual practical"),
    # Verbs, by what follows them: a person, a thing (and never nothing), nothing, oneself.
    "vperson": (
        Verb,
        "contact thank greet invite insult praise ignore hire",
        "accompany rescue escort mock congratulate bribe",
    ),
    "vthing": (
        Verb,
        "repair crush destroy damage carry fix select display",
        "acquire remove confiscate grab replace demolish",
    ),
    "vnone": (
        Verb,
        "sleep arrive faint sneeze yawn smile vanish laugh",
        "disappear cough stumble blush apologize shiver tremble",
    ),
    "vself": (Verb, "blame criticize injure embarrass", "describe encourage scratch defend"),
    # A thing again, with a participle of its own.
    "vstrong": (Verb, "take break steal choose", "hide throw draw"),
    # A clause with that; a clause with that or a question.
    "vsay": (Verb, "say think believe explain", "claim admit suspect insist"),
    "vknow": (Verb, "know remember", "forget reveal"),
    # "enjoy fixing", "decide to fix", "persuade her to fix".
    "vgerund": (Verb, "enjoy avoid finish deny", "postpone resist consider suggest"),
    "vinf": (Verb, "decide hope agree refuse", "manage pretend hesitate offer"),
    "vpersuade": (Verb, "persuade force allow order", "convince urge remind"),
    # "pick it up", "glance at it".
    "vpart": (Phrase, "pick_up put_away knock_over", "throw_out bring_back give_away"),
    "vprep": (Phrase, "glance_at wait_for think_about", "listen_to stare_at rely_on"),
    # English has no others to divide.
    "pronoun": (Pronoun, "he she they we I", "he she they we I"),
}
"""Pools of words: the class that inflects them, the words of train, the words of dev."""


def pools(split: str) -> dict[str, tuple[str, ...]]:
    """Return the pools of "train" or "dev", and as ``name`` the names of either sex."""
    result = {
        pool: tuple(word_class(word) for word in (train if split == "train" else dev).split())
        for pool, (word_class, train, dev) in WORDS.items()
    }
    return {**result, "name": result["fname"] + result["mname"]}

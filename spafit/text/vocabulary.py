"""Read the files of a BERT tokenizer: its word pieces, and how it normalises a text.

``tokenizer.json`` has both, ``vocab.txt`` (one word piece per line) only the pieces, and the files
beside either may have the rest (:mod:`spafit.text.added_tokens` reads the added tokens). All of
them are read into a ``Recipe``.

Whether to lower-case the text depends on the vocabulary and has no default: a cased vocabulary
accepts lower-cased text without an error, but gives the wrong ids.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing

from spafit.config import refuse_pointer
from spafit.errors import ConfigError
from spafit.text.added_tokens import (
    CLS,
    CONFIG_FILE,
    MASK,
    PAD,
    SEP,
    SPECIAL_TOKENS,
    UNK,
    AddedToken,
    Listed,
    read_listed,
    read_object,
)

# Of the special tokens, those that a text is framed, filled up or replaced with.
_NEEDED = (PAD, UNK, CLS, SEP)

PREFIX = "##"
"""The prefix of a word piece that continues a word."""

_NORMALIZER_KEYS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")

# BERT's own, and copies of it under other names; the last two stand for any tokenizer.json.
_BERT_CLASSES = frozenset(
    """
    BertTokenizer BertTokenizerLegacy ConvBertTokenizer DPRContextEncoderTokenizer
    DPRQuestionEncoderTokenizer DistilBertTokenizer ElectraTokenizer LayoutLMTokenizer
    LxmertTokenizer MobileBertTokenizer RetriBertTokenizer SqueezeBertTokenizer
    PreTrainedTokenizer TokenizersBackend
    """.split()
)

# How a Japanese tokenizer may split words and pieces; the value that is BERT's way.
_SPLITTING = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}

# What the tokenizers library takes for blank, which is less than Python does.
_BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")

_CASED_SHARE = 0.1
"""A vocabulary is cased from this share of entries with capitals on; bert-large-cased has 0.31."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a text's ids: equal recipes make equal tokenizers.

    Attributes
    ----------
    vocab : dict of str to int
        The word pieces and their ids; an id without an entry is an unused row of the embeddings.
    added : tuple of AddedToken
        Tokens matched in the text before any other processing, in the order of their ids; they
        include the special ones.
    lowercase : bool
        Lower-case the text.
    strip_accents : bool
        Replace é by e, for example.
    split_chinese : bool
        Split every Chinese character off as a separate word.
    clean_text : bool
        Remove control characters, and replace every kind of whitespace by a space.
    max_word_chars : int
        A longer word becomes [UNK].
    truncates_left : bool
        Truncate a text that is too long at its start, not at its end.

    Raises
    ------
    ConfigError
        If a special token of BERT other than [MASK] is missing, two entries have the same id, or
        ``max_word_chars`` is below 1.
    """

    vocab: dict[str, int]
    added: tuple[AddedToken, ...]
    lowercase: bool
    strip_accents: bool
    split_chinese: bool = True
    clean_text: bool = True
    max_word_chars: int = 100
    truncates_left: bool = False

    def __post_init__(self) -> None:
        missing = [token for token in _NEEDED if token not in self.vocab]
        if missing:
            raise ConfigError(
                f"the vocabulary of {len(self.vocab)} entries lacks {', '.join(missing)}; "
                f"a BERT vocabulary has all of {', '.join(_NEEDED)}: give the files of one"
            )
        if self.max_word_chars < 1:
            raise ConfigError(
                f"max_input_chars_per_word is {self.max_word_chars}, so that every word would be "
                f"{UNK}; BERT's is 100"
            )
        first: dict[int, str] = {}
        for content, number in self._ids.items():
            if first.setdefault(number, content) != content:
                raise ConfigError(
                    f"{first[number]!r:.80} and {content!r:.80} have the same id, {number}; each "
                    "entry and each added token needs its own"
                )

    @property
    def _ids(self) -> dict[str, int]:
        return {token.content: token.id for token in self.added} | self.vocab

    @property
    def size(self) -> int:
        """Number of rows that the word embeddings need: the largest id and 1."""
        return max(self._ids.values()) + 1

    @property
    def holes(self) -> int:
        """Number of ids below the largest that no entry has."""
        return self.size - len(self._ids)

    @property
    def is_cased(self) -> bool:
        """Return whether a tenth or more of the entries that are words have capitals.

        See :meth:`capitals`.
        """
        with_capitals, words = self.capitals()
        return with_capitals >= _CASED_SHARE * max(1, words)

    def capitals(self) -> tuple[int, int]:
        """Count the entries with an upper-case letter, and those with a letter that has a case.

        Only words and pieces of words are counted: an entry with a bracket or another sign within
        it, such as [unused1], is never found in a text by splitting it into words.
        """
        words = [piece.removeprefix(PREFIX) for piece in self.vocab]
        words = [word for word in words if word.isalnum() and word.lower() != word.upper()]
        return sum(word != word.lower() for word in words), len(words)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe written as JSON with sorted keys, in hexadecimal."""
        content = {**vars(self), "added": [asdict(token) for token in self.added]}
        if not self.truncates_left:
            del content["truncates_left"]  # as in the fingerprints of older runs
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def build(self, split_special_tokens: bool = False) -> tokenizers.Tokenizer:
        """Return a tokenizer of the tokenizers library that implements the recipe.

        Parameters
        ----------
        split_special_tokens : bool
            Whether to read special tokens that are spelled out in a text as plain text.
        """
        backend = tokenizers.Tokenizer(
            WordPiece(
                self.vocab,
                unk_token=UNK,
                continuing_subword_prefix=PREFIX,
                max_input_chars_per_word=self.max_word_chars,
            )
        )
        backend.normalizer = BertNormalizer(
            clean_text=self.clean_text,
            handle_chinese_chars=self.split_chinese,
            strip_accents=self.strip_accents,
            lowercase=self.lowercase,
        )
        backend.pre_tokenizer = BertPreTokenizer()
        backend.post_processor = TemplateProcessing(
            single=f"{CLS} $A {SEP}",
            pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
            special_tokens=[(token, self.vocab[token]) for token in (CLS, SEP)],
        )
        backend.decoder = WordPieceDecoder(prefix=PREFIX)
        for token in self.added:  # in the order of their ids, so that each new one gets its own
            flags = asdict(token)
            del flags["id"]
            # BERT's own special tokens are in the vocabulary, but splitting words always breaks
            # them up. When they are to be split they must not be added, because a file may mark
            # one as not special.
            is_berts = token.content in SPECIAL_TOKENS and token.content in self.vocab
            if not (split_special_tokens and is_berts):
                backend.add_tokens([tokenizers.AddedToken(**flags)])
        backend.encode_special_tokens = split_special_tokens  # for the other special tokens
        return backend


def read_recipe(folder: Path, lowercase: bool | None = None) -> Recipe:
    """Read the recipe of a folder from tokenizer.json if there is one, else from vocab.txt.

    Whether to lower-case is taken from the first of these that is given: the argument;
    tokenizer.json; ``do_lower_case`` in tokenizer_config.json; and, for vocab.txt alone, the
    vocabulary itself. It is cased if at least a tenth of its words and pieces of words have an
    upper-case letter: bert-large-cased has 31 of 100, and an uncased vocabulary none, except for a
    few placeholders such as USER.

    An id is the number of the line in vocab.txt; of a repeated entry the last line counts. Blanks
    at the end of a line are left out.

    Parameters
    ----------
    folder : Path
        The folder with the files.
    lowercase : bool, optional
        Whether to lower-case the text, overriding the files.

    Warns
    -----
    UserWarning
        If the files ask for lower-casing although the vocabulary is cased; if the vocabulary alone
        decides, and fewer than a fifth of its words have capitals, but not none; if some ids have
        no entry; if lines end in blanks.

    Raises
    ------
    ConfigError
        If the files are missing, cannot be read, contradict each other, or are not those of a BERT
        tokenizer.
    """
    config = read_object(folder / CONFIG_FILE)
    _require_bert_class(folder, config)
    settings = _flags(folder, config, _NORMALIZER_KEYS)
    path = folder / "tokenizer.json"
    if not path.is_file():
        path = folder / "vocab.txt"
    if not path.is_file():
        raise ConfigError(f"{folder} has neither tokenizer.json nor vocab.txt; add one of them")
    listed = read_listed(folder, config)
    read = _from_tokenizer_json if path.suffix == ".json" else _from_vocabulary
    try:
        recipe = read(path, settings, listed, lowercase)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    side = config.get("truncation_side")
    if side not in ("left", "right", None):
        raise ConfigError(
            f"{folder / CONFIG_FILE}: truncation_side is {side!r:.80}; expected 'left' or 'right'"
        )
    if side is not None:
        recipe = replace(recipe, truncates_left=side == "left")
    if lowercase is None:
        is_guess = path.suffix == ".txt" and "do_lower_case" not in settings
        _warn_of_case(path, recipe, is_guess)
    if recipe.holes:
        warnings.warn(
            f"{path}: {recipe.holes} of the ids up to {recipe.size - 1} belong to no entry: one is "
            "repeated (its last line counts) or left out; its row of the embeddings stays unused",
            stacklevel=3,
        )
    return recipe


def _warn_of_case(path: Path, recipe: Recipe, is_guess: bool) -> None:
    """Warn if capitals are never used by a cased vocabulary, or if the case is in doubt."""
    with_capitals, words = recipe.capitals()
    if is_guess and 0 < with_capitals < 2 * _CASED_SHARE * words:
        taken, remedy = (
            ("uncased", "lowercase=False (spafit train --no-lowercase)")
            if recipe.lowercase
            else ("cased", "lowercase=True (spafit train --lowercase)")
        )
        warnings.warn(
            f"{path} is taken as {taken}, because {with_capitals} of its {words} words and pieces "
            f"of words have capitals and no file sets do_lower_case. If that is a mistake, load "
            f"with {remedy}",
            stacklevel=4,
        )
    elif recipe.lowercase and recipe.is_cased:
        warnings.warn(
            f"{path.parent} asks for lower-casing, but its vocabulary is cased: the entries with "
            "upper-case letters are never used. If that is a mistake, load with lowercase=False "
            "(spafit train --no-lowercase), or set do_lower_case to false",
            stacklevel=4,
        )


def splits_special_tokens(folder: Path) -> bool:
    """Return whether a folder's tokenizer_config.json asks for special tokens to be split.

    Raises
    ------
    ConfigError
        If the file cannot be read, or its value is neither true nor false.
    """
    key = "split_special_tokens"
    return _flags(folder, read_object(folder / CONFIG_FILE), (key,)).get(key, False)


def _require_bert_class(folder: Path, config: dict[str, Any]) -> None:
    """Refuse the files of another tokenizer than BERT's, whichever file names it.

    Older files have the class in config.json; where both have one, tokenizer_config.json counts. A
    tokenizer with code of its own (``auto_map``) has a class of its own too.
    """
    files = {
        folder / CONFIG_FILE: config,
        folder / "config.json": read_object(folder / "config.json"),
    }
    named = [(path, entries) for path, entries in files.items() if entries.get("tokenizer_class")]
    for path, entries in named[:1]:
        name = entries["tokenizer_class"]
        if not isinstance(name, str) or name.removesuffix("Fast") not in _BERT_CLASSES:
            raise ConfigError(
                f"{path}: tokenizer_class is {name!r:.80}, which splits texts in another way than "
                "BertTokenizer, the only one that spafit has; give a model with BERT's tokenizer"
            )
    for path, entries in files.items():
        for key, expected in _SPLITTING.items():
            if entries.get(key) not in (None, expected):
                raise ConfigError(
                    f"{path}: {key} is {entries[key]!r:.80}, BERT's tokenizer is {expected!r}; "
                    "give a model with BERT's tokenizer"
                )


def _from_vocabulary(
    path: Path, settings: dict[str, bool], listed: list[Listed], lowercase: bool | None
) -> Recipe:
    vocab = _read_vocabulary(path, listed)
    if lowercase is None:
        lowercase = settings.get("do_lower_case")
    recipe = Recipe(
        vocab,
        _complete(vocab, (), listed),
        lowercase=bool(lowercase),
        strip_accents=False,
        split_chinese=settings.get("tokenize_chinese_chars", True),
    )
    if lowercase is None:
        lowercase = not recipe.is_cased
    # BERT's own rule: lower-casing also strips accents.
    strip_accents = settings.get("strip_accents", lowercase)
    return replace(recipe, lowercase=lowercase, strip_accents=strip_accents)


def _from_tokenizer_json(
    path: Path, settings: dict[str, bool], listed: list[Listed], lowercase: bool | None
) -> Recipe:
    try:
        raw = path.read_bytes()
        refuse_pointer(raw)
        own = tokenizers.Tokenizer.from_buffer(raw)  # its from_file wants UTF-8 paths
        # The library numbers the added tokens in the order of the file, whatever their ids there.
        entries = json.loads(raw).get("added_tokens") or ()
    except Exception as error:  # the library raises nothing narrower
        _require_word_limit(path)
        raise ConfigError(f"it cannot be read: {error}; fetch it again") from None
    truncates_left = (own.truncation or {}).get("direction") == "left"
    own.no_truncation()
    own.no_padding()
    model, normalizer = own.model, _alone(own.normalizer)
    pre_tokenizer = _alone(own.pre_tokenizer)
    if not isinstance(model, WordPiece):
        _require_word_limit(path)
        raise ConfigError(_foreign("model", model, WordPiece))
    if not isinstance(normalizer, BertNormalizer):
        raise ConfigError(_foreign("normalizer", normalizer, BertNormalizer))
    if not isinstance(pre_tokenizer, BertPreTokenizer):
        raise ConfigError(_foreign("pre_tokenizer", pre_tokenizer, BertPreTokenizer))
    signs = (model.unk_token, model.continuing_subword_prefix)
    if signs != (UNK, PREFIX):
        raise ConfigError(f"its unknown token and prefix are {signs}, BERT's are {(UNK, PREFIX)}")

    says = {
        "do_lower_case": normalizer.lowercase,
        "strip_accents": normalizer.strip_accents,
        "tokenize_chinese_chars": normalizer.handle_chinese_chars,
    }
    for key, value in settings.items():
        found = normalizer.lowercase if says[key] is None else says[key]
        is_settled = key == "do_lower_case" and lowercase is not None
        if value != found and not is_settled:
            remedy = (
                ", or load with lowercase=True or lowercase=False (spafit train --lowercase or "
                "--no-lowercase)"
            )
            raise ConfigError(
                f"it has {key} {found}, but tokenizer_config.json beside it says {value}; "
                f"correct one of them{remedy if key == 'do_lower_case' else ''}"
            )
    if lowercase is None:
        lowercase = normalizer.lowercase
    strip_accents = normalizer.strip_accents
    if strip_accents is None:
        strip_accents = settings.get("strip_accents", lowercase)
    vocab = own.get_vocab(with_added_tokens=False)
    ids = {entry["content"]: entry["id"] for entry in entries}
    added = own.get_added_tokens_decoder().values()
    recipe = Recipe(
        vocab,
        _complete(
            vocab, tuple(AddedToken.of(token, ids[token.content]) for token in added), listed
        ),
        lowercase,
        strip_accents,
        split_chinese=normalizer.handle_chinese_chars,
        clean_text=normalizer.clean_text,
        max_word_chars=model.max_input_chars_per_word,
        truncates_left=truncates_left,
    )
    built = recipe.build()
    for token in recipe.added:
        number = built.token_to_id(token.content)
        if number != token.id:
            raise ConfigError(
                f"it gives the added token {token.content!r:.80} the id {token.id}, but its "
                f"{len(vocab)} entries and the tokens added before give it {number}; correct it"
            )
    theirs, ours = own.encode("a", "b"), built.encode("a", "b")
    if (theirs.ids, theirs.type_ids) != (ours.ids, ours.type_ids):
        raise ConfigError(
            f"it encodes a pair of texts as {theirs.tokens} of types {theirs.type_ids}, BERT does "
            f"as {ours.tokens} of types {ours.type_ids}; give the files of a BERT model"
        )
    return recipe


def _alone(part: Any) -> Any:
    """Return the member of a sequence of one; anything else as it is."""
    members = list(part) if type(part) in (Normalizers, PreTokenizers) else [part]
    return members[0] if len(members) == 1 else part


def _foreign(part: str, found: object, expected: type) -> str:
    return (
        f"its {part} is {type(found).__name__}, that of a BERT tokenizer is {expected.__name__}; "
        "give the files of a BERT model, or its vocab.txt alone"
    )


def _require_word_limit(path: Path) -> None:
    """Name a max_input_chars_per_word that is why the library cannot read a tokenizer.json."""
    try:
        limit = json.loads(path.read_bytes())["model"]["max_input_chars_per_word"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return
    if type(limit) is not int or not 1 <= limit < 2**63:
        raise ConfigError(
            f"max_input_chars_per_word is {limit!r:.80}, expected a whole number from 1 on; "
            "BERT's is 100"
        )


def _complete(
    vocab: dict[str, int], own: tuple[AddedToken, ...], listed: list[Listed]
) -> tuple[AddedToken, ...]:
    """Add the tokens of other files, and BERT's special ones, to those of a tokenizer.json.

    A token that the vocabulary has keeps its id, and another one gets the next, as in the
    tokenizers library.
    """
    added = {token.content: token for token in own}
    ids = {*vocab.values(), *(token.id for token in own)}
    has_holes = len(ids) <= max(ids, default=-1)
    special = [
        tokenizers.AddedToken(each, special=True) for each in SPECIAL_TOKENS if each in vocab
    ]
    for each in (*_with_ids(listed, vocab), *(Listed(Path(), token) for token in special)):
        content = each.token.content
        if content not in added:
            if content not in vocab and has_holes:
                raise ConfigError(
                    f"some ids have no entry, so the id of {content!r:.80}, which "
                    f"{each.path.name} adds, is in doubt; add it to the vocabulary"
                )
            added[content] = AddedToken.of(each.token, vocab.get(content, len(ids)))
            ids.add(added[content].id)
        if each.id not in (None, added[content].id):
            raise ConfigError(
                f"its entries and the tokens added before give {content!r:.80} the id "
                f"{added[content].id}, but {each.path.name} beside it says {each.id}; correct one "
                "of the files"
            )
    return tuple(sorted(added.values(), key=lambda token: token.id))


def _with_ids(listed: list[Listed], vocab: dict[str, int]) -> list[Listed]:
    """Leave out a [MASK] that is only named, as in every BERT's files, where there is none."""
    return [
        each
        for each in listed
        if each.token.content != MASK or MASK in vocab or each.id is not None
    ]


def _read_vocabulary(path: Path, listed: list[Listed]) -> dict[str, int]:
    """Read a vocab.txt; an entry's id is its line number, from 0, or that of its last line.

    As in transformers, blanks at the end of a line are no part of its entry, and blank lines at the
    end of the file take an id before the tokens that are added, unless a file gives it to one.
    """
    try:
        raw = path.read_bytes()
        refuse_pointer(raw)
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"it cannot be read: {error}; fetch it again") from None
    # Not splitlines(): U+2028 and similar characters are entries of large vocabularies.
    text = text.replace("\r\n", "\n")
    lines = text.rstrip("\n").split("\n")
    pieces = [line.rstrip(_BLANKS) or line for line in lines]
    padded = [line for line, piece in zip(lines, pieces, strict=True) if line != piece]
    if padded:
        warnings.warn(
            f"{path}: {len(padded)} of its lines end in blanks, such as {padded[0]!r:.80}, which "
            "are left out, as transformers does",
            stacklevel=5,
        )
    vocab = {piece: number for number, piece in enumerate(pieces)}
    ends_blank = text.endswith("\n\n")
    adds = {each.id for each in _with_ids(listed, vocab) if each.token.content not in vocab}
    if ends_blank and adds and len(lines) not in adds:
        vocab.setdefault("", len(lines))
    return vocab


def _flags(folder: Path, config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, bool]:
    """Return some settings of a tokenizer_config.json; those that it does not set are left out."""
    settings = {}
    for key in keys:
        value = config.get(key)
        if isinstance(value, bool):
            settings[key] = value
        elif value is not None:  # null means not set
            raise ConfigError(
                f"{folder / CONFIG_FILE}: {key} is {value!r:.80}; expected true, false or null"
            )
    return settings

"""Read the files of a BERT tokenizer: its word pieces, and how it normalises a text.

``tokenizer.json`` has both, ``vocab.txt`` (one word piece per line) only the pieces, and
``tokenizer_config.json`` beside either may have the rest. All of them are read into a ``Recipe``.

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
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from spafit.errors import ConfigError

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""BERT's special tokens."""

PREFIX = "##"
"""The prefix of a word piece that continues a word."""

_NORMALIZER_KEYS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the raw text; fields as in a tokenizer.json."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a text's ids: equal recipes make equal tokenizers.

    Attributes
    ----------
    vocab : dict of str to int
        The word pieces and their ids.
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

    Raises
    ------
    ConfigError
        If a special token of BERT is missing, or the ids are not 0, 1, 2 ..., each once.
    """

    vocab: dict[str, int]
    added: tuple[AddedToken, ...]
    lowercase: bool
    strip_accents: bool
    split_chinese: bool = True
    clean_text: bool = True
    max_word_chars: int = 100

    def __post_init__(self) -> None:
        missing = [token for token in SPECIAL_TOKENS if token not in self.vocab]
        if missing:
            raise ConfigError(
                f"the vocabulary of {len(self.vocab)} entries lacks {', '.join(missing)}; "
                f"a BERT vocabulary has all of {', '.join(SPECIAL_TOKENS)}: give the files of one"
            )
        ids = {token.content: token.id for token in self.added} | self.vocab
        if sorted(ids.values()) != list(range(len(ids))):
            raise ConfigError(
                f"the ids of its {len(ids)} entries are not 0 to {len(ids) - 1}, each once; "
                "fetch the file again"
            )

    @property
    def is_cased(self) -> bool:
        """Return whether some entries of the vocabulary cannot occur in lower-cased text."""
        return any(
            piece != piece.lower() and not (piece.startswith("[") and piece.endswith("]"))
            for piece in self.vocab
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe written as JSON with sorted keys, in hexadecimal."""
        content = {**vars(self), "added": [asdict(token) for token in self.added]}
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
            if not (split_special_tokens and token.content in SPECIAL_TOKENS):
                backend.add_tokens([tokenizers.AddedToken(**flags)])
        backend.encode_special_tokens = split_special_tokens  # for the other special tokens
        return backend


def read_recipe(folder: Path, lowercase: bool | None = None) -> Recipe:
    """Read the recipe of a folder from tokenizer.json if there is one, else from vocab.txt.

    Whether to lower-case is taken from the first of these that is given: the argument;
    tokenizer.json; ``do_lower_case`` in tokenizer_config.json; and, for vocab.txt alone, the
    vocabulary itself: it is cased if any entry except the bracketed ones has an upper-case letter.

    Parameters
    ----------
    folder : Path
        The folder with the files.
    lowercase : bool, optional
        Whether to lower-case the text, overriding the files.

    Warns
    -----
    UserWarning
        If the files ask for lower-casing although the vocabulary is cased.

    Raises
    ------
    ConfigError
        If the files are missing, cannot be read, contradict each other, or are not those of a BERT
        tokenizer.
    """
    config_path = folder / "tokenizer_config.json"
    config = _read_config(config_path) if config_path.is_file() else {}
    path = folder / "tokenizer.json"
    if not path.is_file():
        path = folder / "vocab.txt"
    if not path.is_file():
        raise ConfigError(f"{folder} has neither tokenizer.json nor vocab.txt; add one of them")
    try:
        if path.suffix == ".json":
            recipe = _from_tokenizer_json(path, config, lowercase)
        else:
            recipe = _from_vocabulary(path, config, lowercase)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if lowercase is None and recipe.lowercase and recipe.is_cased:
        warnings.warn(
            f"{folder} asks for lower-casing, but its vocabulary is cased: the entries with "
            "upper-case letters are never used. If that is a mistake, load with lowercase=False, "
            "or set do_lower_case to false",
            stacklevel=3,
        )
    return recipe


def splits_special_tokens(folder: Path) -> bool:
    """Return whether a folder's tokenizer_config.json asks for special tokens to be split.

    Raises
    ------
    ConfigError
        If the file cannot be read, or its value is neither true nor false.
    """
    path = folder / "tokenizer_config.json"
    return path.is_file() and _read_config(path, ("split_special_tokens",)).get(
        "split_special_tokens", False
    )


def _from_vocabulary(path: Path, config: dict[str, bool], lowercase: bool | None) -> Recipe:
    vocab = _read_vocabulary(path)
    if lowercase is None:
        lowercase = config.get("do_lower_case")
    recipe = Recipe(
        vocab,
        _with_special_tokens(vocab, ()),
        lowercase=bool(lowercase),
        strip_accents=False,
        split_chinese=config.get("tokenize_chinese_chars", True),
    )
    if lowercase is None:
        lowercase = not recipe.is_cased
    # BERT's own rule: lower-casing also strips accents.
    strip_accents = config.get("strip_accents", lowercase)
    return replace(recipe, lowercase=lowercase, strip_accents=strip_accents)


def _from_tokenizer_json(path: Path, config: dict[str, bool], lowercase: bool | None) -> Recipe:
    try:
        own = tokenizers.Tokenizer.from_buffer(path.read_bytes())  # its from_file wants UTF-8 paths
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"it cannot be read: {error}; fetch it again") from None
    own.no_truncation()
    own.no_padding()
    model, normalizer = own.model, own.normalizer
    if not isinstance(model, WordPiece):
        raise ConfigError(_foreign("model", model, WordPiece))
    if not isinstance(normalizer, BertNormalizer):
        raise ConfigError(_foreign("normalizer", normalizer, BertNormalizer))
    if not isinstance(own.pre_tokenizer, BertPreTokenizer):
        raise ConfigError(_foreign("pre_tokenizer", own.pre_tokenizer, BertPreTokenizer))
    signs = (model.unk_token, model.continuing_subword_prefix)
    if signs != (UNK, PREFIX):
        raise ConfigError(f"its unknown token and prefix are {signs}, BERT's are {(UNK, PREFIX)}")

    says = {
        "do_lower_case": normalizer.lowercase,
        "strip_accents": normalizer.strip_accents,
        "tokenize_chinese_chars": normalizer.handle_chinese_chars,
    }
    for key, value in config.items() if lowercase is None else ():
        found = says["do_lower_case"] if says[key] is None else says[key]
        if value != found:
            raise ConfigError(
                f"it has {key} {found}, but tokenizer_config.json beside it says {value}; "
                "correct one of them, or load with lowercase=True or lowercase=False"
            )
    if lowercase is None:
        lowercase = normalizer.lowercase
    vocab = own.get_vocab(with_added_tokens=False)
    recipe = Recipe(
        vocab,
        _with_special_tokens(
            vocab,
            tuple(
                AddedToken(
                    number,
                    token.content,
                    token.single_word,
                    token.lstrip,
                    token.rstrip,
                    token.normalized,
                    token.special,
                )
                for number, token in own.get_added_tokens_decoder().items()
            ),
        ),
        lowercase,
        strip_accents=lowercase if normalizer.strip_accents is None else normalizer.strip_accents,
        split_chinese=normalizer.handle_chinese_chars,
        clean_text=normalizer.clean_text,
        max_word_chars=model.max_input_chars_per_word,
    )
    theirs, ours = own.encode("a", "b"), recipe.build().encode("a", "b")
    if (theirs.ids, theirs.type_ids) != (ours.ids, ours.type_ids):
        raise ConfigError(
            f"it encodes a pair of texts as {theirs.tokens} of types {theirs.type_ids}, BERT does "
            f"as {ours.tokens} of types {ours.type_ids}; give the files of a BERT model"
        )
    return recipe


def _foreign(part: str, found: object, expected: type) -> str:
    return (
        f"its {part} is {type(found).__name__}, that of a BERT tokenizer is {expected.__name__}; "
        "give the files of a BERT model, or its vocab.txt alone"
    )


def _with_special_tokens(
    vocab: dict[str, int], listed: tuple[AddedToken, ...]
) -> tuple[AddedToken, ...]:
    """Add BERT's special tokens that are in the vocabulary but not listed as added tokens."""
    contents = {token.content for token in listed}
    lacking = (
        AddedToken(vocab[token], token)
        for token in SPECIAL_TOKENS
        if token in vocab and token not in contents
    )
    return tuple(sorted((*listed, *lacking), key=lambda token: token.id))


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Read a vocab.txt; an entry's id is its line number, from 0."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"it cannot be read: {error}; fetch it again") from None
    # Not splitlines(): U+2028 and similar characters are entries of large vocabularies.
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    vocab: dict[str, int] = {}
    for number, piece in enumerate(lines):
        if vocab.setdefault(piece, number) != number:
            raise ConfigError(
                f"line {number + 1} repeats the entry {piece!r} of line {vocab[piece] + 1}, so "
                "its id is ambiguous; fetch the file again"
            )
    return vocab


def _read_config(path: Path, keys: tuple[str, ...] = _NORMALIZER_KEYS) -> dict[str, bool]:
    """Read some settings of a tokenizer_config.json; those that it does not set are left out."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; fetch it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object; fetch it again")
    settings = {}
    for key in keys:
        value = content.get(key)
        if isinstance(value, bool):
            settings[key] = value
        elif value is not None:  # null means not set
            raise ConfigError(f"{path}: {key} is {value!r:.80}; expected true, false or null")
    return settings

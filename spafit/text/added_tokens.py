"""Read the tokens that were added to a tokenizer, from the files beside its vocabulary.

They are matched in the raw text, before any other processing: markers such as [E1], @USER, <url>.
A tokenizer.json lists them itself. Beside a vocab.txt they are in ``added_tokens.json`` or in
``added_tokens_decoder`` of ``tokenizer_config.json``, both with their ids, or only named, in
``tokenizer_config.json`` or ``special_tokens_map.json``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from spafit.config import read_json
from spafit.errors import ConfigError, one_line

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""BERT's special tokens."""

CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"
_BERT_NAMES = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
_NAMES = ("bos_token", "eos_token", *_BERT_NAMES)
_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


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

    @classmethod
    def of(cls, token: tokenizers.AddedToken, number: int) -> AddedToken:
        """Return a token of the tokenizers library with its id."""
        return cls(
            number,
            token.content,
            token.single_word,
            token.lstrip,
            token.rstrip,
            token.normalized,
            token.special,
        )


@dataclass(frozen=True)
class Listed:
    """A token that a file lists.

    Attributes
    ----------
    path : Path
        The file.
    token : tokenizers.AddedToken
        Its content, and how it is matched.
    id : int or None
        The id that the file gives; None if it gives none.
    """

    path: Path
    token: tokenizers.AddedToken
    id: int | None = None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file.

    Raises
    ------
    ConfigError
        If the file cannot be read, or is not a JSON object.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {one_line(str(error))}; fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object; fetch it again")
    return content


def read_listed(folder: Path, config: dict[str, Any]) -> list[Listed]:
    """Read the tokens that the files beside a vocabulary list, as transformers does.

    They come in the order in which they get their ids: those whose id a file gives; those with a
    name, such as ``mask_token``; the further special ones. ``added_tokens_decoder`` takes the place
    of the two files that were written before there was one.

    Parameters
    ----------
    folder : Path
        The folder with the files.
    config : dict
        The content of its tokenizer_config.json.

    Returns
    -------
    list of Listed
        Each content once.

    Raises
    ------
    ConfigError
        If a file cannot be read, an entry is not a token, or one of BERT's special tokens is
        another one here; the message names the file.
    """
    is_older = "added_tokens_decoder" not in config
    special_map = read_object(folder / _MAP_FILE) if is_older else {}
    named: dict[str, Listed] = {}
    extra: list[Listed] = []
    for path, entries in ((folder / CONFIG_FILE, config), (folder / _MAP_FILE, special_map)):
        further = _further(path, entries)
        by_name = {
            key: value
            for key, value in entries.items()
            if key.endswith("_token") and isinstance(value, (str, dict))
        }
        by_name |= further if isinstance(further, dict) else {}
        # The older file does not repeat that its tokens are special.
        say = {"special": True} if path.name == _MAP_FILE else {}
        named |= {key: Listed(path, _token(path, raw, say)) for key, raw in by_name.items()}
        if isinstance(further, list) and not extra:
            extra = [Listed(path, _token(path, raw, say)) for raw in further]
    _require_berts(named)
    if is_older:
        # As transformers has it, which compares with what tokenizer_config.json spells out.
        special = {named[key].token.content for key in _NAMES if key in named}
        special |= {raw for raw in _further(folder, config) if isinstance(raw, str)}
        numbered = _in_added_file(folder, special)
    else:
        numbered = _in_decoder(folder, config)
    found: dict[str, Listed] = {}
    for each in (
        *sorted(numbered, key=lambda each: each.id or 0),
        *(named[key] for key in dict.fromkeys((*_NAMES, *named)) if key in named),
        *extra,
    ):
        if each.token.content:  # an empty one matches nothing
            found.setdefault(each.token.content, each)
    for each in named.values():
        if each.token.content:
            found[each.token.content].token.special = True
    return list(found.values())


def _further(path: Path, entries: dict[str, Any]) -> list[Any] | dict[str, Any]:
    """Return the further special tokens of a file, which may have names."""
    for key in ("extra_special_tokens", "additional_special_tokens"):
        further = entries.get(key)
        if isinstance(further, (list, dict)) and further:
            return further
        if further:
            raise ConfigError(f"{path}: {key} is {further!r:.80}, no list of tokens; correct it")
    return []


def _in_added_file(folder: Path, special: set[str]) -> list[Listed]:
    """Read added_tokens.json, which gives ids alone: what is special is said elsewhere."""
    path = folder / _ADDED_FILE
    listed = []
    for content, number in read_object(path).items():
        say = {"special": content in special, "normalized": content not in special}
        listed.append(Listed(path, _token(path, content, say), _id(path, number)))
    return listed


def _in_decoder(folder: Path, config: dict[str, Any]) -> list[Listed]:
    """Read ``added_tokens_decoder``, which gives everything by the ids."""
    path, decoder = folder / CONFIG_FILE, config["added_tokens_decoder"]
    if not isinstance(decoder, dict) or not all(isinstance(raw, dict) for raw in decoder.values()):
        raise ConfigError(f"{path}: added_tokens_decoder is no object of tokens; correct it")
    return [Listed(path, _token(path, raw, {}), _id(path, key)) for key, raw in decoder.items()]


def _id(path: Path, number: object) -> int:
    if isinstance(number, str) and re.fullmatch("[0-9]{1,18}", number):
        return int(number)
    if type(number) is not int or number < 0:
        raise ConfigError(f"{path}: {number!r:.80} is no id of a token; correct it")
    return number


def _token(path: Path, raw: object, say: dict[str, bool]) -> tokenizers.AddedToken:
    """Read a token that is spelled out, or written with how it is matched."""
    fields = {"content": raw, "special": True} if isinstance(raw, str) else raw
    try:
        if not isinstance(fields, dict) or "content" not in fields:
            raise TypeError("it has no content")
        fields = {key: fields[key] for key in _FIELDS if key in fields}
        return tokenizers.AddedToken(**{**fields, **say})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {raw!r:.80} is no token: {one_line(str(error))}") from None


def _require_berts(named: dict[str, Listed]) -> None:
    """Refuse other special tokens than BERT's, which a text could not be framed with."""
    for name, expected in _BERT_NAMES.items():
        if name in named and named[name].token.content != expected:
            raise ConfigError(
                f"{named[name].path}: {name} is {named[name].token.content!r:.80}, that of a BERT "
                f"tokenizer is {expected}; give the files of a BERT model"
            )

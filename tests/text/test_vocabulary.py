"""Which tokenizer's files are read, as cased or uncased, and vocabularies with holes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from spafit.config import BertConfig
from spafit.errors import ConfigError
from spafit.text.tokenization import load_tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LOWER = tuple("the server user code of a dog is at home and no one sees it by day".split())
ALPHABET = tuple("abcdefghijklmnopqrstuvwxyz")
UNCASED = (*SPECIAL, "[unused1]", *dict.fromkeys((*LOWER, *ALPHABET, "##s", "##e", "!", "0")))
CASED = (*UNCASED, "The", "Dog", "I", "Paris", "##A", *"ABCDEFGHJ")


def write(folder: Path, entries: tuple[str, ...], **files: Any) -> Path:
    """Write a vocab.txt and JSON files beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join((*entries, "")), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


class TestClass:
    """Oracle: the names that BERT's files and those of other tokenizers have."""

    @pytest.mark.parametrize("file", ["tokenizer_config", "config"])
    @pytest.mark.parametrize(
        "name",
        [
            "BertJapaneseTokenizer",
            "BertweetTokenizer",
            "RobertaTokenizerFast",
            "MyTokenizer",
            ["a"],
        ],
    )
    def test_others_are_refused_by_name(self, tmp_path: Path, file: str, name: object) -> None:
        write(tmp_path, UNCASED, tokenizer_config={"do_lower_case": True})
        write(tmp_path, UNCASED, **{file: {"tokenizer_class": name}})
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(tmp_path)
        assert f"{file}.json: tokenizer_class is {name!r}" in str(caught.value)

    @pytest.mark.parametrize(
        "name",
        ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "PreTrainedTokenizerFast",
         "TokenizersBackend", None],
    )  # fmt: skip
    def test_berts_are_read(self, tmp_path: Path, name: str | None) -> None:
        folder = write(tmp_path / "a", UNCASED, tokenizer_config={"tokenizer_class": name})
        assert load_tokenizer(folder).vocab_size == len(UNCASED)
        folder = write(tmp_path / "b", UNCASED, config={"tokenizer_class": name})
        tokenizer = load_tokenizer(folder)
        tokenizer.save(tmp_path / "c")
        for content in (folder / "config.json", folder / "tokenizer_config.json"):
            if content.is_file():
                (tmp_path / "c" / content.name).write_bytes(content.read_bytes())
        assert load_tokenizer(tmp_path / "c").fingerprint == tokenizer.fingerprint

    def test_the_tokenizers_own_file_counts_first(self, tmp_path: Path) -> None:
        write(
            tmp_path,
            UNCASED,
            tokenizer_config={"tokenizer_class": "BertTokenizer"},
            config={"tokenizer_class": "BertJapaneseTokenizer"},
        )
        load_tokenizer(tmp_path)

    @pytest.mark.parametrize("file", ["tokenizer_config", "config"])
    @pytest.mark.parametrize(
        ("key", "value", "berts"),
        [
            ("word_tokenizer_type", "mecab", "basic"),
            ("subword_tokenizer_type", "character", "wordpiece"),
        ],
    )
    def test_other_ways_to_split(
        self, tmp_path: Path, file: str, key: str, value: str, berts: str
    ) -> None:
        write(tmp_path, UNCASED, **{file: {key: value}})
        with pytest.raises(ConfigError, match=rf"{file}\.json: {key} is '{value}'"):
            load_tokenizer(tmp_path)
        load_tokenizer(write(tmp_path, UNCASED, **{file: {key: berts}}))


class TestTokenizerJson:
    """Oracle: the message, of a file of BERT's that was changed in one place."""

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            (
                '"lowercase": true',
                '"lowercase": false',
                "it has do_lower_case False, but tokenizer",
            ),
            ('"unk_token": "[UNK]"', '"unk_token": "[PAD]"', "its unknown token and prefix are"),
            ('"type_id": 1', '"type_id": 0', "it encodes a pair of texts as"),
        ],
    )
    def test_of_other_settings(self, tmp_path: Path, old: str, new: str, says: str) -> None:
        load_tokenizer(write(tmp_path, UNCASED)).save(tmp_path)
        path = tmp_path / "tokenizer.json"
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))
        with pytest.raises(ConfigError, match=says):
            load_tokenizer(tmp_path)

    def test_signs_before_a_vocabulary(self, tmp_path: Path) -> None:
        """A byte-order mark is no part of the first entry."""
        plain = load_tokenizer(write(tmp_path, UNCASED)).fingerprint
        path = tmp_path / "vocab.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert load_tokenizer(tmp_path).fingerprint == plain


class TestCaseOfALoneVocabulary:
    """Oracle: what the vocabularies are, by their making."""

    def notes(self, folder: Path) -> tuple[bool, list[str]]:
        """Return whether the text is lower-cased, and what was said."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lowercase = load_tokenizer(folder).recipe.lowercase
        return lowercase, [str(warning.message) for warning in caught]

    def test_clear(self, tmp_path: Path) -> None:
        assert self.notes(write(tmp_path, UNCASED)) == (True, [])
        assert self.notes(write(tmp_path, CASED)) == (False, [])
        kmers = (*SPECIAL, "AAA", "AAC", "ACG", "[Unused]")
        assert self.notes(write(tmp_path, kmers)) == (False, [])

    def test_placeholders_in_capitals(self, tmp_path: Path) -> None:
        entries = (*UNCASED, "USER", "##ER", "U", "<URL>", "[E1]", "@X")
        words = sum(entry.removeprefix("##").isalpha() for entry in entries)
        lowercase, [note] = self.notes(write(tmp_path, entries))
        assert lowercase
        assert f"taken as uncased, because 3 of its {words} words" in note
        assert "lowercase=False (spafit train --no-lowercase)" in note
        ids = load_tokenizer(tmp_path, lowercase=True).encode(["The Server"], max_length=9)
        assert ids.input_ids == [[2, entries.index("the"), entries.index("server"), 3]]

    def test_few_capitals_are_taken_as_cased_with_a_note(self, tmp_path: Path) -> None:
        lowercase, [note] = self.notes(write(tmp_path, (*UNCASED, *"ABCDEF")))
        assert not lowercase
        assert "taken as cased, because 6 of its " in note
        assert "lowercase=True (spafit train --lowercase)" in note

    def test_what_the_files_say_is_no_guess(self, tmp_path: Path) -> None:
        for value in (True, False):
            config = {"do_lower_case": value}
            folder = write(tmp_path, (*UNCASED, "USER"), tokenizer_config=config)
            assert self.notes(folder) == (value, [])

    def test_real_vocabularies(self, shared_data: Path, tmp_path: Path) -> None:
        for name, lowercase in (("bert-base-uncased", True), ("bert-cased", False)):
            content = (shared_data / "vocab" / name / "vocab.txt").read_bytes()
            (tmp_path / "vocab.txt").write_bytes(content)
            assert self.notes(tmp_path) == (lowercase, [])


class TestHoles:
    """Oracle: the numbers of the lines, and AutoTokenizer on the same files."""

    @pytest.mark.parametrize(
        ("entries", "holes"),
        [
            ((*SPECIAL, "the", "dog", "the", "##s"), 1),
            ((*SPECIAL, "the", "", "dog", "##s"), 0),
            ((*SPECIAL, "", "the", "", "the", "dog", "##s"), 2),
            ((*SPECIAL[:4], "[SEP]", "[MASK]", "the", "dog", "##s"), 1),
        ],
    )
    def test_repeated_and_blank_entries(
        self, tmp_path: Path, entries: tuple[str, ...], holes: int
    ) -> None:
        transformers = pytest.importorskip("transformers")
        folder = write(tmp_path / "v", entries, tokenizer_config={"do_lower_case": True})
        (folder / "config.json").write_text('{"model_type": "bert"}')
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = load_tokenizer(folder)
        assert ours.vocab_size == len(entries)
        text, last = "The dogs the", {entry: number for number, entry in enumerate(entries)}
        ids = [last[entry] for entry in ("[CLS]", "the", "dog", "##s", "the", "[SEP]")]
        assert ours.encode([text], max_length=9).input_ids == [ids] == [theirs(text)["input_ids"]]
        notes = [str(warning.message) for warning in caught]
        assert len(notes) == bool(holes)
        assert all(f"{holes} of the ids up to {len(entries) - 1} belong to no" in n for n in notes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours.save(tmp_path / "new")
            assert load_tokenizer(tmp_path / "new").fingerprint == ours.fingerprint

    def test_two_entries_of_one_id(self, tmp_path: Path) -> None:
        load_tokenizer(write(tmp_path, UNCASED)).save(tmp_path)
        path = tmp_path / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["vocab"]["the"] = content["model"]["vocab"]["dog"]
        path.write_text(json.dumps(content))
        with pytest.raises(
            ConfigError, match=r"json: '(the|dog)' and '(the|dog)' have the same id"
        ):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("limit", [0, -1, 1.5, "100", None, True, 2**70, [100]])
    @pytest.mark.parametrize("has_type", [True, False])
    def test_words_of_no_length(self, tmp_path: Path, limit: object, has_type: bool) -> None:
        """Without its type the library takes such a model for another kind."""
        load_tokenizer(write(tmp_path, UNCASED)).save(tmp_path)
        path = tmp_path / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["max_input_chars_per_word"] = limit
        if not has_type:
            del content["model"]["type"]
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(tmp_path)
        assert f"tokenizer.json: max_input_chars_per_word is {limit!r}" in str(caught.value)


class TestDisagreement:
    """Oracle: the message, and the toy vocabulary, whose ids are known by their places."""

    def folder(self, path: Path, normalizer: dict[str, Any], config: dict[str, Any]) -> Path:
        """Write a tokenizer.json that lower-cases, changed, with a tokenizer_config.json."""
        load_tokenizer(write(path, (*UNCASED, "é", "東京", "東", "京"))).save(path)
        content = json.loads((path / "tokenizer.json").read_text())
        content["normalizer"] |= normalizer
        (path / "tokenizer.json").write_text(json.dumps(content))
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    @pytest.mark.parametrize("lowercase", [None, True, False])
    @pytest.mark.parametrize(
        ("normalizer", "config", "says"),
        [
            ({"strip_accents": False}, {"strip_accents": True}, "strip_accents False"),
            ({"strip_accents": True}, {"strip_accents": False}, "strip_accents True"),
            ({"strip_accents": None}, {"strip_accents": False}, "strip_accents True"),
            (
                {"handle_chinese_chars": False},
                {"do_lower_case": False, "tokenize_chinese_chars": True},
                "tokenize_chinese_chars False",
            ),
        ],
    )
    def test_what_has_nothing_to_do_with_lower_casing(
        self,
        tmp_path: Path,
        lowercase: bool | None,
        normalizer: dict[str, Any],
        config: dict[str, Any],
        says: str,
    ) -> None:
        config = {**config, "do_lower_case": None} if lowercase is None else config
        folder = self.folder(tmp_path, normalizer, config)
        with pytest.raises(ConfigError, match=rf"json: it has {says}, .* one of them$"):
            load_tokenizer(folder, lowercase=lowercase)

    def test_lowercase_settles_lower_casing(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, {}, {"do_lower_case": False})
        with pytest.raises(
            ConfigError,
            match=r"has do_lower_case True, .* \(spafit train --lowercase or --no-lowercase\)$",
        ):
            load_tokenizer(folder)
        for lowercase in (True, False):
            assert load_tokenizer(folder, lowercase=lowercase).recipe.lowercase is lowercase

    @pytest.mark.parametrize(("config", "strips"), [({"strip_accents": True}, True), ({}, False)])
    def test_accents_that_follow_lower_casing(
        self, tmp_path: Path, config: dict[str, Any], strips: bool
    ) -> None:
        """As beside a vocab.txt: what tokenizer_config.json sets is not undone by lowercase."""
        folder = self.folder(tmp_path, {"strip_accents": None}, config)
        assert load_tokenizer(folder).recipe.strip_accents
        assert load_tokenizer(folder, lowercase=False).recipe.strip_accents is strips


class TestBlanks:
    """Oracle: AutoTokenizer on the same files, and the numbers of the lines."""

    @pytest.mark.parametrize(
        ("end", "is_noted"),
        [(" \n", 1), ("\t\n", 1), ("  \t\r\n", 1), ("\u3000\xa0\n", 1), ("\r\n", 0), ("\n", 0)],
    )
    def test_at_the_ends_of_lines(self, tmp_path: Path, end: str, is_noted: bool) -> None:
        transformers = pytest.importorskip("transformers")
        plain = load_tokenizer(write(tmp_path, UNCASED, config={"model_type": "bert"}))
        lines = [f"{entry}{end}" for entry in UNCASED]
        (tmp_path / "vocab.txt").write_bytes("".join(lines).encode())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = load_tokenizer(tmp_path)
        assert ours.fingerprint == plain.fingerprint
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert ours.recipe.vocab == theirs.get_vocab()
        notes = [str(warning.message) for warning in caught]
        assert len(notes) == is_noted
        assert all(f"vocab.txt: {len(UNCASED)} of its lines end in blanks, such as '[PAD]" in note
                   for note in notes)  # fmt: skip

    def test_entries_of_blanks_keep_their_ids(self, tmp_path: Path) -> None:
        """So do control characters, which the library takes for part of an entry."""
        entries = (*SPECIAL, "the", "\u2028", "\x85", " ", "dog", "dog\x1c")
        assert load_tokenizer(write(tmp_path, entries)).recipe.vocab == {
            entry: number for number, entry in enumerate(entries)
        }


class TestPointers:
    """Oracle: the message, which names the file and git's command."""

    POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 466062\n"

    @pytest.mark.parametrize(
        "name",
        ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "config.json"],
    )  # fmt: skip
    def test_in_place_of_a_file(self, tmp_path: Path, name: str) -> None:
        (write(tmp_path, UNCASED) / name).write_text(self.POINTER)
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(tmp_path)
        message = str(caught.value)
        assert message.startswith(str(tmp_path / name))
        assert "cannot be read: it is a Git LFS pointer" in message
        assert "run `git lfs pull`" in message

    def test_in_place_of_a_configuration(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(self.POINTER)
        with pytest.raises(ConfigError, match=r"config\.json .* LFS pointer.*: run `git lfs pull`"):
            BertConfig.from_json(tmp_path)

    def test_a_vocabulary_may_begin_with_that_word(self, tmp_path: Path) -> None:
        ours = load_tokenizer(write(tmp_path, ("version", "http", *UNCASED)))
        assert ours.recipe.vocab["version"] == 0


def test_a_sequence_of_one_is_its_member(tmp_path: Path) -> None:
    """Oracle: the same files without the sequences."""
    plain = load_tokenizer(write(tmp_path, UNCASED))
    plain.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for count in (1, 2, 0):
        changed = {
            "normalizer": {"type": "Sequence", "normalizers": [content["normalizer"]] * count},
            "pre_tokenizer": {"type": "Sequence",
                              "pretokenizers": [content["pre_tokenizer"]] * count},
        }  # fmt: skip
        for part in changed:
            path.write_text(json.dumps({**content, part: changed[part]}))
            if count == 1:
                assert load_tokenizer(tmp_path).fingerprint == plain.fingerprint
            else:
                with pytest.raises(ConfigError, match=f"its {part} is Sequence, that of a BERT"):
                    load_tokenizer(tmp_path)


class TestWithoutMask:
    """Oracle: AutoTokenizer on texts that do not spell [MASK] out, and the numbers of the lines."""

    ENTRIES = (*UNCASED[:4], *UNCASED[5:], "[", "]")

    def test_it_is_not_needed(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        folder = write(tmp_path / "a", self.ENTRIES, config={"model_type": "bert"})
        plain = load_tokenizer(folder)
        assert plain.vocab_size == len(self.ENTRIES), "as many rows as the model has"
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        texts = ["The dogs of a user!", ""]
        assert plain.encode(texts, max_length=20).input_ids == theirs(texts)["input_ids"]
        write(folder, (*self.ENTRIES, ""), tokenizer_config={"mask_token": "[MASK]"})
        assert load_tokenizer(folder).fingerprint == plain.fingerprint
        plain.save(tmp_path / "new")
        assert load_tokenizer(tmp_path / "new").fingerprint == plain.fingerprint
        (tmp_path / "new" / "special_tokens_map.json").write_text('{"mask_token": "[MASK]"}')
        assert load_tokenizer(tmp_path / "new").fingerprint == plain.fingerprint

    def test_where_a_file_gives_its_id(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        size = len(self.ENTRIES)
        folder = write(
            tmp_path, self.ENTRIES, added_tokens={"[MASK]": size, "<url>": size + 1},
            config={"model_type": "bert"}, tokenizer_config={"do_lower_case": True},
        )  # fmt: skip
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ids = load_tokenizer(folder).encode(["a [MASK] <url>"], max_length=20).input_ids
        assert ids == theirs(["a [MASK] <url>"])["input_ids"]
        assert ids[0][-3:-1] == [size, size + 1]
        split = load_tokenizer(folder, split_special_tokens=True)
        assert split.encode(["<url>"], max_length=20).input_ids == [[2, size + 1, 3]]

"""Tokens that were added beside a vocab.txt, in every place where published files have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spafit.errors import ConfigError
from spafit.text.tokenization import load_tokenizer

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "server", "fails", "[", "]", "e",
          "##1", "/", "user", "@", "u", "##rl", "url", "<", ">")  # fmt: skip
SIZE = len(PIECES)
TEXTS = [
    "the [E1] server [/E1] fails",
    "the[E1]server [e1]",
    "@USER user @user xuser",
    "<url> <URL>",
]


def marker(content: str, **flags: bool) -> dict[str, object]:
    """Return a token as tokenizer_config.json spells it out."""
    defaults = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **defaults, **flags}


TYPED = {"__type": "AddedToken"}
DECODER = {str(SIZE): {**marker("[E1]"), "special": True},
           str(SIZE + 1): {**marker("@USER", normalized=True), "special": False}}  # fmt: skip

# Further pieces, tokenizer_config.json, special_tokens_map.json, added_tokens.json.
FILES: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "ids alone": ((), {}, {}, {"[E1]": SIZE, "[/E1]": SIZE + 1}),
    "ids not in order": ((), {}, {}, {"[/E1]": SIZE + 1, "[E1]": SIZE}),
    "ids of tokens in the vocabulary": (("[E1]",), {}, {}, {"[E1]": SIZE, "[CLS]": 2}),
    "ids, special": (
        (), {"additional_special_tokens": ["[E1]"]}, {}, {"[E1]": SIZE, "@USER": SIZE + 1}),
    "decoder": ((), {"added_tokens_decoder": DECODER}, {}, {}),
    "decoder before the older files": (
        (), {"added_tokens_decoder": DECODER}, {"bos_token": "<url>"}, {"<url>": SIZE}),
    "in the vocabulary": (
        ("[E1]", "[/E1]"), {"additional_special_tokens": ["[E1]", "[/E1]"]}, {}, {}),
    "in the vocabulary, written out": (
        ("[E1]",),
        {"additional_special_tokens": [
            {**marker("[E1]", lstrip=True), **TYPED},
            {**marker("user", single_word=True), **TYPED}]},
        {}, {}),
    "of the map": (("[E1]",), {}, {"additional_special_tokens": ["[E1]", "@USER"]}, {}),
    "under its newer name": ((), {"extra_special_tokens": ["@USER"]}, {}, {}),
    "with names": (
        (), {"extra_special_tokens": {"user_token": "@USER"}, "image_token": "<url>"}, {}, {}),
    "begin and end": ((), {}, {"eos_token": "[SEP]", "bos_token": marker("<url>")}, {}),
    "begin and end before the others": (
        (), {"image_token": "@USER"}, {"eos_token": "<url>", "bos_token": "[E1]"}, {}),
    "decoder, with a name": (
        (), {"added_tokens_decoder": DECODER, "image_token": "@USER"}, {}, {}),
    "mask that takes the space": ((), {}, {"mask_token": marker("[MASK]", lstrip=True)}, {}),
}  # fmt: skip


def write(folder: Path, pieces: tuple[str, ...], config: Any, special_map: Any, added: Any) -> Path:
    """Write the files of a tokenizer that lower-cases; an empty one is left out."""
    (folder / "vocab.txt").write_text("\n".join((*pieces, "")), encoding="utf-8")
    content = {
        "tokenizer_config.json": {"do_lower_case": True, **config},
        "special_tokens_map.json": special_map,
        "added_tokens.json": added,
    }
    for name, entries in content.items():
        if entries:
            (folder / name).write_text(json.dumps(entries), encoding="utf-8")
    return folder


class TestAgainstTransformers:
    """Oracle: AutoTokenizer on the same files."""

    @pytest.mark.parametrize("case", FILES)
    def test_ids(self, tmp_path: Path, case: str) -> None:
        transformers = pytest.importorskip("transformers")
        further, config, special_map, added = FILES[case]
        write(tmp_path, (*PIECES, *further), config, special_map, added)
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for split in (False, True):
            ours = load_tokenizer(tmp_path, split_special_tokens=split)
            expected = theirs(TEXTS, split_special_tokens=split)["input_ids"]
            assert ours.encode(TEXTS, max_length=40).input_ids == expected
            assert ours.vocab_size == len(theirs)

    def test_saved_again(self, tmp_path: Path) -> None:
        """A tokenizer.json has them itself."""
        transformers = pytest.importorskip("transformers")
        ours = load_tokenizer(write(tmp_path, PIECES, *FILES["ids, special"][1:]))
        ours.save(tmp_path / "new")
        assert load_tokenizer(tmp_path / "new").fingerprint == ours.fingerprint
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
        assert theirs(TEXTS)["input_ids"] == ours.encode(TEXTS, max_length=40).input_ids

    @pytest.mark.parametrize("blank", [("",), ("", "", "")])
    @pytest.mark.parametrize("pieces", [PIECES, (*PIECES[:9], "", *PIECES[9:])])
    @pytest.mark.parametrize("has_ids", [True, False])
    def test_blank_last_lines(
        self, tmp_path: Path, blank: tuple[str, ...], pieces: tuple[str, ...], has_ids: bool
    ) -> None:
        """They count as one entry if there is no other blank one."""
        transformers = pytest.importorskip("transformers")
        tokens = {"[E1]": SIZE + 1, "@USER": SIZE + 2} if has_ids else {}
        config = {} if has_ids else {"additional_special_tokens": ["[E1]", "@USER"]}
        write(tmp_path, (*pieces, *blank), config, {}, tokens)
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ids = load_tokenizer(tmp_path).encode(TEXTS, max_length=40).input_ids
        assert theirs(TEXTS)["input_ids"] == ids
        assert SIZE + 1 in ids[0]


class TestByHand:
    """Oracle: the numbers of the lines."""

    @pytest.mark.parametrize("added", [{}, {"[E1]": SIZE, "@USER": SIZE + 1}])
    def test_blank_last_lines_whose_id_is_not_theirs(
        self, tmp_path: Path, added: dict[str, int]
    ) -> None:
        plain = load_tokenizer(write(tmp_path, PIECES, {}, {}, added))
        assert plain.vocab_size == SIZE + len(added)
        write(tmp_path, (*PIECES, "", ""), {}, {}, added)
        assert load_tokenizer(tmp_path).fingerprint == plain.fingerprint

    def test_tokens_written_out_in_the_older_map(self, tmp_path: Path) -> None:
        """As transformers 4 wrote them; transformers 5 cannot read them."""
        special_map = {"additional_special_tokens": [marker("[E1]"), marker("@USER")]}
        ours = load_tokenizer(write(tmp_path, (*PIECES, "[E1]"), {}, special_map, {}))
        ids = ours.encode(TEXTS[:2], max_length=40).input_ids
        assert [row.count(SIZE) for row in ids] == [1, 1]
        split = load_tokenizer(tmp_path, split_special_tokens=True)
        assert SIZE not in split.encode(TEXTS[:1], max_length=40).input_ids[0], "it is special"
        assert ours.encode(["@USER"], max_length=9).input_ids == [[2, SIZE + 1, 3]]

    def test_they_make_another_tokenizer(self, tmp_path: Path) -> None:
        """Of another fingerprint; a text keeps those that are not special, as normalized."""
        plain = load_tokenizer(write(tmp_path, PIECES, {}, {}, {})).fingerprint
        decoder = {"added_tokens_decoder": DECODER}
        ours = load_tokenizer(write(tmp_path, PIECES, decoder, {}, {}))
        assert ours.fingerprint != plain
        assert ours.decode([SIZE, 5, SIZE + 1], skip_special_tokens=True) == "the @user"

    def test_they_complete_a_tokenizer_json(self, tmp_path: Path) -> None:
        load_tokenizer(write(tmp_path, (*PIECES, "[E1]"), {}, {}, {})).save(tmp_path / "new")
        (tmp_path / "new" / "added_tokens.json").write_text(json.dumps({"[E1]": SIZE}))
        ours = load_tokenizer(tmp_path / "new")
        assert ours.encode(["the [E1]"], max_length=9).input_ids == [[2, 5, SIZE, 3]]

    def test_an_empty_token_matches_nothing(self, tmp_path: Path) -> None:
        plain = load_tokenizer(write(tmp_path, PIECES, {}, {}, {})).fingerprint
        config = {"additional_special_tokens": [""], "bos_token": None, "eos_token": ""}
        assert load_tokenizer(write(tmp_path, PIECES, config, {}, {})).fingerprint == plain


class TestRefusals:
    """Oracle: the message, which names the file and the token."""

    @pytest.mark.parametrize(
        ("name", "entries", "says"),
        [
            ("added_tokens.json", {"[E1]": SIZE + 1}, rf"'\[E1\]' the id {SIZE}, but added_tokens"),
            ("added_tokens.json", {"the": 6}, r"'the' the id 5, but added_tokens\.json .* says 6"),
            ("added_tokens.json", {"[E1]": -1}, r"added_tokens\.json: -1 is no id"),
            ("added_tokens.json", {"[E1]": True}, r"added_tokens\.json: True is no id"),
            ("added_tokens.json", ["[E1]"], r"added_tokens\.json is not a JSON object"),
            ("tokenizer_config.json", {"added_tokens_decoder": ["a"]}, "tokens_decoder is no"),
            ("tokenizer_config.json", {"added_tokens_decoder": {"20": "a"}}, "decoder is no"),
            ("tokenizer_config.json", {"added_tokens_decoder": {"x": marker("a")}}, "'x' is no id"),
            (
                "tokenizer_config.json",
                {"added_tokens_decoder": {"9" * 5000: marker("a")}},
                r"tokenizer_config\.json: '9999",
            ),
            ("tokenizer_config.json", {"additional_special_tokens": "a"}, "'a', no list of tokens"),
            ("tokenizer_config.json", {"additional_special_tokens": [{}]}, r"\{\} is no token"),
            ("tokenizer_config.json", {"extra_special_tokens": [5]}, "5 is no token"),
            ("special_tokens_map.json", {"bos_token": marker("a", lstrip="no")}, "is no token"),
            ("special_tokens_map.json", {"bos_token": {"content": "\ud800"}}, "is no token"),
            ("special_tokens_map.json", {"cls_token": "<s>"}, r"cls_token is '<s>', .* \[CLS\]"),
            ("tokenizer_config.json", {"unk_token": marker("<unk>")}, "unk_token is '<unk>'"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_read(self, tmp_path: Path, name: str, entries: Any, says: str) -> None:
        write(tmp_path, PIECES, {}, {}, {})
        (tmp_path / name).write_text(json.dumps(entries))
        with pytest.raises(ConfigError, match=says) as caught:
            load_tokenizer(tmp_path)
        assert name in str(caught.value)
        assert len(str(caught.value)) < 500

    def test_an_id_in_doubt(self, tmp_path: Path) -> None:
        """The tokenizers library would give the new token the id of another."""
        write(tmp_path, (*PIECES, "the"), {}, {}, {"[E1]": SIZE + 1})
        with pytest.raises(
            ConfigError, match=r"'\[E1\]', which added_tokens\.json adds, is in doubt"
        ):
            load_tokenizer(tmp_path)


class TestInTokenizerJson:
    """Oracle: the ids in the file, and AutoTokenizer where it keeps to them."""

    def edited(self, folder: Path, added: dict[str, int], left_out: tuple[str, ...] = ()) -> Path:
        """Write a tokenizer.json with tokens added and entries left out."""
        load_tokenizer(write(folder, PIECES, {}, {}, {})).save(folder / "new")
        path = folder / "new" / "tokenizer.json"
        content = json.loads(path.read_text())
        content["added_tokens"] += [
            {"id": number, "special": True, **marker(token)} for token, number in added.items()
        ]
        for piece in left_out:
            del content["model"]["vocab"][piece]
        path.write_text(json.dumps(content))
        return path.parent

    def test_in_another_order_than_their_ids(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        folder = self.edited(tmp_path, {"[/E1]": SIZE + 2, "@USER": SIZE, "[E1]": SIZE + 1})
        (folder / "config.json").write_text('{"model_type": "bert"}')
        ours = load_tokenizer(folder)
        ids = ours.encode(["[E1] the [/E1] @USER"], max_length=9).input_ids
        assert ids == [[2, SIZE + 1, 5, SIZE + 2, SIZE, 3]]
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs(["[E1] the [/E1] @USER"])["input_ids"] == ids
        ours.save(tmp_path / "again")
        assert load_tokenizer(tmp_path / "again").fingerprint == ours.fingerprint

    @pytest.mark.parametrize(
        ("added", "left_out", "says"),
        [
            ({"[E1]": SIZE + 5}, (), rf"'\[E1\]' the id {SIZE + 5}, but its {SIZE} .* it {SIZE};"),
            ({"[E1]": SIZE, "a": SIZE + 2}, (), rf"'a' the id {SIZE + 2}, .* give it {SIZE + 1};"),
            ({"[E1]": SIZE}, (">",), rf"'\[E1\]' the id {SIZE}, .* give it {SIZE - 1};"),
            ({"[E1]": SIZE}, ("user",), rf"'\[E1\]' the id {SIZE}, .* give it {SIZE - 1};"),
            ({"[E1]": 13}, ("user",), rf"'\[E1\]' the id 13, .* give it {SIZE - 1};"),
            ({"the": SIZE}, (), rf"'the' the id {SIZE}, .* give it 5;"),
            ({"[E1]": 5}, (), r"'\[E1\]' and 'the' have the same id, 5"),
        ],
    )
    def test_ids_that_they_cannot_get(
        self, tmp_path: Path, added: dict[str, int], left_out: tuple[str, ...], says: str
    ) -> None:
        with pytest.raises(ConfigError, match=rf"tokenizer\.json: .*{says}"):
            load_tokenizer(self.edited(tmp_path, added, left_out))

"""Tokenization, compared with transformers on real texts."""

import json
import warnings
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from spafit import glue
from spafit.errors import ConfigError, DataError, SpafitError, WeightsError
from spafit.text.tokenization import Encodings, Tokenizer, load_tokenizer
from spafit.weights.pretrained import load_pretrained

FILES = {
    "cola": ("CoLA/train.tsv",),
    "sst-2": ("SST-2/train.tsv",),
    "mrpc": ("MRPC/train.tsv",),
    "sts-b": ("STS-B/train.tsv",),
    "qqp": ("QQP/train_subset.tsv",),
    "mnli": ("MNLI/train_subset.tsv",),
    "qnli": ("QNLI/train_subset.tsv",),
    "rte": ("RTE/train.tsv",),
    "wnli": ("WNLI/train.tsv", "WNLI/dev.tsv", "WNLI/test.tsv"),  # 852 rows: all there are
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CASED_TOY = (*SPECIAL, "the", "Dog", "dog", "##s", "!", "é", "e")


@lru_cache(maxsize=2)
def real_rows(root: Path, task: str, most: int) -> tuple[list[str], list[str] | None]:
    """Read texts or pairs, spread evenly over the real files of a task."""
    texts_a: list[str] = []
    texts_b: list[str] = []
    for name in FILES[task]:
        split = "test" if name.endswith("test.tsv") else "train"
        data = glue.read_file(task, root / "glue" / name, split, max_bad_rows=1000)
        texts_a += data.texts_a
        texts_b += data.texts_b or []
    step = max(1, len(texts_a) // most)
    return texts_a[::step][:most], texts_b[::step][:most] or None


def write_vocabulary(folder: Path, entries: tuple[str, ...], config: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_bytes("\n".join((*entries, "")).encode())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def edited_json(source: Path, target: Path, edit) -> Path:
    """Copy a folder's tokenizer.json, changed by ``edit``."""
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    edit(content)
    target.mkdir(exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def cased(shared_data: Path) -> Path:
    return shared_data / "vocab" / "bert-cased"


@pytest.fixture(scope="module")
def cased_txt(cased: Path, tmp_path_factory) -> Path:
    """Make a folder that holds the real cased vocab.txt and nothing else."""
    folder = tmp_path_factory.mktemp("cased")
    (folder / "vocab.txt").write_bytes((cased / "vocab.txt").read_bytes())
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Tokenizer:
    folder = write_vocabulary(tmp_path / "toy", CASED_TOY, {"do_lower_case": False})
    return load_tokenizer(folder)


class TestAgainstTransformers:
    """Oracle: BertTokenizerFast of transformers, made from the same vocab.txt.

    It is made from the vocabulary with ``do_lower_case`` spelled out: transformers 5 lower-cases a
    folder that has a cased tokenizer.json and no tokenizer_config.json.
    """

    @staticmethod
    def check(tokenizers: list[Tokenizer], oracle, rows, max_lengths: tuple[int, ...]) -> int:
        """Hold each tokenizer against the oracle; give the number of truncated examples."""
        texts_a, texts_b = rows
        whole = oracle(texts_a, texts_b)["input_ids"]
        total = 0
        for max_length in max_lengths:
            expected = oracle(texts_a, texts_b, truncation=True, max_length=max_length)
            truncated = sum(len(ids) > max_length for ids in whole)
            total += truncated
            for tokenizer in tokenizers:
                found = tokenizer.encode(texts_a, texts_b, max_length=max_length)
                assert found.input_ids == expected["input_ids"]
                assert found.token_type_ids == expected["token_type_ids"]
                assert found.lengths == [len(ids) for ids in expected["input_ids"]]
                assert found.truncated == truncated
        return total

    @pytest.mark.parametrize("task", FILES)
    def test_cased(
        self, shared_data: Path, cased: Path, cased_txt: Path, sized, promise, task: str
    ):
        transformers = pytest.importorskip("transformers")
        oracle = transformers.BertTokenizerFast(str(cased / "vocab.txt"), do_lower_case=False)
        most = sized(250, 1000)
        rows = real_rows(shared_data, task, most)
        assert len(rows[0]) == min(most, 852 if task == "wnli" else 1000)
        ours = [load_tokenizer(cased), load_tokenizer(cased_txt)]
        self.check(ours, oracle, rows, (128, 40))
        # Fewer, because transformers also makes every piece that it cut off.
        few = (rows[0][:200], rows[1] and rows[1][:200])
        assert self.check(ours, oracle, few, (12,)) > 50
        promise("real texts against transformers", len(rows[0]), "0 other ids")

    @pytest.mark.parametrize("task", FILES)
    def test_uncased(self, shared_data: Path, minilm_folder: Path, sized, promise, task: str):
        transformers = pytest.importorskip("transformers")
        folder = shared_data / "vocab" / "bert-base-uncased"
        oracle = transformers.BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True)
        rows = real_rows(shared_data, task, sized(120, 1000))
        # MiniLM's tokenizer.json brings padding to 128 and truncation at 128.
        ours = [load_tokenizer(folder), load_tokenizer(minilm_folder)]
        self.check(ours, oracle, rows, (40,))
        promise("real texts against transformers", len(rows[0]), "0 other ids")

    def test_texts_that_no_task_has(self, cased: Path):
        transformers = pytest.importorskip("transformers")
        oracle = transformers.BertTokenizerFast(str(cased / "vocab.txt"), do_lower_case=False)
        texts = [
            "",
            "   ",
            "\t\r\n\x00\x0b\u2028\u200b\ufeff",
            "Tokyo is \u6771\u4eac, S\u00e3o Paulo is na\u00efve.",
            "e\u0301 \u0130stanbul \U0001f600 \uff21",
            "a [SEP] b [MASK] [CLS] [sep] ##ing",
            "x" * 101 + " " + "x" * 100,
            "A sentence. " * 60,
        ]
        pairs = [(a, b) for a in texts for b in texts]
        rows = ([a for a, _ in pairs], [b for _, b in pairs])
        self.check([load_tokenizer(cased)], oracle, rows, (512, 9, 8))
        self.check([load_tokenizer(cased)], oracle, (texts, None), (512, 9, 8))

    def test_every_pair_of_lengths(self, toy: Tokenizer, tmp_path: Path):
        transformers = pytest.importorskip("transformers")
        oracle = transformers.BertTokenizerFast(
            str(tmp_path / "toy" / "vocab.txt"), do_lower_case=False
        )
        pairs = [(a, b) for a in range(12) for b in range(12)]
        rows = (["the " * a for a, _ in pairs], ["dog " * b for _, b in pairs])
        self.check([toy], oracle, rows, (8, 9, 10, 11))

    @pytest.mark.parametrize("source", ["config", "tokenizer.json", "the config first"])
    def test_truncated_at_the_start(self, toy: Tokenizer, tmp_path: Path, source: str):
        transformers = pytest.importorskip("transformers")
        folder = tmp_path / "toy"
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if source != "config":
            toy.save(folder)
            truncation = {"max_length": 9, "strategy": "LongestFirst", "stride": 0}
            direction = "Left" if source == "tokenizer.json" else "Right"
            truncation["direction"] = direction
            edited_json(folder, folder, lambda content: content.update(truncation=truncation))
        if source != "tokenizer.json":
            config |= {"truncation_side": "left", "padding_side": "left"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text('{"model_type": "bert"}')
        ours = load_tokenizer(folder)
        ours.save(tmp_path / "new")
        again = load_tokenizer(tmp_path / "new")
        assert ours.fingerprint == again.fingerprint != toy.fingerprint
        # Pieces that differ, to tell the two ends apart.
        words = ("the Dog dogs ! é e " * 3).split()
        pairs = [(a, b) for a in range(0, 12, 2) for b in range(12)]
        rows = ([" ".join(words[:a]) for a, _ in pairs], [" ".join(words[b:]) for _, b in pairs])
        for path in (folder, tmp_path / "new"):
            oracle = transformers.AutoTokenizer.from_pretrained(path)
            self.check([ours, again], oracle, rows, (8, 9, 11))
            self.check([ours, again], oracle, (rows[1], None), (8, 9))
        config["truncation_side"] = "right"
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(folder).fingerprint == toy.fingerprint

    @pytest.mark.parametrize("source", ["tokenizer.json", "vocab.txt", "minilm"])
    def test_saved_is_read_back_by_both(
        self, source: str, cased: Path, cased_txt: Path, minilm_folder: Path, tmp_path: Path
    ):
        transformers = pytest.importorskip("transformers")
        folder = {"tokenizer.json": cased, "vocab.txt": cased_txt, "minilm": minilm_folder}[source]
        ours = load_tokenizer(folder)
        ours.save(tmp_path / "new" / "folder")
        again = load_tokenizer(tmp_path / "new" / "folder")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
        rows = (["Déjà vu in Paris", "b"], ["The DOG", "[MASK] " * 200])
        self.check([ours, again], theirs, rows, (12, 600))
        assert again.fingerprint == ours.fingerprint
        assert again.vocab_size == ours.vocab_size == len(theirs)
        left = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
        assert left == {"tokenizer.json", "tokenizer_config.json"}


class TestCase:
    """Oracle: the toy vocabulary, whose ids are known by hand; Dog is 6 and dog is 7."""

    def ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        return tokenizer.encode([text], max_length=20).input_ids[0][1:-1]

    def test_cased_stays_cased(self, cased: Path, cased_txt: Path):
        for folder in (cased, cased_txt):
            tokenizer = load_tokenizer(folder)
            assert not tokenizer.recipe.lowercase
            assert self.ids(tokenizer, "Paris") != self.ids(tokenizer, "paris")
            assert self.ids(tokenizer, "é") != self.ids(tokenizer, "e")

    def test_the_vocabulary_itself_decides_where_nothing_else_does(self, tmp_path: Path):
        cased = load_tokenizer(write_vocabulary(tmp_path / "cased", CASED_TOY))
        assert self.ids(cased, "the Dogs Dog é") == [5, 6, 8, 6, 10]
        uncased = (*SPECIAL, "[unused1]", "[Unused2]", "the", "dog", "ℝ", "e")
        lowered = load_tokenizer(write_vocabulary(tmp_path / "uncased", uncased))
        assert self.ids(lowered, "THE Dog É") == [7, 8, 10]

    @pytest.mark.parametrize("lowercase", [True, False])
    def test_the_argument_wins(self, tmp_path: Path, cased: Path, lowercase: bool):
        folder = write_vocabulary(tmp_path / "toy", CASED_TOY, {"do_lower_case": not lowercase})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = load_tokenizer(folder, lowercase=lowercase)
            real = load_tokenizer(cased, lowercase=lowercase)
        assert self.ids(tokenizer, "Dog é") == ([7, 11] if lowercase else [6, 10])
        assert (self.ids(real, "Paris") == self.ids(real, "paris")) is lowercase

    def test_the_config_wins_over_the_vocabulary(self, tmp_path: Path):
        uncased = (*SPECIAL, "dog", "d", "##og")
        folder = write_vocabulary(tmp_path / "a", uncased, {"do_lower_case": False})
        assert self.ids(load_tokenizer(folder), "Dog dog") == [1, 5]

    def test_lower_casing_a_cased_vocabulary_is_never_silent(self, tmp_path: Path):
        folder = write_vocabulary(tmp_path / "toy", CASED_TOY, {"do_lower_case": True})
        with pytest.warns(UserWarning, match="its vocabulary is cased") as caught:
            tokenizer = load_tokenizer(folder)
        assert self.ids(tokenizer, "Dog é") == [7, 11]
        assert caught[0].message.args[0].startswith(str(folder))

    def test_accents_and_chinese_as_the_config_says(self, tmp_path: Path):
        entries = (*SPECIAL, "東京", "東", "京", "é", "e", "Z")
        config = {"strip_accents": True, "tokenize_chinese_chars": False}
        plain = load_tokenizer(write_vocabulary(tmp_path / "plain", entries))
        assert self.ids(plain, "東京 é") == [6, 7, 8]
        told = load_tokenizer(write_vocabulary(tmp_path / "told", entries, config))
        assert self.ids(told, "東京 é") == [5, 9]

    def test_tokenizer_json_and_config_must_agree(self, cased: Path, tmp_path: Path):
        folder = edited_json(cased, tmp_path / "both", lambda content: None)
        config = folder / "tokenizer_config.json"
        config.write_text('{"do_lower_case": false, "strip_accents": null}')
        load_tokenizer(folder)
        for key in ("strip_accents", "do_lower_case"):
            config.write_text(json.dumps({key: True}))
            with pytest.raises(ConfigError, match=rf"tokenizer\.json.*{key} False.*says True"):
                load_tokenizer(folder)
        assert not load_tokenizer(folder, lowercase=False).recipe.lowercase


class TestFiles:
    """Oracle: the real vocabulary, and the same written or spoiled by hand."""

    def test_both_forms_are_one_tokenizer(self, cased: Path, cased_txt: Path, shared_data: Path):
        from_json, from_txt = load_tokenizer(cased), load_tokenizer(str(cased_txt))
        assert from_json.fingerprint == from_txt.fingerprint
        assert len(from_txt.fingerprint) == 64
        assert from_json.vocab_size == from_txt.vocab_size == 28996
        assert (from_txt.pad_id, from_txt.cls_id, from_txt.sep_id) == (0, 101, 102)
        lowered = load_tokenizer(cased, lowercase=True)
        uncased = load_tokenizer(shared_data / "vocab" / "bert-base-uncased")
        assert len({t.fingerprint for t in (from_json, lowered, uncased)}) == 3

    def test_line_ends_and_byte_order_mark_do_not_matter(self, cased_txt: Path, tmp_path: Path):
        entries = (cased_txt / "vocab.txt").read_bytes()
        (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf" + entries.replace(b"\n", b"\r\n"))
        assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(cased_txt).fingerprint

    def test_separators_are_entries_not_line_ends(self, tmp_path: Path):
        entries = (*SPECIAL, "\u2028", "\x85", "\x0b", "last")
        tokenizer = load_tokenizer(write_vocabulary(tmp_path / "v", entries))
        assert tokenizer.recipe.vocab["last"] == 8

    @pytest.mark.parametrize("missing", SPECIAL[:4])
    def test_missing_special_token(self, tmp_path: Path, missing: str):
        entries = tuple(entry for entry in CASED_TOY if entry != missing)
        folder = write_vocabulary(tmp_path / "v", entries)
        with pytest.raises(ConfigError, match=rf"vocab\.txt.*11 entries lacks \[{missing[1:-1]}"):
            load_tokenizer(folder)

    def test_nothing_to_read(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"neither tokenizer\.json nor vocab\.txt"):
            load_tokenizer(tmp_path)
        with pytest.raises(SpafitError, match="no-such-folder"):
            load_tokenizer(tmp_path / "no-such-folder")

    def test_hub_name_asks_for_tokenizer_files_only(self, cased: Path, monkeypatch):
        asked = []

        def local_folder(name, *, revision, files):
            asked.append((name, revision, tuple(files)))
            return cased

        monkeypatch.setattr("spafit.text.tokenization.local_folder", local_folder)
        assert load_tokenizer("owner/name", revision="v1").vocab_size == 28996
        ((name, revision, files),) = asked
        assert (name, revision) == ("owner/name", "v1")
        assert "vocab.txt" in files
        assert not any("safetensors" in file for file in files)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("tokenizer.json", b""),
            ("tokenizer.json", b"[" * 100_000),
            ("tokenizer.json", b'{"version": "1.0"}'),
            ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1"),
            ("vocab.txt", b"\xff\xfe[PAD]"),
            ("vocab.txt", b""),
            ("tokenizer_config.json", b"[]"),
            ("tokenizer_config.json", b"{"),
            ("tokenizer_config.json", b'{"do_lower_case": "no"}'),
            ("tokenizer_config.json", b'{"truncation_side": "Left"}'),
            ("tokenizer_config.json", b'{"truncation_side": ["left"]}'),
        ],
    )
    def test_spoiled_files_are_refused(self, tmp_path: Path, name: str, content: bytes):
        folder = write_vocabulary(tmp_path / "v", CASED_TOY)
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            load_tokenizer(folder)

    @pytest.mark.parametrize(
        ("says", "edit"),
        [
            ("model is BPE", lambda c: c.update(model={"type": "BPE", "vocab": {}, "merges": []})),
            ("prefix are", lambda c: c["model"].update(continuing_subword_prefix="@@")),
            ("normalizer is Lowercase", lambda c: c.update(normalizer={"type": "Lowercase"})),
            ("normalizer is NoneType", lambda c: c.update(normalizer=None)),
            ("is Whitespace", lambda c: c.update(pre_tokenizer={"type": "Whitespace"})),
            ("encodes a pair", lambda c: c.update(post_processor=None)),
            (
                "encodes a pair",
                lambda c: c["post_processor"]["pair"][3]["Sequence"].update(type_id=0),
            ),
            ("have the same id, 2", lambda c: c["model"]["vocab"].update(Paris=2)),
            ("lacks .PAD.", lambda c: c["model"]["vocab"].pop("[PAD]")),
        ],
    )
    def test_tokenizers_other_than_berts_are_refused(self, cased, tmp_path, says, edit):
        with pytest.raises(ConfigError, match=rf"tokenizer\.json: .*{says}"):
            load_tokenizer(edited_json(cased, tmp_path / "v", edit))

    def test_special_tokens_in_the_vocabulary_alone(self, cased: Path, tmp_path: Path):
        folder = edited_json(cased, tmp_path / "v", lambda c: c.update(added_tokens=[]))
        assert load_tokenizer(folder).fingerprint == load_tokenizer(cased).fingerprint

    def test_further_added_tokens_are_kept(self, cased: Path, tmp_path: Path):
        new = {"id": 28996, "content": "<tag>", "single_word": False, "lstrip": True,
               "rstrip": False, "normalized": False, "special": False}  # fmt: skip
        folder = edited_json(cased, tmp_path / "v", lambda c: c["added_tokens"].append(new))
        tokenizer = load_tokenizer(folder)
        tokenizer.save(tmp_path / "again")
        again = load_tokenizer(tmp_path / "again")
        assert tokenizer.vocab_size == again.vocab_size == 28997
        assert tokenizer.fingerprint == again.fingerprint
        for one in (tokenizer, again):
            assert one.encode(["<tag>"], max_length=8).input_ids == [[101, 28996, 102]]

    def test_save_where_no_folder_can_be(self, toy: Tokenizer, tmp_path: Path):
        (tmp_path / "file").write_text("")
        with pytest.raises(WeightsError, match="cannot be created"):
            toy.save(tmp_path / "file" / "folder")
        with pytest.raises(WeightsError, match=r"a\\x00b' cannot be created: embedded null"):
            toy.save(tmp_path / "a\0b")


class TestEncode:
    """Oracle: the toy vocabulary's ids, by hand: [CLS] 2, [SEP] 3, the 5, Dog 6, dog 7, s 8."""

    def test_frame_and_types(self, toy: Tokenizer):
        found = toy.encode(["the dogs", "", "Dog"], [None, "the", ""], max_length=8)
        assert found.input_ids == [[2, 5, 7, 8, 3], [2, 3, 5, 3], [2, 6, 3, 3]]
        assert found.token_type_ids == [[0, 0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
        assert (len(found), found.truncated, found.lengths) == (3, 0, [5, 4, 4])

    def test_truncated_counts_examples_not_texts(self, toy: Tokenizer):
        six, seven = "the " * 6, "the " * 7
        assert toy.encode([six, seven, seven], max_length=8).truncated == 2
        assert toy.encode([six, "the", ""], [six, "", "dog"], max_length=8).truncated == 1

    def test_more_texts_than_are_handed_over_at_once(self, toy: Tokenizer):
        numbers = range(2500)
        texts = ["dog " * (n % 7) for n in numbers]
        pairs = [None if n % 3 == 0 else "Dog" for n in numbers]
        found = toy.encode(texts, pairs, max_length=30)
        assert found.lengths == [n % 7 + (2 if n % 3 == 0 else 4) for n in numbers]

    def test_no_texts(self, toy: Tokenizer):
        assert len(toy.encode([], max_length=8)) == 0

    def test_very_long_text(self, toy: Tokenizer):
        found = toy.encode(["dog! " * 200_000, "d" * 1_000_000], ["Dog", None], max_length=9)
        assert found.input_ids == [[2, 7, 9, 7, 9, 7, 3, 6, 3], [2, 1, 3]]
        assert found.truncated == 1

    def test_settings_inside_tokenizer_json_do_not_act(self, minilm_folder: Path):
        content = json.loads((minilm_folder / "tokenizer.json").read_text(encoding="utf-8"))
        assert content["padding"]["strategy"] == {"Fixed": 128}
        assert content["truncation"]["max_length"] == 128
        found = load_tokenizer(minilm_folder).encode(["the", "the " * 300], max_length=256)
        assert found.lengths == [3, 256]

    @pytest.mark.parametrize("max_length", [7, 4, 0, -1])
    def test_too_short_a_maximum_is_refused(self, toy: Tokenizer, max_length: int):
        with pytest.raises(ConfigError, match=rf"max_length is {max_length}: .*give 8 or more"):
            toy.encode(["the"], max_length=max_length)

    @pytest.mark.parametrize(
        ("texts_a", "texts_b", "says"),
        [
            (["a", "b\ud83d!"], None, r"row 1, first text: character 1 is a lone surrogate"),
            (["a"] * 1030, ["b"] * 1029 + ["\udc00"], r"row 1029, second text: character 0"),
            (["a", None], None, r"row 1, first text: expected a string, found None of type None"),
            (["a"], [b"b"], r"row 0, second text: expected a string, found b'b' of type bytes"),
            (["a"], [0], r"row 0, second text: .* of type int"),
            (["a", "b"], ["c"], r"2 first texts but 1 second"),
            ("one text", None, r"give \[text\]"),
        ],
    )
    def test_what_is_no_text_is_refused_by_row(self, toy: Tokenizer, texts_a, texts_b, says: str):
        with pytest.raises(DataError, match=says):
            toy.encode(texts_a, texts_b, max_length=8)


class TestBatch:
    """Oracle: three short examples padded by hand, with a pad id that is not 0."""

    ENCODINGS = Encodings(
        input_ids=[[2, 6, 3], [2, 5, 3, 7, 3], [2, 3]],
        token_type_ids=[[0, 0, 0], [0, 0, 0, 1, 1], [0, 0]],
        pad_id=9,
    )

    def test_padded_to_the_longest_of_the_rows(self):
        batch = self.ENCODINGS.batch([2, 1])
        assert batch.input_ids.tolist() == [[2, 3, 9, 9, 9], [2, 5, 3, 7, 3]]
        assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
        assert batch.token_type_ids.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
        assert {tensor.dtype for tensor in batch} == {torch.int64}
        assert self.ENCODINGS.batch(range(0, 3, 2)).input_ids.shape == (2, 3)
        assert self.ENCODINGS.batch(torch.tensor([0])).input_ids.tolist() == [[2, 6, 3]]

    @pytest.mark.parametrize("rows", [[], [3], [-1], [0, 1, 7]])
    def test_rows_that_are_not_there(self, rows: list[int]):
        with pytest.raises(DataError, match="row numbers from 0 to 2"):
            self.ENCODINGS.batch(rows)

    def test_taken_by_name_or_by_place(self):
        batch = self.ENCODINGS.batch([0])
        by_name = {**batch}
        assert list(by_name) == ["input_ids", "attention_mask", "token_type_ids"]
        assert all(by_name[name] is getattr(batch, name) for name in by_name)
        assert list(by_name.values()) == [*batch] == [batch[0], batch[1], batch[-1]]
        assert batch[:2] == (batch.input_ids, batch.attention_mask)
        with pytest.raises(TypeError):
            batch["labels"]


class TestCall:
    """Oracle: encode and batch; transformers for the text of ids."""

    TEXTS = ("The dog's 3 cats, don't sleep .", "a [MASK] child!", "")

    def test_what_a_model_takes(self, tiny: Path):
        tokenizer, model = load_tokenizer(tiny), load_pretrained(tiny)
        for texts, pairs, most in (
            (["a", "the dogs sleep"], None, None),
            (["a", "the dogs sleep"], ["cat", None], None),
            (["a", "the dogs " * 9], ["the cat " * 9, "b"], 11),
        ):
            batch = tokenizer(texts, pairs, most)
            expected = tokenizer.encode(texts, pairs, max_length=most or 99).batch([0, 1])
            assert all(map(torch.equal, batch, expected))
            assert torch.equal(model(**batch), model(*expected))
        assert tokenizer(["the " * 600]).input_ids.shape == (1, 602)  # nothing is truncated
        with pytest.raises(ConfigError, match="602 tokens do not fit the model's 53 positions"):
            model(**tokenizer(["the " * 600]))

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (([],), "no texts"),
            (("one text",), r"give \[text\]"),
            ((["a"], ["b", "c"]), "1 first texts but 2 second"),
            ((["a", 3],), "row 1, first text"),
        ],
    )
    def test_what_it_refuses(self, toy: Tokenizer, arguments: tuple, says: str):
        with pytest.raises(DataError, match=says):
            toy(*arguments)

    @pytest.mark.parametrize("skip", [False, True])
    def test_decode_is_transformers(self, tiny: Path, skip: bool):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(tiny)
        ours = load_tokenizer(tiny)
        ids = ours(self.TEXTS, ["a cat", None, "b"]).input_ids
        expected = [theirs.decode(row, skip_special_tokens=skip) for row in ids]
        assert ours.batch_decode(ids, skip_special_tokens=skip) == expected
        assert ours.batch_decode(ids.tolist(), skip_special_tokens=skip) == expected
        assert ours.decode(ids[1], skip_special_tokens=skip) == expected[1]
        assert ours.decode(ids[1].numpy(), skip_special_tokens=skip) == expected[1]
        split = load_tokenizer(tiny, split_special_tokens=True)
        assert split.batch_decode(ids, skip_special_tokens=skip) == expected

    def test_decode_by_hand(self, toy: Tokenizer):
        assert toy.decode([2, 5, 7, 8, 3, 0]) == "[CLS] the dogs [SEP] [PAD]"
        assert toy.decode([2, 5, 7, 8, 3, 0], skip_special_tokens=True) == "the dogs"
        assert toy.decode([]) == ""

    @pytest.mark.parametrize(
        ("ids", "says"),
        [
            ([5, 12], "12 is no token id: they go from 0 to 11"),
            ([-1], "-1 is no token id"),
            ([[5], [6]], r"found \(2, 1\) .*batch_decode"),
            ([0.5], "float32"),
            ([True], "bool"),
            (5, r"found \(\)"),
            ("the", "these are no token ids"),
            ([[5], [6, 7]], "these are no token ids"),
            ([2**70], "these are no token ids"),
        ],
    )
    def test_what_are_no_ids(self, toy: Tokenizer, ids: object, says: str):
        with pytest.raises(DataError, match=says):
            toy.decode(ids)

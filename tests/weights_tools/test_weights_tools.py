"""The command ``python -m weights_tools``, subcommand by subcommand."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spafit.config import BertConfig
from spafit.errors import WeightsError
from spafit.text.tokenization import load_tokenizer
from spafit.weights.pretrained import load_pretrained
from spafit.weights.safefile import SafeFile
from weights_tools import compare_hf, make_tiny
from weights_tools.__main__ import main
from weights_tools.compare_hf import Row

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "tiny")


def make_config(folder: Path) -> Path:
    """Write a config.json into a folder."""
    (folder / "config.json").write_text(json.dumps(BertConfig().to_json_dict()))
    return folder


class Ran:
    """What one run of the command gave."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        try:
            self.code: object = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            self.code = stopped.code
        self.out, self.err = capsys.readouterr()

    def assert_one_line_error(self, *parts: str) -> None:
        """Expect exit code 2 and an error in one line that holds the parts."""
        assert self.code == 2
        line = self.err.strip().split("\n")[-1]
        assert line.startswith("error: ")
        for part in parts:
            assert part in line
        assert "Traceback" not in self.err


class TestMakeTiny:
    """The oracles: transformers, which must load the folder, and the sizes that were asked for."""

    def test_sizes_are_pairwise_unequal(self, tiny: Path) -> None:
        config = BertConfig.from_json(tiny)
        sizes = [
            *(config.vocab_size, config.hidden_size, config.num_hidden_layers),
            *(config.num_attention_heads, config.head_size, config.intermediate_size),
            *(config.max_position_embeddings, config.type_vocab_size),
        ]
        assert len(set(sizes)) == len(sizes)

    @pytest.mark.parametrize("style", ["new", "old", "bare"])
    def test_transformers_loads_it(self, tmp_path: Path, style: str) -> None:
        transformers = pytest.importorskip("transformers")
        folder = make_tiny(tmp_path / style, style=style)
        model, loading = transformers.BertModel.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
        assert not loading["missing_keys"]
        expected = load_pretrained(folder).bert.state_dict()
        found = model.state_dict()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name

    def test_the_tokenizer_is_transformers_too(self, tiny: Path) -> None:
        transformers = pytest.importorskip("transformers")
        texts = ["The cat SLEEPS, doesn't it?", "", "Zürich [MASK] 42% of cats"]
        theirs = transformers.AutoTokenizer.from_pretrained(tiny)(texts)["input_ids"]
        assert load_tokenizer(tiny).encode(texts, max_length=53).input_ids == theirs
        vocabulary = (tiny / "vocab.txt").read_text(encoding="utf-8").split("\n")
        assert vocabulary[:5] == SPECIAL
        assert load_tokenizer(tiny).vocab_size == BertConfig.from_json(tiny).vocab_size

    def test_the_seed_decides(self, tmp_path: Path) -> None:
        contents = [
            (make_tiny(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
            for name, seed in (("a", 3), ("b", 3), ("c", 4))
        ]
        assert contents[0] == contents[1] != contents[2]

    def test_every_tensor_is_far_from_its_start(self, tiny: Path) -> None:
        for name, tensor in load_file(tiny / "model.safetensors").items():
            start = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            assert 0.1 < float((tensor - start).square().mean().sqrt()) < 0.3, name

    def test_options(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = "--style old --layers 2 --hidden 30 --heads 5 --intermediate 41 --positions 19"
        ran = Ran(capsys, "make-tiny", tmp_path / "x", *options.split(), "--labels", 3)
        assert ran.code == 0
        assert "model.safetensors" in ran.out
        config = BertConfig.from_json(tmp_path / "x")
        assert (config.num_hidden_layers, config.hidden_size, config.head_size) == (2, 30, 6)
        assert (config.intermediate_size, config.max_position_embeddings) == (41, 19)
        names = load_file(tmp_path / "x" / "model.safetensors")
        assert names["classifier.weight"].shape == (3, 30)
        assert "bert.encoder.layer.1.output.LayerNorm.gamma" in names

    def test_refusals(self, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Ran(capsys, "make-tiny", tiny).assert_one_line_error("is not empty")
        fresh = tiny.parent / "fresh"
        Ran(capsys, "make-tiny", fresh, "--heads", 7).assert_one_line_error("7", "24")
        assert not fresh.exists()


class TestInspect:
    """The oracle is what make-tiny wrote, in the old style: gamma and beta, and cls.*."""

    @pytest.fixture
    def old(self, tmp_path: Path) -> Path:
        return make_tiny(tmp_path / "old", style="old")

    def test_table(self, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
        ran = Ran(capsys, "inspect", old)
        assert ran.code == 0
        lines = [line.split() for line in ran.out.split("\n")]
        norm = "bert.encoder.layer.2.output.LayerNorm"
        assert [f"{norm}.gamma", "[24]", "F32", "96", "->", f"{norm}.weight"] in lines
        words = ["bert.embeddings.word_embeddings.weight", "[176,", "24]", "F32", "16,896"]
        assert words in lines
        head = next(line for line in lines if line[:1] == ["cls.predictions.bias"])
        assert head[1:6] == ["[176]", "F32", "704", "left", "out:"]
        tensors = load_file(old / "model.safetensors")
        numbers = sum(tensor.numel() for tensor in tensors.values())
        assert ["in", "all", str(len(tensors)), f"{numbers:,}", f"{4 * numbers:,}"] in lines
        assert ["renamed", "18", f"{18 * 24}", f"{4 * 18 * 24:,}"] in lines
        assert len({line.index("F32") for line in ran.out.split("\n") if "  F32  " in line}) <= 2

    def test_a_file_alone(self, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
        whole = Ran(capsys, "inspect", old)
        assert Ran(capsys, "inspect", old / "model.safetensors").out == whole.out

    def test_what_is_wrong_is_said(self, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
        os.truncate(old / "model.safetensors", 20_000)
        Ran(capsys, "inspect", old).assert_one_line_error("is truncated")
        Ran(capsys, "inspect", old / "none").assert_one_line_error("neither an existing folder")


class TestConvert:
    """The oracle is the dictionary that torch.save was given."""

    TENSORS = {  # noqa: RUF012 - never changed
        "bert.a": torch.randn(3, 5),
        "bert.half": torch.randn(7).half(),
        "bert.ids": torch.arange(4)[None],
    }

    def write(self, folder: Path, content: object, zipped: bool = True) -> Path:
        path = folder / "pytorch_model.bin"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return path

    @pytest.mark.parametrize("zipped", [True, False])
    def test_values(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool) -> None:
        tied = torch.randn(4, 6)
        tensors = {**self.TENSORS, "tied": tied, "twin": tied, "turned": tied.T}
        self.write(tmp_path, tensors, zipped)
        ran = Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
        assert ran.code == 0
        assert "warning:" in ran.err
        assert "6 tensors" in ran.out
        found = load_file(tmp_path / "model.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor)
            assert found[name].dtype == tensor.dtype

    def test_a_model_loads_afterwards(self, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
        expected = load_pretrained(tiny).state_dict()
        self.write(tiny, load_file(tiny / "model.safetensors"))
        (tiny / "model.safetensors").unlink()
        assert Ran(capsys, "convert", tiny, "--i-trust-this-file").code == 0
        found = load_pretrained(tiny).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    @pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "model._orig_mod."])
    def test_the_prefix_of_a_wrapper(
        self, tiny: Path, capsys: pytest.CaptureFixture[str], prefix: str
    ) -> None:
        """It is taken off here, and named where a file with it is loaded."""
        expected = load_file(tiny / "model.safetensors")
        wrapped = {f"{prefix}{name}": tensor for name, tensor in expected.items()}
        save_file(wrapped, tiny / "model.safetensors")
        with pytest.raises(WeightsError, match=f"all names begin with {prefix}, so save the"):
            load_pretrained(tiny)
        self.write(tiny, wrapped)
        ran = Ran(capsys, "convert", tiny, "--i-trust-this-file", "--overwrite")
        assert f"took {prefix} off all names" in ran.err
        assert load_file(tiny / "model.safetensors").keys() == expected.keys()
        self.write(tiny, {"module.a": torch.ones(2), "module.b": torch.ones(3)})  # another model's
        assert Ran(capsys, "convert", tiny, "--i-trust-this-file", "--overwrite").code == 0
        assert load_file(tiny / "model.safetensors").keys() == {"module.a", "module.b"}

    def test_what_no_safetensors_file_can_hold(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, tensor in (("__metadata__", torch.ones(1)), ("m", torch.ones(1, device="meta"))):
            self.write(tmp_path, {**self.TENSORS, name: tensor})
            ran = Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
            ran.assert_one_line_error(f"holds {name}, ", "save the state_dict of a model without")
        self.write(tmp_path, self.TENSORS)
        monkeypatch.setattr(SafeFile, "read", lambda *_: torch.zeros(1))
        ran = Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
        ran.assert_one_line_error("did not come back as written")
        assert not (tmp_path / "model.safetensors").exists()

    def test_it_asks_for_trust(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.write(tmp_path, self.TENSORS)
        ran = Ran(capsys, "convert", tmp_path)
        ran.assert_one_line_error("was not read", "--i-trust-this-file")
        assert "A pickle is a program" in ran.err
        assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]

    def test_a_hostile_pickle_does_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        mark = tmp_path / "was here"

        class Hostile:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(mark),)

        for zipped in (True, False):
            self.write(tmp_path, {"a": Hostile()}, zipped)
            ran = Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
            ran.assert_one_line_error("cannot be read as a file of weights")
            assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (torch.zeros(3), "holds a Tensor"),
            ({}, "holds a dict, expected names and tensors"),
            ({"model": {"a": torch.zeros(3)}}, "holds 'model': dict"),
            ({"a": torch.zeros(3), "epoch": 4}, "holds 'epoch': int"),
            ({"a": torch.tensor([1.0, float("nan")])}, "a holds NaN"),
            ({"a\x1b[1m": torch.tensor([1.0, float("inf")])}, r"a\x1b[1m holds NaN"),
            ({"a": torch.ones(2, dtype=torch.complex64)}, "holds a as torch.complex64"),
            ({"a": torch.ones(2, 2).to_sparse()}, "torch.sparse_coo, which a safetensors file"),
        ],
    )
    def test_other_contents(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, message: str
    ) -> None:
        self.write(tmp_path, content)
        Ran(capsys, "convert", tmp_path, "--i-trust-this-file").assert_one_line_error(message)
        assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_whole_model_is_told_in_our_words(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool
    ) -> None:
        """Torch's own say how to load it all the same, with terminal escapes."""
        self.write(tmp_path, torch.nn.Linear(2, 3), zipped)
        ran = Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
        ran.assert_one_line_error("torch.nn.modules.linear.Linear", "save model.state_dict() alone")
        with_traceback = Ran(capsys, "--debug", "convert", tmp_path, "--i-trust-this-file").err
        for said in (ran.err, with_traceback):
            assert "weights_only" not in said
            assert "\x1b" not in said

    @pytest.mark.parametrize(
        ("content", "remedy"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
            (b"<!DOCTYPE html>", "it is a web page"),
            (b"\x80\x04N.", "it is damaged, or not the names and tensors"),
            (b"\x89HDF\r\n", "it is damaged, or not the names and tensors"),
        ],
    )
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
    def test_what_is_no_pickle_of_torch(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        name: str,
        content: bytes,
        remedy: str,
    ) -> None:
        (tmp_path / name).write_bytes(content)
        ran = Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
        if name.endswith(".json") and remedy.startswith("it is damaged"):
            remedy = "cannot be used"
        ran.assert_one_line_error(name, remedy)
        assert "weights_only" not in ran.err
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def write_parts(self, folder: Path, **places: str) -> Path:
        """Write two files and their index, or one with other places."""
        names = sorted(self.TENSORS)
        numbers = dict.fromkeys(names, 2) | {names[0]: 1}
        parts = {name: f"pytorch_model-0000{numbers[name]}-of-00002.bin" for name in names}
        for part in set(parts.values()):
            held = {name: self.TENSORS[name] for name in names if parts[name] == part}
            torch.save(held, folder / part)
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": {**parts, **places}}))
        return index

    @pytest.mark.parametrize("named", ["folder", "index"])
    def test_several_files(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: str
    ) -> None:
        index = self.write_parts(tmp_path)
        source = index if named == "index" else tmp_path
        assert Ran(capsys, "convert", source, "--i-trust-this-file").code == 0
        found = load_file(tmp_path / "model.safetensors")
        assert found.keys() == self.TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in self.TENSORS.items())

    @pytest.mark.parametrize(
        ("places", "message"),
        [
            ({"bert.a": "../x.bin"}, "'../x.bin', which is not the plain name of a .bin file"),
            ({"bert.a": "/etc/passwd"}, "which is not the plain name"),
            ({"bert.a": "x.safetensors"}, "not the plain name of a .bin file"),
            ({"more": "x.bin"}, "x.bin does not exist"),
            ({"more": "pytorch_model-00001-of-00002.bin"}, "names more, which its files lack"),
            ({"bert.ids": "pytorch_model-00001-of-00002.bin"}, "holds bert.ids, which pytorch_m"),
            ({"bert.a": "pytorch_model-00002-of-00002.bin"}, "names bert.a, which its files lack"),
        ],
    )
    def test_several_files_that_do_not_agree(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        places: dict[str, str],
        message: str,
    ) -> None:
        self.write_parts(tmp_path, **places)
        Ran(capsys, "convert", tmp_path, "--i-trust-this-file").assert_one_line_error(message)
        assert not (tmp_path / "model.safetensors").exists()

    def test_one_file_and_several(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.write_parts(tmp_path)
        with pytest.raises(WeightsError, match=r"index\.json.*python -m weights_tools convert"):
            load_pretrained(make_config(tmp_path))
        single = self.write(tmp_path, self.TENSORS)
        Ran(capsys, "convert", tmp_path, "--i-trust-this-file").assert_one_line_error("has both")
        assert Ran(capsys, "convert", single, "--i-trust-this-file").code == 0

    def test_parts_without_an_index_and_a_part_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        index = self.write_parts(tmp_path)
        part = tmp_path / "pytorch_model-00001-of-00002.bin"
        ran = Ran(capsys, "convert", part, "--i-trust-this-file")
        ran.assert_one_line_error("is one of 2 parts; give the folder, or pytorch_model.bin.index")
        index.unlink()
        ran = Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
        ran.assert_one_line_error("00001-of-00002.bin", "but no pytorch_model.bin.index.json")
        assert not (tmp_path / "model.safetensors").exists()
        whole = part.rename(tmp_path / "x-00001-of-00001.bin")
        assert Ran(capsys, "convert", whole, "--i-trust-this-file").code == 0

    def test_wherever_it_is_truncated(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """At some places the system calls it an invalid argument."""
        file = self.write(tmp_path, {"a": torch.zeros(30_000), "b": torch.zeros(30_000)})
        for length in range(file.stat().st_size - 1, 0, -17_001):
            os.truncate(file, length)
            ran = Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
            ran.assert_one_line_error("it is damaged, or not", "fetch it again")

    @pytest.mark.parametrize("length", [0, 1, 100, 700])
    def test_a_truncated_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], length: int
    ) -> None:
        for zipped in (True, False):
            os.truncate(self.write(tmp_path, self.TENSORS, zipped), length)
            ran = Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
            ran.assert_one_line_error("cannot be read as a file of weights")

    def test_an_existing_file_is_kept(self, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = (tiny / "model.safetensors").read_bytes()
        self.write(tiny, self.TENSORS)
        arguments = ("convert", tiny, "--i-trust-this-file")
        Ran(capsys, *arguments).assert_one_line_error("exists", "--overwrite")
        assert (tiny / "model.safetensors").read_bytes() == before
        assert Ran(capsys, *arguments, "--overwrite").code == 0
        assert load_file(tiny / "model.safetensors").keys() == self.TENSORS.keys()

    def test_an_old_torch_is_refused(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.write(tmp_path, self.TENSORS)
        monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
        ran = Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
        ran.assert_one_line_error("CVE-2026-24747", "install torch 2.10")

    def test_the_mode_is_the_users(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.write(tmp_path, self.TENSORS)
        before = os.umask(0o027)
        try:
            Ran(capsys, "convert", tmp_path, "--i-trust-this-file")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640


class TestCompareHf:
    """The oracle is known: the two models are the same until one of them is changed on purpose."""

    def verdicts(self, out: str) -> dict[str, str]:
        rows = [line.rsplit(maxsplit=3) for line in out.strip().split("\n")[1:]]
        return {name: verdict for name, _, _, verdict in rows}

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_the_same(self, tiny: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
        pytest.importorskip("transformers")
        ran = Ran(capsys, "compare-hf", tiny, "--dtype", dtype)
        assert ran.code == 0
        names = ["embeddings", *(f"layer {number}" for number in range(4)), "pooled"]
        assert self.verdicts(ran.out) == dict.fromkeys(names, "OK")

    def test_a_changed_layer(
        self, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All is OK up to the layer before the changed one."""
        pytest.importorskip("transformers")

        def changed(folder: Path, *, dtype: torch.dtype) -> object:
            model = load_pretrained(folder, dtype=dtype)
            with torch.no_grad():
                model.bert.encoder.layer[2].output.dense.bias[5] += 0.01
            return model

        monkeypatch.setattr(compare_hf, "load_pretrained", changed)
        monkeypatch.setattr(compare_hf, "load_report", lambda model: NoneDrawn)
        ran = Ran(capsys, "compare-hf", tiny, "--text", "a cat", "--text", "the dog sleeps")
        assert ran.code == 1
        assert list(self.verdicts(ran.out).values()) == ["OK"] * 3 + ["DIFF"] * 3
        loose = Ran(capsys, "compare-hf", tiny, "--tolerance", "1")
        assert loose.code == 0

    def test_no_pooler(self, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Both would be drawn at random: nothing to compare."""
        pytest.importorskip("transformers")
        tensors = load_file(tiny / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
        save_file(kept, tiny / "model.safetensors", metadata={"format": "pt"})
        ran = Ran(capsys, "compare-hf", tiny)
        assert ran.code == 0
        assert "pooled" not in self.verdicts(ran.out)

    def test_minilm(self, minilm_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Real weights, float32, to 1e-5."""
        pytest.importorskip("transformers")
        ran = Ran(capsys, "compare-hf", minilm_folder)
        assert ran.code == 0
        assert len(self.verdicts(ran.out)) == 8

    def test_without_transformers(
        self, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        Ran(capsys, "compare-hf", tiny).assert_one_line_error("pip install '.[test]'")

    @pytest.mark.parametrize(
        ("difference", "largest", "ok"),
        [
            (1e-5, 0.1, True),
            (1.1e-5, 0.1, False),
            (1e-4, 10.0, True),
            (1.1e-4, 10.0, False),
            (float("nan"), 1.0, False),
            (float("nan"), float("nan"), False),
            (1.0, float("nan"), False),
        ],
    )
    def test_the_verdict(self, difference: float, largest: float, ok: bool) -> None:
        assert Row("x", difference, largest, tolerance=1e-5).ok is ok


class NoneDrawn:
    """The report of a model that was loaded in full."""

    newly_drawn = ()


class TestCommand:
    @pytest.mark.parametrize(
        "verb", [[], ["inspect"], ["make-tiny"], ["convert"], ["compare-hf"], ["download"]]
    )
    def test_help_shows_examples(self, verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        ran = Ran(capsys, *verb, "--help")
        assert ran.code == 0
        assert "examples:\n  python -m weights_tools" in ran.out

    def test_no_verb(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert Ran(capsys).code == 2
        assert Ran(capsys, "frobnicate").code == 2

    def test_debug_shows_the_traceback(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Ran(capsys, "inspect", tmp_path).assert_one_line_error("model.safetensors")
        debug = Ran(capsys, "--debug", "inspect", tmp_path)
        assert debug.code == 2
        assert "Traceback" in debug.err

    def test_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "weights_tools", "inspect", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1

    def test_download_of_a_folder(self, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "(a local folder)" in Ran(capsys, "download", tiny).out

    def test_the_config_that_is_written_names_its_model(self, tiny: Path) -> None:
        assert json.loads((tiny / "config.json").read_text())["model_type"] == "bert"

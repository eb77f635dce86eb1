"""Hostile adapters and configurations, and models that do not fit them.

The table of all cases is in test_hostile_weights.py.
"""

from __future__ import annotations

import copy
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.declared_files import A, C, D, F, L, P, T, V
from support.file_machine import CONFIG, PLAN
from support.hostile_cases import bounded, refusal, write_model
from support.hostile_headers import Draft, Pairs, Raw, entry, get, put

from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import ConfigError, PlanError, WeightsError
from spafit.plans import Plan
from spafit.strata import adapt, summarise
from spafit.weights.adapter_files import load_adapter, save_adapter
from spafit.weights.pretrained import load_pretrained

Entries = dict[str, Any]
QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def base(folder: Path) -> BertForSequenceClassification:
    return load_pretrained(folder, num_labels=C, mapped=False)


@pytest.fixture
def adapter(base: BertForSequenceClassification, tmp_path: Path) -> Path:
    """Write a sound adapter of the base."""
    model = copy.deepcopy(base)
    adapt(model, PLAN)
    save_adapter(model, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.fixture
def refuse(base: BertForSequenceClassification, adapter: Path) -> Iterator[Callable[..., str]]:
    """Refuse the adapter as it then is; the model must be as before, in everything."""
    before = copy.deepcopy(base)

    def check(match: str) -> str:
        with bounded(10, 400):
            message = refusal(lambda: load_adapter(base, adapter), match)
        assert str(adapter) in message
        return message

    yield check
    assert base.adaptation is None
    assert str(base) == str(before)
    for (name, found), (_, expected) in zip(
        base.named_parameters(), before.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), name
        assert found.requires_grad


def retell(adapter: Path, key: str, value: Any) -> None:
    """Change one text of an adapter's metadata."""
    draft = Draft.of(adapter.read_bytes())
    put(get(draft.header, "__metadata__"), key, value)
    adapter.write_bytes(draft.raw())


def replan(adapter: Path, change: Callable[[Entries], object]) -> None:
    """Change an adapter's plan."""
    draft = Draft.of(adapter.read_bytes())
    plan = json.loads(get(get(draft.header, "__metadata__"), "plan"))
    change(plan)
    retell(adapter, "plan", json.dumps(plan))


class TestPlans:
    """A plan that does not fit, or asks for the impossible, is refused before anything is made."""

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda plan: plan.update(num_layers=L + 1), "the strata end at layer 1"),
            (lambda plan: plan.update(num_layers=10**7), "num_layers must be .* from 1 to 1024"),
            (lambda plan: plan.update(num_layers=int("9" * 4000)), "num_layers must be"),
            (lambda plan: plan["strata"][1]["layers"].__setitem__(1, 10**30), "strata end at"),
            (lambda plan: plan["strata"][1]["train"].update(qery="lora"), "matches no module"),
            (lambda plan: plan["strata"][1]["train"].update(__class__="lora"), "matches no module"),
            (lambda plan: plan["strata"][1]["train"].update(key="prompt"), "is no technique"),
            (lambda plan: plan["strata"][1]["train"].update(key="x\n" * 10**5), "is no technique"),
            (lambda plan: plan.update(pooler="lora"), 'pooler must be "frozen" or "full"'),
            (lambda plan: plan.update(name="a\nb" * 10**5, num_layers=3), "the strata end at"),
            (lambda plan: plan.update({f"{i}": i for i in range(10_000)}), "a plan has no setting"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_that_is_impossible(
        self,
        adapter: Path,
        refuse: Callable[..., str],
        change: Callable[[Entries], object],
        match: str,
    ) -> None:
        replan(adapter, change)
        refuse(f"the plan in .*{match}")

    @pytest.mark.parametrize("rank", [0, -1, 65_537, 10**9, 10**30, 2.5, True, None, "8"])
    def test_of_a_rank_that_is_none(
        self, adapter: Path, refuse: Callable[..., str], rank: object
    ) -> None:
        """Of 10**9, nothing is ever drawn."""
        lora = [{"lora": {"r": rank, "alpha": 1}}, "bias-delta"]
        replan(adapter, lambda plan: plan["strata"][1]["train"].update(
            {"layer.attention.self.query": lora}))  # fmt: skip
        refuse("LoRA's rank r must be a whole number")

    def test_of_the_largest_rank(self, adapter: Path, refuse: Callable[..., str]) -> None:
        """Its shapes are compared without memory for them."""
        modules = ("query", "key", "value", "attention.output.dense", "intermediate.dense")
        large = {module: {"lora": {"r": 65_536, "alpha": 1}} for module in modules}
        replan(adapter, lambda plan: plan["strata"][1].update(train=large))
        message = refuse("does not hold what its plan three kinds trains")
        assert "and" in message and "more" in message

    def test_of_a_million_strata(
        self,
        adapter: Path,
        refuse: Callable[..., str],
        sized: Callable[[int, int], int],
        promise: Callable[[str, int, str], None],
    ) -> None:
        """Refused by their number, before any is made; 200,000 in the quick set."""
        each = sized(20_000, 100_000)
        strata = ",".join(f'{{"layers":[{i},{i}]}}' for i in range(each))
        text = f'{{"format":"spafit-plan-1","num_layers":2,"strata":[{strata}]}}'
        retell(adapter, "plan", text)
        refuse(f'"strata" are {each}, for 2 layers')
        million = (
            f'{{"format":"spafit-plan-1","num_layers":1000,"strata":[{",".join([strata] * 10)}]}}'
        )
        match = f'"strata" are {10 * each}, for 1000'
        with bounded(60, 1500), pytest.raises(PlanError, match=match):
            Plan.from_json(million)
        retell(adapter, "plan", million)
        refuse(f"says that its header takes [0-9]+ bytes, more than|{match}")
        promise("strata in one plan", 10 * each, "refused by their number")

    @pytest.mark.parametrize("nested", ["[" * 900 + "]" * 900, "[" * 10**6, '{"a":' * 10**6])
    def test_that_is_deep(self, adapter: Path, refuse: Callable[..., str], nested: str) -> None:
        for key in ("plan", "task", "labels"):
            before = adapter.read_bytes()
            retell(adapter, key, nested)
            refuse("the (header of|plan in) ")
            adapter.write_bytes(before)


class TestTensors:
    """Tensors that the plan does not train, or in another shape, or too large, are not loaded."""

    @pytest.mark.parametrize(
        "name",
        ["bert.embeddings.word_embeddings.weight", "__class__", "adaptation", "classifier", "",
         "classifier.weight.data", f"{QUERY}.lora_A ", f"{QUERY}.weight", "../x", "training",
         "bert.encoder.layer.01.attention.self.query.lora_A", "classifier.weight\n"],
    )  # fmt: skip
    @pytest.mark.parametrize("instead", [None, f"{QUERY}.lora_A"])
    def test_of_other_names(
        self, adapter: Path, refuse: Callable[..., str], name: str, instead: str | None
    ) -> None:
        """Added, or in the place of one that the plan trains."""
        draft = Draft.of(adapter.read_bytes())
        if instead:
            next(pair for pair in draft.header if pair[0] == instead)[0] = name
        else:
            draft.header.append([name, entry("F32", [0], [0, 0])])
        adapter.write_bytes(draft.raw())
        message = refuse("does not hold what its plan three kinds trains")
        assert repr(name)[1:-1].replace("'", "") + " is unexpected" in message

    @pytest.mark.parametrize("rows", [C + 1, C - 1, 2**40, 2**62, 10**30])
    def test_whose_shapes_promise_more_than_the_file(
        self, adapter: Path, refuse: Callable[..., str], rows: int
    ) -> None:
        for name in ("classifier.weight", f"{QUERY}.lora_B"):
            before = adapter.read_bytes()
            draft = Draft.of(before)
            get(get(draft.header, name), "shape")[0] = rows
            adapter.write_bytes(draft.raw())
            refuse(f"{name} (of type .* its data_offsets give|has an impossible shape)")
            adapter.write_bytes(before)

    @pytest.mark.parametrize("name", [
        f"{QUERY}.lora_A", f"{QUERY}.lora_B", f"{QUERY}.bias_delta", "classifier.weight",
        "classifier.bias", "bert.encoder.layer.0.output.LayerNorm.bias",
        "bert.pooler.dense.weight", "bert.encoder.layer.1.attention.self.value.weight",
    ])  # fmt: skip
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("value", [math.nan, -math.inf])
    def test_that_hold_what_is_no_number(
        self,
        adapter: Path,
        refuse: Callable[..., str],
        name: str,
        dtype: torch.dtype,
        value: float,
    ) -> None:
        metadata = dict(get(Draft.of(adapter.read_bytes()).header, "__metadata__"))
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(adapter).items()}
        tensors[name].view(-1)[-1] = value
        save_file(tensors, adapter, metadata)
        refuse(f"{name} holds NaN or infinite values: 1 of")

    def test_that_overflow_in_the_model(self, adapter: Path, refuse: Callable[..., str]) -> None:
        """1e300 is a number in float64 and infinite in the model's float32."""
        metadata = dict(get(Draft.of(adapter.read_bytes()).header, "__metadata__"))
        tensors = {key: tensor.double() for key, tensor in load_file(adapter).items()}
        tensors["classifier.bias"][1] = 1e300
        save_file(tensors, adapter, metadata)
        refuse(r"classifier\.bias holds NaN or infinite values: 1 of 4 once converted to")

    def test_in_another_float_are_converted(
        self, base: BertForSequenceClassification, adapter: Path
    ) -> None:
        metadata = dict(get(Draft.of(adapter.read_bytes()).header, "__metadata__"))
        tensors = {key: tensor.double() / 3 for key, tensor in load_file(adapter).items()}
        save_file(tensors, adapter, metadata)
        load_adapter(base, adapter)
        for name, tensor in tensors.items():
            own = name.replace("bias_delta", "bias_delta.delta")  # as the model has it
            assert torch.equal(base.get_parameter(own), tensor.float())


class TestMetadata:
    """Metadata that are missing, huge, or no texts are refused."""

    def test_that_are_missing(self, adapter: Path, refuse: Callable[..., str]) -> None:
        draft = Draft.of(adapter.read_bytes())
        draft.header = Pairs(pair for pair in draft.header if pair[0] != "__metadata__")
        adapter.write_bytes(draft.raw())
        refuse("is not an adapter file of spafit")

    @pytest.mark.parametrize("value", [7, None, ["a"], Pairs([["plan", 1]]), "text", Raw("NaN")])
    def test_that_are_no_texts(self, adapter: Path, refuse: Callable[..., str], value: Any) -> None:
        draft = Draft.of(adapter.read_bytes())
        put(draft.header, "__metadata__", value)
        adapter.write_bytes(draft.raw())
        refuse("does not map strings to strings")

    @pytest.mark.parametrize(
        "key", ["spafit_adapter", "base_fingerprint", "task", "labels", "plan"]
    )
    @pytest.mark.parametrize("value", ["x" * 10**7, "\n" * 10**6, '"' + "\\n" * 10**6, "\x1b[2J"])
    def test_that_are_huge(
        self, adapter: Path, refuse: Callable[..., str], key: str, value: str
    ) -> None:
        retell(adapter, key, value)
        refuse(".")

    @pytest.mark.parametrize("name", ["a\tb", "a\nb", "\x1b[2J", "\r", "\0", "\ud800", "\u2028"])
    def test_of_names_that_break_a_table(
        self, adapter: Path, refuse: Callable[..., str], name: str
    ) -> None:
        """Labels and tasks are written into files of predictions."""
        before = adapter.read_bytes()
        for key, value in (("task", name), ("labels", ["a", "b", name, "c"])):
            retell(adapter, key, json.dumps(value))
            refuse("the header of .* is damaged: task")
            adapter.write_bytes(before)

    def test_of_a_plan_whose_names_leave_the_line(
        self, base: BertForSequenceClassification, adapter: Path
    ) -> None:
        """They are loaded, and printed escaped."""

        def rename(plan: Entries) -> None:
            plan["name"], plan["strata"][0]["name"] = "a\x1b[2J\nb", "\ud800" * 1000

        replan(adapter, rename)
        load_adapter(base, adapter)
        lines = str(summarise(base)).splitlines()
        assert all(line.isprintable() and len(line) < 500 for line in lines)
        assert lines[0].startswith(r"a\x1b[2J\nb: ")

    def test_of_a_million_labels(self, adapter: Path, refuse: Callable[..., str]) -> None:
        retell(adapter, "labels", json.dumps(["\n"] * 10**6))
        refuse("is damaged: task None, labels")


class TestConfigs:
    """A config.json may say anything: refused in bounded memory, or honoured."""

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("hidden_size", 2 * D, r"word_embeddings\.weight is \[11, 6\].* asks for \[11, 12\]"),
            ("num_hidden_layers", L + 1, r"16 missing .*missing: bert\.encoder\.layer\.2\."),
            ("num_hidden_layers", L - 1, r"16 unexpected .*unexpected: bert\.encoder\.layer\.1\."),
            ("num_hidden_layers", 1024, "missing .* and [0-9]+ more"),
            ("vocab_size", V + 1, r"word_embeddings\.weight is \[11, 6\].* asks for \[12, 6\]"),
            ("vocab_size", 2**24, r"asks for \[16777216, 6\]"),
            ("intermediate_size", F - 1, r"asks for \[9, 6\]"),
            ("type_vocab_size", T + 1, r"token_type_embeddings\.weight is \[5, 6\]"),
            ("max_position_embeddings", P - 1, r"position_embeddings\.weight is \[7, 6\]"),
            ("hidden_size", 3 * 2**22, r"asks for \[11, 12582912\]"),
        ],
    )
    def test_that_disagree_with_the_weights(
        self, folder: Path, key: str, value: int, match: str
    ) -> None:
        """Each tensor that does not fit is listed, the first dozen of them."""
        entries = {**CONFIG.to_json_dict(), key: value}
        (folder / "config.json").write_text(json.dumps(entries))
        with bounded(20, 300), pytest.raises(WeightsError, match=f"(?s){match}") as caught:
            load_pretrained(folder, num_labels=C)
        message = str(caught.value)
        assert "do not fit its config.json" in message
        assert len(message) < 3000

    def test_of_another_number_of_heads(self, folder: Path) -> None:
        """No tensor's shape tells: it must divide the width, and is else believed."""
        entries = {**CONFIG.to_json_dict(), "num_attention_heads": 4}
        (folder / "config.json").write_text(json.dumps(entries))
        refusal(lambda: load_pretrained(folder, num_labels=C), "must divide", ConfigError)
        assert D % A == 0

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("hidden_size", 10**12), ("num_hidden_layers", 10**7), ("num_hidden_layers", 1025),
            ("vocab_size", 10**12), ("max_position_embeddings", 2**24 + 1),
            ("num_hidden_layers", Raw("9" * 4000)), ("hidden_size", Raw("NaN")),
            ("layer_norm_eps", Raw("NaN")), ("hidden_dropout_prob", Raw("NaN")),
            ("initializer_range", Raw("Infinity")), ("hidden_size", Raw("1e1000")),
            ("hidden_act", "x\n" * 10**5), ("model_type", [[0] * 10**5]),
            ("pad_token_id", Raw("9" * 4000)), ("rope\n" * 1000, 1), (Raw('"\\ud800"'), 1),
        ],
        ids=lambda value: f"{value!s:.20}",
    )  # fmt: skip
    def test_that_ask_for_too_much(self, folder: Path, key: str, value: Any) -> None:
        entries = Pairs([each, own] for each, own in CONFIG.to_json_dict().items() if each != key)
        entries.append([key, value])
        text = Draft(entries, bytearray()).raw()[8:]
        (folder / "config.json").write_bytes(text)
        with bounded(5, 100):
            refusal(lambda: load_pretrained(folder), r"config\.json", ConfigError)

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"[" * 10**6, "nested too deeply"),
            (b'{"a":' * 10**6, "nested too deeply"),
            (b'{"x": ' + b"[" * 970 + b"1" + b"]" * 970 + b"}", "sets x|nested too deeply|lacks"),
            (b" " * 50_000_000, "takes more than the 16777216 bytes"),
            (b'{"a": "' + b"x" * 50_000_000 + b'"}', "takes more than the 16777216 bytes"),
            (b'{"' + b"x" * 10**7 + b'": 1}', "sets xxx"),
            (b'{"a": 1, "a": 1}', "holds twice: a"),
            (b'{"hidden_size": 6, "\\u0068idden_size": 7}', "holds twice: hidden_size"),
            (b'{"\\n": 1, "\\n": 1}', r"holds twice: \\n"),
            (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON: .*digits"),
            (b"\xef\xbb\xbf{}", "cannot be read as JSON"),
            (b"", "cannot be read as JSON"),
            (b"\0" * 1000, "cannot be read as JSON"),
            (struct.pack("<Q", 2) + b"{}", "cannot be read as JSON"),
        ],
        ids=lambda value: f"{value!r:.30}",
    )
    def test_that_are_none(self, folder: Path, content: bytes, match: str) -> None:
        (folder / "config.json").write_bytes(content)
        with bounded(5, 300):
            refusal(lambda: load_pretrained(folder), match, ConfigError)

    @pytest.mark.parametrize("kind", ["folder", "pipe", "/dev/zero", "loop"])
    def test_that_are_no_file(self, folder: Path, kind: str) -> None:
        path = folder / "config.json"
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(kind if kind != "loop" else path.name)
        refusal(lambda: load_pretrained(folder), r"config\.json", ConfigError)
        with pytest.raises(ConfigError):
            BertConfig.from_json(path)

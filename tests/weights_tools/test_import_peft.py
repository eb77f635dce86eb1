"""``import`` of what PEFT has saved.

Oracle: PEFT's own logits on the same base, to 1e-5, and what it saved: exported again, the same
tensors under the same names, bit for bit but for biases and gains, which are kept as differences
from the base.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exchanged import PAIRS, TEXTS, a_run, apart, batch_of, logits_of
from torch import nn

import spafit
from spafit.cli import main as spafit_main
from spafit.cli.trained import Trained
from spafit.errors import SpafitError, WeightsError
from spafit.runs.record import read_record
from weights_tools import importing, make_tiny
from weights_tools.__main__ import main
from weights_tools.formats import patterns
from weights_tools.formats import peft as format_

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

QV = ["query", "value"]
SEQ = {"task_type": "SEQ_CLS"}
CONFIGS: dict[str, Any] = {
    "plain": peft.LoraConfig(**SEQ, r=3, lora_alpha=5, target_modules=QV, lora_dropout=0.25),
    "layers": peft.LoraConfig(
        **SEQ, r=3, target_modules=["key"], layers_to_transform=[1, 3], layers_pattern="layer"
    ),
    "a layer": peft.LoraConfig(**SEQ, r=3, target_modules=["key"], layers_to_transform=2),
    "patterns": peft.LoraConfig(
        **SEQ,
        r=3,
        lora_alpha=5,
        target_modules=r".*\.layer\.[12]\..*(query|key|output\.dense)",
        exclude_modules=["attention.output.dense"],
        rank_pattern={"query": 2, r"layer\.2\.output\.dense": 4},
        alpha_pattern={r"layer\.(1|3)\..*key": 9.5, "dense": 1},
    ),
    "rslora": peft.LoraConfig(**SEQ, r=3, use_rslora=True, target_modules=["intermediate.dense"]),
    "bias all": peft.LoraConfig(
        **SEQ,
        r=3,
        target_modules=QV,
        layers_to_transform=[1],
        bias="all",
        modules_to_save=["pooler"],
    ),
    "bias of lora": peft.LoraConfig(**SEQ, r=3, target_modules=QV, bias="lora_only"),
    "norms": peft.LoraConfig(**SEQ, r=3, target_modules=QV, modules_to_save=["LayerNorm"]),
    "all linear": peft.LoraConfig(**SEQ, r=3, target_modules="all-linear"),
    "maps whole": peft.LoraConfig(
        **SEQ, r=3, target_modules=QV, modules_to_save=["layer.2.output", "1.intermediate.dense"]
    ),
    "ia3": peft.IA3Config(**SEQ),
    "ia3 by name": peft.IA3Config(
        **SEQ, target_modules=["3.output.dense", "query"], feedforward_modules=["3.output.dense"]
    ),
    "norms alone": peft.LNTuningConfig(**SEQ, target_modules=["output.LayerNorm"]),
}


def saved(
    folder: Path, base: Path, config: Any, num_labels: int = 3, part: float = 0.1
) -> nn.Module:
    """Have PEFT adapt the base, move all that trains, and save."""
    auto = transformers.AutoModelForSequenceClassification
    torch.manual_seed(5)
    model: nn.Module = peft.get_peft_model(
        auto.from_pretrained(base, num_labels=num_labels), config
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(part * torch.randn(parameter.shape))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def edited(folder: Path, **changes: Any) -> Path:
    """Change entries of an adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    saved(folder, tiny, CONFIGS["plain"])
    return folder


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "own"
    saved(folder, tiny, CONFIGS["plain"], num_labels=2)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_s_logits_and_back(name: str, tiny: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "peft", tmp_path / "run"
    theirs = saved(folder, tiny, CONFIGS[name])
    command = ["import", str(folder), str(out), "--model", str(tiny), "--task", "mnli"]
    assert main(command) == 0
    batch = batch_of(tiny)
    trained = Trained(out, None, mapped=None)
    found = logits_of(trained.runs[0].model, batch)
    assert apart(found, logits_of(theirs, batch)) < 1e-5
    plain = logits_of(spafit.load_pretrained(tiny, num_labels=3), batch)
    assert apart(found, plain) > 1e-3

    (tmp_path / "again").mkdir()
    format_.export(trained, tmp_path / "again")
    before, after = (
        load_file(each / "adapter_model.safetensors") for each in (folder, tmp_path / "again")
    )
    junk = {key for key in before if "original_module" in key or ".modules_to_save." in key}
    assert bool(junk) == (name == "bias all")
    if name == "all linear":  # its pooler is whole now
        junk |= {key for key in before if "pooler" in key}
    for key in before.keys() - junk:
        by = 3e-7 if key.endswith(("bias", "LayerNorm.weight")) else 0.0
        assert apart(after[key], before[key]) <= by, key


def test_the_plan(tiny: Path, tmp_path: Path) -> None:
    """Strata are runs of equal layers; settings of LoRA are kept."""
    saved(tmp_path, tiny, CONFIGS["patterns"])
    model, _ = importing.put_on(importing.read(tmp_path), str(tiny))
    assert model.adaptation is not None
    first, one, two, last = model.adaptation.plan.strata
    assert not first.train and not last.train
    shown = [
        {place.removeprefix("layer."): (its[0].r, its[0].alpha) for place, its in table.items()}
        for table in (one.train, two.train)
    ]
    assert shown == [
        {
            "attention.self.query": (2, 5.0),
            "attention.self.key": (3, 9.5),
            "output.dense": (3, 1.0),
        },
        {
            "attention.self.query": (2, 5.0),
            "attention.self.key": (3, 5.0),
            "output.dense": (4, 1.0),
        },
    ]


class TestWhatIsSaid:
    """Nothing is ignored without a word."""

    def notes(self, folder: Path, base: Path) -> str:
        _, notes = importing.put_on(importing.read(folder), str(base))
        return "\n".join(notes)

    def test_junk_and_unknown_keys(self, tiny: Path, tmp_path: Path) -> None:
        saved(tmp_path, tiny, CONFIGS["bias all"])
        said = self.notes(edited(tmp_path, lora_inhibition=0.0, something=[]), tiny)
        for part in (
            "ignored: lora_inhibition, unknown, is 0.0",
            "ignored: something, unknown",
            "classifier.original_module.bias",
            "a copy of classifier.bias",
            "the embeddings differ",
        ):
            assert part in said
        weights = tmp_path / "adapter_model.safetensors"
        tensors = load_file(weights)
        tensors["base_model.model.classifier.modules_to_save.bias"] += 1
        save_file(tensors, weights)
        with pytest.raises(WeightsError, match=r"classifier\.modules_to_save\.bias"):
            importing.read(tmp_path)
        with pytest.raises(WeightsError, match=r"lora_inhibition is 0\.5"):
            importing.read(edited(tmp_path, lora_inhibition=0.5))

    def test_lost_biases(self, tiny: Path, tmp_path: Path) -> None:
        """As versions of PEFT before the fix wrote them."""
        saved(tmp_path, tiny, CONFIGS["bias of lora"])
        assert "peft#3306" not in self.notes(tmp_path, tiny)
        weights = tmp_path / "adapter_model.safetensors"
        tensors = load_file(weights)
        save_file({key: tensors[key] for key in tensors if "base_layer.bias" not in key}, weights)
        said = self.notes(tmp_path, tiny)
        assert "peft#3306" in said and "they are lost" in said

    def test_what_was_not_trained(self, tiny: Path, tmp_path: Path) -> None:
        saved(tmp_path, tiny, CONFIGS["bias all"], part=0.0)
        said = self.notes(tmp_path, tiny)
        assert "left out, because it is the base's: bert.embeddings.LayerNorm.bias" in said
        assert "differ from the base's" not in said
        saved(tmp_path / "all", tiny, CONFIGS["all linear"])
        assert "LoRA on bert.pooler.dense" in self.notes(tmp_path / "all", tiny)


class TestRefusals:
    """By name, and before anything is written."""

    def refused(self, folder: Path, base: Path, *parts: str) -> None:
        with pytest.raises(SpafitError) as error:
            importing.put_on(importing.read(folder), str(base))
        assert all(part in str(error.value) for part in parts), error.value

    def copied(self, plain: Path, folder: Path, **changes: Any) -> Path:
        for path in plain.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return edited(folder, **changes)

    @pytest.mark.parametrize(
        ("key", "value", "part"),
        [
            ("use_dora", True, "use_dora is True"),
            ("lora_bias", True, "lora_bias"),
            ("peft_type", "ADALORA", "'ADALORA'"),
            ("peft_type", None, "None"),
            ("task_type", "TOKEN_CLS", "task_type"),
            ("init_lora_weights", "pissa", "changes the base"),
            ("layer_replication", [[0, 2]], "layer_replication"),
            ("trainable_token_indices", [3], "trainable_token_indices"),
            ("target_parameters", ["x"], "target_parameters"),
            ("fan_in_fan_out", True, "fan_in_fan_out"),
            ("use_qalora", True, "use_qalora"),
            ("auto_mapping", {"base_model_class": "BertModel"}, "auto_mapping"),
            ("bias", "some", "bias must be"),
            ("r", 4, "of rank 4"),
            ("r", "3", "r must be a number"),
            ("lora_alpha", 0, "alpha must be a positive"),
            ("lora_dropout", 1, "dropout"),
            ("use_rslora", "no", "use_rslora must be"),
            ("target_modules", None, "target_modules"),
            ("target_modules", ["query"], "holds bert.encoder.layer.0.attention.self.value"),
            ("target_modules", ["query", "value", "key"], "lacks bert.encoder.layer.0.attention"),
            ("target_modules", ["query", "value", "word_embeddings"], "word_embeddings"),
            ("target_modules", "(query|value", "regular expression"),
            ("exclude_modules", ["0.attention.self.query"], "holds bert.encoder.layer.0."),
            ("layers_to_transform", [0], "holds bert.encoder.layer.1."),
            ("layers_to_transform", ["0"], "layers_to_transform"),
            ("layers_pattern", ["(a+)+"], "layers_pattern"),
            ("rank_pattern", {"query": 2}, "of rank 2"),
            ("rank_pattern", {"query": "2"}, "rank_pattern must"),
            ("alpha_pattern", [3], "alpha_pattern must"),
            ("modules_to_save", ["classifier", "pooler"], "lacks bert.pooler.dense.weight"),
            ("modules_to_save", ["(a+)+$"], "modules_to_save"),
        ],
    )
    def test_settings(
        self, plain: Path, tiny: Path, tmp_path: Path, key: str, value: object, part: str
    ) -> None:
        changes = {key: value, **({"layers_to_transform": [0]} if key == "layers_pattern" else {})}
        self.refused(self.copied(plain, tmp_path, **changes), tiny, part)

    def test_every_setting_of_peft_is_looked_at(self, plain: Path, tmp_path: Path) -> None:
        """Oracle: the fields of PEFT's LoraConfig.

        Each, set to what none is by default, is refused, but for those without a part in what is
        computed.
        """
        no_matter = set(
            "base_model_name_or_path revision peft_version inference_mode megatron_core "
            "qalora_group_size runtime_config eva_config".split()
        )
        fields = set(peft.LoraConfig.__dataclass_fields__)
        passed = set()
        for key in fields:
            try:
                importing.read(self.copied(plain, tmp_path, **{key: {"no": "such"}}))
            except WeightsError:
                continue
            passed.add(key)
        # These are read with the base, and refused then (test_settings).
        later = set(
            "r lora_alpha lora_dropout use_rslora target_modules exclude_modules modules_to_save "
            "rank_pattern alpha_pattern layers_to_transform layers_pattern".split()
        )
        assert passed == (no_matter | later) & fields

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            (lambda t: t.pop("base_model.model.classifier.weight"), "no head"),
            (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "must be of rank 3"),
            (
                lambda t: t.update({f"{LAYER}.0.attention.self.query.lora_magnitude_vector": ONE}),
                "lora_magnitude_vector",
            ),
            (lambda t: t.update({"encoder.layer.0.x": ONE}), "encoder.layer.0.x"),
            (lambda t: t.update({"base_model.model.bert.more.bias": ONE}), "bert.more,"),
            (lambda t: t.update({f"{LAYER}.9.output.dense.bias": ONE}), "layer.9.output"),
            (lambda t: t.update({f"{LAYER}.1.output.dense.bias": ONE}), "the model's is [24]"),
            (
                lambda t: t.update({f"{LAYER}.1.attention.self.query.base_layer.weight": SQUARE}),
                "cannot be attached",
            ),
            (lambda t: t.update({"base_model.model.classifier.bias": NAN}), "NaN"),
        ],
    )
    def test_tensors(
        self,
        plain: Path,
        tiny: Path,
        tmp_path: Path,
        change: Callable[[dict[str, torch.Tensor]], object],
        part: str,
    ) -> None:
        folder = self.copied(plain, tmp_path)
        tensors = load_file(plain / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        self.refused(folder, tiny, part)

    def test_a_pickle(self, plain: Path, tiny: Path, tmp_path: Path) -> None:
        folder = self.copied(plain, tmp_path)
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        self.refused(folder, tiny, "adapter_model.bin is a pickle", "weights_tools convert")

    def test_json(self, plain: Path, tmp_path: Path) -> None:
        folder = self.copied(plain, tmp_path)
        path = folder / "adapter_config.json"
        for text, part in (
            ('{"r": 3, "r": 3}', "twice"),
            ("[]", "JSON object"),
            ("{", "is not JSON"),
            ("{}", "neither PEFT's"),
        ):
            path.write_text(text)
            with pytest.raises(WeightsError, match=part):
                importing.read(folder)
        path.unlink()
        with pytest.raises(WeightsError, match="No such file"):
            importing.read(folder)

    def test_a_pattern_that_takes_forever(
        self, plain: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(patterns, "TIME_LIMIT_S", 0.5)
        folder = self.copied(plain, tmp_path, target_modules=r"(\w|\.|[a-z]+)*!")
        start = time.monotonic()
        self.refused(folder, tiny, "a regular expression in it cannot be used", "takes longer")
        assert time.monotonic() - start < 8

    def test_another_base(self, plain: Path, tmp_path: Path) -> None:
        base = make_tiny(tmp_path / "wide", hidden_size=30, num_attention_heads=5)
        self.refused(plain, base, "--model")
        base = make_tiny(tmp_path / "low", num_hidden_layers=3)
        self.refused(plain, base, "layer.3", "--model")


LAYER = "base_model.model.bert.encoder.layer"
ONE, SQUARE = torch.ones(1), torch.ones(24, 24)
NAN = torch.full((3,), float("nan"))


class TestTheRunFolder:
    """What ``spafit predict`` needs lies beside the adapter, if the task is named."""

    def test_labels_of_one_s_own(
        self, folder: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = str(tmp_path / "run")
        arguments = ["import", str(folder), out, "--model", str(tiny), "--labels", "so", "not so"]
        assert main([*arguments, "--pair"]) == 0
        assert "LoRA r=3" in capsys.readouterr().out
        assert spafit_main(["predict", out, "--text", TEXTS[0], "--text2", PAIRS[0]]) == 0
        label = capsys.readouterr().out.split("\n")[1].split("\t")[-1]
        model = spafit.load_pretrained(tiny, num_labels=2)
        spafit.load_adapter(model, tmp_path / "run" / "adapter.safetensors")
        batch = dict(spafit.load_tokenizer(tiny)([TEXTS[0]], [PAIRS[0]]))
        assert label == ("so", "not so")[int(logits_of(model, batch).argmax())]
        assert read_record(out)["task"] == "own"
        capsys.readouterr()
        assert spafit_main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
        assert "its adapter was imported" in (tmp_path / "report" / "report.md").read_text()

    def test_no_task(
        self, folder: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "run"
        assert main(["import", str(folder), str(out), "--model", str(tiny)]) == 0
        assert "name its task (--task" in capsys.readouterr().out
        assert [each.name for each in out.iterdir()] == ["adapter.safetensors"]

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (["--task", "mnli"], "a head of 3 rows"),
            (["--task", "nothing"], "nothing"),
            (["--regression"], "a head of 1 rows"),
            (["--labels", "a", "b", "c"], "a head of 3 rows"),
            (["--labels", "a", "a"], "a name twice"),
            (["--task", "rte", "--pair"], "--pair"),
        ],
    )
    def test_refusals(
        self,
        folder: Path,
        tiny: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        options: list[str],
        part: str,
    ) -> None:
        out = tmp_path / "run"
        assert main(["import", str(folder), str(out), "--model", str(tiny), *options]) == 2
        [line] = capsys.readouterr().err.strip().split("\n")
        assert part in line
        assert not out.exists()

    def test_an_export_of_ours_brings_its_task(self, tiny: Path, tmp_path: Path) -> None:
        task = spafit.Task("mine", ("text",), ("a", "b"), ("accuracy",))
        trained = a_run(tmp_path / "run", tiny, "SPAFIT-0-1-I", task)
        for command in (
            ["export", "run", "peft", "--format", "peft"],
            ["import", "peft", "back", "--model", str(tiny)],
        ):
            assert main([command[0], *(str(tmp_path / c) for c in command[1:3]), *command[3:]]) == 0
        back = Trained(tmp_path / "back", None, mapped=None)
        assert back.task == trained.task
        own = spafit.dataset(TEXTS, task=task)
        (labels, found), (expected, probabilities) = back.predict(own), trained.predict(own)
        assert labels == expected
        assert found is not None and probabilities is not None
        assert abs(found - probabilities).max() < 1e-6
        assert back.record["settings"]["max_length"] == 17


@pytest.mark.slow
def test_bert_large_adapters_of_others(shared_data: Path, tmp_path: Path) -> None:
    """Two that others trained on bert-large-cased, on a random base of its shape."""
    folders = [shared_data / "peft" / task for task in ("MRPC", "MNLI")]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip(f"no adapters of PEFT in {shared_data / 'peft'}")
    base = make_tiny(
        tmp_path / "large",
        num_hidden_layers=24,
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=4096,
    )
    # Of the usual size: 24 layers of weights as large as make_tiny's would magnify all rounding.
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if not name.endswith("LayerNorm.weight"):
            tensor *= 0.1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    batch = batch_of(base)
    for folder, num_labels in zip(folders, (2, 3), strict=True):
        ours, notes = importing.put_on(importing.read(folder), str(base))
        assert any("lora_inhibition" in note for note in notes)
        auto = transformers.AutoModelForSequenceClassification
        plain = auto.from_pretrained(base, num_labels=num_labels)
        before = logits_of(plain, batch)
        theirs = peft.PeftModel.from_pretrained(plain, folder)
        expected = logits_of(theirs, batch)
        assert apart(before, expected) > 1e-2
        assert apart(logits_of(ours, batch), expected) < 1e-5

"""Bottleneck adapters to and from the library ``adapters`` (AdapterHub).

The library needs another transformers than these tests have, so its files are written here by hand:
its settings as its ``save_adapter`` writes them, and its names of tensors. Oracle of what is
computed: the equations of its three forms, in spafit tested against its own numbers
(tests/test_adapters_oracle.py, whose files are read here too where they are).
Where an environment with the library is named, it loads what is exported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import REPOSITORY
from support.exchanged import L, a_run, apart, batch_of, logits_of, three

import spafit
from spafit.adapters import BottleneckAdapter, LoRA, ParallelAdapter, PfeifferAdapter, SeriesAdapter
from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError, SpafitError, WeightsError
from spafit.plans import Plan, Stratum
from weights_tools import importing
from weights_tools.__main__ import main
from weights_tools.formats import adapters as format_

D = 24
ENDS = "attention.output, layer.output"
ORACLES = Path(
    os.environ.get(
        "ADAPTERS_ORACLES", REPOSITORY.parent / "shared" / "data" / "oracles" / "adapters"
    )
)
FILES = sorted(ORACLES.glob("*.safetensors"))

# As adapters 1.3.0 writes a DoubleSeqBnConfig.
SETTINGS: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [0],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": True,
    "non_linearity": "swish",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 16,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
HEAD = {"classifier.weight": torch.randn(3, D), "classifier.bias": torch.randn(3)}
ABOUT = {
    "hidden_size": D,
    "model_class": "BertForSequenceClassification",
    "model_name": "bert-base-uncased",
    "model_type": "bert",
    "name": "mine",
    "version": "adapters.1.3.0",
}


def written(folder: Path, m: int = 1, layers: tuple[int, ...] = (1, 2, 3), **changes: Any) -> Path:
    """Write the folder of an adapter with m units in each bottleneck."""
    folder.mkdir(exist_ok=True)
    settings = {**SETTINGS, **changes}
    generator = torch.Generator().manual_seed(3)
    ends = ["attention.output"] * settings["mh_adapter"] + ["output"] * settings["output_adapter"]
    tensors = {
        f"bert.encoder.layer.{layer}.{end}.adapters.mine.adapter_{part}": 0.3
        * torch.randn(shape, generator=generator)
        for layer in layers
        for end in ends
        for part, shape in {
            "down.0.weight": (m, D),
            "down.0.bias": (m,),
            "up.weight": (D, m),
            "up.bias": (D,),
        }.items()
    }
    save_file(tensors, folder / "adapter.safetensors")
    save_file(HEAD, folder / "model_head.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**ABOUT, "config": settings}))
    label2id = {"yes": 0, "no": 2, "perhaps": 1}
    (folder / "head_config.json").write_text(json.dumps({**ABOUT, "label2id": label2id}))
    return folder


def test_it_is_read(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a model that is adapted by hand, and given the file's tensors by its names."""
    folder = written(tmp_path / "adapter", m=6, reduction_factor=4, non_linearity="gelu")
    out = tmp_path / "run"
    labels = ["perhaps", "no", "yes"]
    command = ["import", str(folder), str(out), "--model", str(tiny), "--labels", *labels]
    assert main(command) == 0
    assert "its base is called bert-base-uncased" in capsys.readouterr().out
    found = spafit.load_pretrained(tiny, num_labels=3)
    adaptation = spafit.load_adapter(found, out / "adapter.safetensors")
    assert adaptation.labels == ("yes", "perhaps", "no")  # the order of the rows
    by_hand = spafit.load_pretrained(tiny, num_labels=3)
    spafit.adapt(by_hand, three({ENDS: [SeriesAdapter(6, "gelu")]}))
    state = {
        name.replace("adapters.mine.adapter_", "adapters.series.").replace("down.0", "down"): each
        for name, each in load_file(folder / "adapter.safetensors").items()
    }
    by_hand.load_state_dict({**by_hand.state_dict(), **state, **HEAD})
    batch = batch_of(tiny)
    assert torch.equal(logits_of(found, batch), logits_of(by_hand, batch))
    with spafit.adapters_disabled(by_hand):
        assert apart(logits_of(found, batch), logits_of(by_hand, batch)) > 1e-2


PLANS: dict[str, Plan] = {
    "series": three({ENDS: [SeriesAdapter(5)]}),
    "pfeiffer": three({"layer.output": [PfeifferAdapter("D/4", "gelu")]}),
    "parallel": three({ENDS: [ParallelAdapter(30, scaling=2.5)]}),
    "parallel, one": three({"layer.output": [ParallelAdapter(7, "swish")]}),
    "sizes": three({ENDS: [SeriesAdapter(5)]}, {ENDS: [SeriesAdapter(11)]}),
    "in the middle": Plan(
        "mine",
        L,
        [Stratum("a", 0, 0), Stratum("b", 1, 2, {ENDS: [SeriesAdapter(3)]}), Stratum("c", 3, 3)],
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_there_and_back(name: str, tiny: Path, tmp_path: Path) -> None:
    trained = a_run(tmp_path / "run", tiny, PLANS[name])
    (tmp_path / "out").mkdir()
    format_.export(trained, tmp_path / "out")
    foreign = importing.read(tmp_path / "out")
    assert foreign.labels == ("contradiction", "neutral", "entailment")
    back, _ = importing.put_on(foreign, str(tiny))
    batch = batch_of(tiny)
    model = trained.runs[0].model
    assert torch.equal(logits_of(back, batch), logits_of(model, batch))
    for found, plan in zip(_by_layer(back), _by_layer(model), strict=True):
        assert found == plan
    # And the files again, bit for bit.
    again = tmp_path / "again"
    assert model.adaptation is not None and back.adaptation is not None
    back.adaptation.labels = model.adaptation.labels
    again.mkdir()
    trained.runs[0].__dict__["model"] = back
    format_.export(trained, again)
    for each in (tmp_path / "out").iterdir():
        assert (again / each.name).read_bytes() == each.read_bytes(), each.name


_LOGITS = """
import sys, adapters, torch, transformers
from safetensors.torch import load_file, save_file
base, folder, batch, out = sys.argv[1:]
model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
adapters.init(model)
model.set_active_adapters(model.load_adapter(folder, use_safetensors=True))
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file(batch)).logits}, out)
"""


@pytest.mark.skipif(
    "ADAPTERHUB" not in os.environ,
    reason="set ADAPTERHUB to the folder of an environment with adapters 1.3.0",
)
@pytest.mark.parametrize("name", PLANS)
def test_the_library_loads_it(name: str, tiny: Path, tmp_path: Path) -> None:
    trained = a_run(tmp_path / "run", tiny, PLANS[name])
    (tmp_path / "out").mkdir()
    format_.export(trained, tmp_path / "out")
    batch = batch_of(tiny)
    save_file(batch, tmp_path / "batch")
    places = map(str, (tiny, *(tmp_path / each for each in ("out", "batch", "logits"))))
    environment = {**os.environ, "PYTHONPATH": os.environ["ADAPTERHUB"]}
    subprocess.run([sys.executable, "-c", _LOGITS, *places], check=True, env=environment)
    found = load_file(tmp_path / "logits")["logits"]
    assert apart(found, logits_of(trained.runs[0].model, batch)) < 1e-5


def _by_layer(model: BertForSequenceClassification) -> list[dict[str, Any]]:
    """Return the form of each adapter of each layer, with its size in numbers."""
    assert model.adaptation is not None
    return [
        {
            place: (each.name, each.size_for(D), each.activation, each.scaling)
            for place, its in stratum.train.items()
            for each in its
            if isinstance(each, BottleneckAdapter)
        }
        for stratum in model.adaptation.plan.strata
        for _ in range(len(stratum))
    ]


@pytest.mark.parametrize("number", range(4))
def test_the_library_s_own(number: int, tmp_path: Path) -> None:
    """Oracle: the library's logits in the oracle files, in float64, here of float32 files."""
    if len(FILES) <= number:
        pytest.skip(f"no oracle files in {ORACLES}")
    with safe_open(FILES[number], "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    sizes, settings = json.loads(about["config"]), json.loads(about["settings"])
    its = {
        name.removeprefix("adapter."): each.float()
        for name, each in tensors.items()
        if name.startswith("adapter.")
    }
    base = {
        name.removeprefix("base."): each.float()
        for name, each in tensors.items()
        if name.startswith("base.") and "prompt_tuning" not in name  # the library's own
    }
    head = {name: base[name] for name in ("classifier.weight", "classifier.bias")}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    save_file(base, tmp_path / "model.safetensors")
    folder = written(tmp_path / "adapter")
    save_file(its, folder / "adapter.safetensors")
    save_file(head, folder / "model_head.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**ABOUT, "config": settings}))
    model, _ = importing.put_on(importing.read(folder), str(tmp_path))
    batch = {name: tensors[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert apart(logits_of(model, batch), tensors["logits"].float()) < 1e-5


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("ln_before", True, "ln_before"),
        ("ln_after", True, "ln_after"),
        ("original_ln_after", False, "original_ln_after"),
        ("use_gating", True, "use_gating"),
        ("residual_before_ln", "post_add", "post_add"),
        ("inv_adapter", "nice", "inv_adapter"),
        ("phm_layer", True, "phm_layer"),
        ("cross_adapter", True, "cross_adapter"),
        ("architecture", "prefix_tuning", "prefix_tuning"),
        ("non_linearity", "tanh", "tanh"),
        ("scaling", "learned", "learned"),
        ("reduction_factor", 4, "reduction_factor"),
        ("reduction_factor", {"1": 16}, "reduction_factor"),
        ("reduction_factor", 0, "reduction_factor"),
        ("leave_out", [0, 1], "holds an adapter in bert.encoder.layer.1.attention.output"),
        ("leave_out", [], "lacks an adapter in bert.encoder.layer.0.attention.output"),
        ("leave_out", ["0"], "leave_out"),
        ("output_adapter", None, "output_adapter must be"),
        ("something", 3, "something"),
    ],
)
def test_refusals_of_settings(
    key: str, value: object, part: str, tiny: Path, tmp_path: Path
) -> None:
    folder = written(tmp_path / "adapter")
    entries = json.loads((folder / "adapter_config.json").read_text())
    entries["config"][key] = value
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    with pytest.raises(SpafitError) as error:
        importing.put_on(importing.read(folder), str(tiny))
    assert part in str(error.value)


def test_other_refusals(tiny: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", something=0)
    assert importing.read(folder).notes == ["ignored: something, unknown, is 0"]
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    for more, part in (
        ("bert.encoder.layer.1.output.adapters.other.adapter_up.bias", "2 adapters"),
        ("bert.invertible_adapters.mine.F.0.weight", "invertible_adapters"),
    ):
        save_file({**tensors, more: torch.ones(D)}, path)
        with pytest.raises(WeightsError, match=part):
            importing.read(folder)
    save_file(tensors, path)
    save_file({**HEAD, "heads.mine.1.weight": torch.ones(3)}, folder / "model_head.safetensors")
    with pytest.raises(WeightsError, match="a head of another kind"):
        importing.read(folder)
    (folder / "model_head.safetensors").rename(folder / "pytorch_model_head.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model_head\.bin is a pickle"):
        importing.read(folder)
    path.rename(folder / "pytorch_adapter.bin")
    with pytest.raises(WeightsError, match=r"pytorch_adapter\.bin is a pickle"):
        importing.read(folder)


def test_what_the_library_has_no_form_for(tiny: Path, tmp_path: Path) -> None:
    for number, (plan, part) in enumerate(
        (
            (spafit.plan("lora-i", L), "lora on layer.attention.self.query"),
            (spafit.plan("linear-probe", L), "it has no adapters"),
            (three({ENDS: [SeriesAdapter(5)], "query": [LoRA(2)]}), "lora on"),
            (three({ENDS: [SeriesAdapter(5)]}, {"layer.output": [SeriesAdapter(5)]}), "places"),
            (three({ENDS: [SeriesAdapter(5)]}, {ENDS: [ParallelAdapter(5)]}), "parallel"),
            (
                three({"attention.output": [SeriesAdapter(5)], "layer.output": [SeriesAdapter(6)]}),
                "bottlenecks of [5, 6] units",
            ),
            (three({ENDS: [SeriesAdapter(5)]}, pooler="full"), "pre-trained tensors"),
        )
    ):
        trained = a_run(tmp_path / f"{number}", tiny, plan)
        with pytest.raises(PlanError) as error:
            format_.export(trained, tmp_path)
        assert plan.name in str(error.value) and part in str(error.value)
        assert not (tmp_path / "adapter_config.json").exists()

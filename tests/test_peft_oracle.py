"""(IA)³, rank-stabilised LoRA, LoRA+ and trained LayerNorms as PEFT computes and trains them.

Oracle: transformers' BERT with PEFT's adapters, in float64, on the same batches: the losses of 20
steps of AdamW, and what trains after them, to 1e-9.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny_bert import INTERMEDIATE, C, D, L, batches, tiny_bert
from torch import nn

import spafit
from spafit.adapters import IA3, BiasDelta, LayerNormGain, LoRA
from spafit.bert import BertForSequenceClassification
from spafit.plans import Plan, Stratum
from spafit.strata import pretrained_names

peft = pytest.importorskip("peft")
peft_optimizers = pytest.importorskip("peft.optimizers")
transformers = pytest.importorskip("transformers")

LAYERS = range(2, L)
RATE = 1e-2
Optimizer = torch.optim.Optimizer


def of_layers(modules: str) -> str:
    """Give a pattern of the modules of the layers that are adapted."""
    numbers = "|".join(map(str, LAYERS))
    return rf"(.*\.)?bert\.encoder\.layer\.({numbers})\.({modules})"


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=RATE, weight_decay=0.0
    )


def loraplus(model: nn.Module) -> Optimizer:
    """PEFT's own; it gives biases B's rate too, so the head is left out here."""
    optimizer: Optimizer = peft_optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16.0, weight_decay=0.0
    )
    return optimizer


QKV = r"attention\.self\.(query|key|value)"
NORMS = r"(attention\.)?output\.LayerNorm"
LORA = {"r": 3, "lora_alpha": 5, "target_modules": of_layers(QKV)}
CASES: dict[str, tuple[dict[str, Sequence[Any]], Any, Callable[[nn.Module], Optimizer]]] = {
    # name: (what trains in our layers, PEFT's configuration, its optimizer)
    "ia3": (
        {"key": [IA3()], "value": [IA3()], "layer.output.dense": [IA3(of="input")]},
        peft.IA3Config(
            target_modules=of_layers(r"attention\.self\.(key|value)|output\.dense"),
            feedforward_modules=of_layers(r"output\.dense"),
            modules_to_save=["classifier"],
        ),
        adamw,
    ),
    "rslora": (
        dict.fromkeys(("query", "key", "value"), (LoRA(3, 5.0, rank_stabilised=True),)),
        peft.LoraConfig(**LORA, use_rslora=True, modules_to_save=["classifier"]),
        adamw,
    ),
    "lora+": (
        dict.fromkeys(("query", "key", "value"), (LoRA(3, 5.0, b_rate=16.0),)),
        peft.LoraConfig(**LORA),
        loraplus,
    ),
    "layernorms": (
        dict.fromkeys(
            ("attention.output.LayerNorm", "layer.output.LayerNorm"),
            (LayerNormGain(), BiasDelta()),
        ),
        peft.LNTuningConfig(target_modules=of_layers(NORMS), modules_to_save=["classifier"]),
        adamw,
    ),
}


def our_name(name: str) -> str:
    """Give our name of a parameter that PEFT trains."""
    name = name.removeprefix("base_model.model.")
    name = re.sub(r"\.ia3_l\.default$", ".ia3.l", name)
    name = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)
    name = re.sub(r"\.ln_tuning_layers\.default\.weight$", ".gain_delta.delta", name)
    name = re.sub(r"\.ln_tuning_layers\.default\.bias$", ".bias_delta.delta", name)
    return name.replace("classifier.modules_to_save.default.", "classifier.")


def pair(case: str) -> tuple[BertForSequenceClassification, nn.Module, dict[str, nn.Parameter]]:
    """Give our model, PEFT's with the same weights, and what that one trains, by our names."""
    train, config, _ = CASES[case]
    ours = tiny_bert()
    entries = {**ours.config.to_json_dict(), "num_labels": C, "attn_implementation": "eager"}
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**entries))
    theirs = theirs.double()
    theirs.load_state_dict({name: ours.state_dict()[name] for name in pretrained_names(ours)})
    strata = [Stratum("still", 0, LAYERS[0] - 1), Stratum("rest", LAYERS[0], L - 1, train)]
    spafit.adapt(ours, Plan(case, L, strata))
    adapted = peft.get_peft_model(theirs, config)
    if case == "lora+":
        for model in (ours, theirs):
            model.classifier.requires_grad_(False)
    trained = {our_name(n): p for n, p in adapted.named_parameters() if p.requires_grad}
    assert ours.adaptation is not None
    head = {"classifier.weight", "classifier.bias"} if case == "lora+" else set()
    assert trained.keys() | head == set(ours.adaptation.trainable)
    with torch.no_grad():  # from the same start: PEFT draws A too
        for name, parameter in trained.items():
            if name.endswith("lora_A"):
                parameter.copy_(ours.get_parameter(name))
    return ours, adapted.eval(), trained


def in_effect(model: BertForSequenceClassification, name: str) -> torch.Tensor:
    """Give our parameter as PEFT has it: γ + δγ and β + δ, not the deltas."""
    value = model.get_parameter(name).detach()
    for delta, pretrained in ((".gain_delta.delta", ".weight"), (".bias_delta.delta", ".bias")):
        if name.endswith(delta):
            value = value + model.get_parameter(name.removesuffix(delta) + pretrained).detach()
    return value


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps(case: str, impl: str) -> None:
    ours, theirs, trained = pair(case)
    spafit.set_impl(ours, impl)
    optimizers = (
        torch.optim.AdamW(spafit.parameter_groups(ours, RATE, weight_decay=0.0)),
        CASES[case][2](theirs),
    )
    losses = []
    for inputs, labels in batches(20):
        found = (ours(**inputs), theirs(**inputs).logits)
        both = [F.cross_entropy(logits, labels) for logits in found]
        for loss, optimizer in zip(both, optimizers, strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        losses.append([loss.item() for loss in both])
        assert abs(losses[-1][0] - losses[-1][1]) < 1e-9
    assert losses[0] != losses[-1]
    for name, parameter in trained.items():
        expected = parameter.detach().reshape(in_effect(ours, name).shape)
        assert (in_effect(ours, name) - expected).abs().max() < 1e-9, name


def test_numbers_that_train() -> None:
    """As PEFT counts them."""
    for case in CASES:
        ours, _, trained = pair(case)
        counted = sum(each.numel() for each in ours.parameters() if each.requires_grad)
        assert counted == sum(each.numel() for each in trained.values())
    ours, *_ = pair("ia3")
    counted = sum(each.numel() for each in ours.parameters() if each.requires_grad)
    assert counted == len(LAYERS) * (2 * D + INTERMEDIATE) + C * D + C

"""The baseline: transformers and PEFT doing the same work as an adapted spafit model.

It has the same strata, LoRA, trained biases and head, uses SDPA, and pads sequences to the longest
of the batch or, as the paper's own code probably did, to 128. Its weights are copies of the spafit
model's, so that logits and gradients can be compared before anything is timed.

Facts about PEFT (as of 0.21): a wrapped Linear moves to ``query.base_layer``;
``modules_to_save=["classifier"]`` trains a copy of the head; it has no stratum of biases, so these
are switched on by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from spafit.adapters import LoRALinear
from spafit.bert import BertForSequenceClassification
from spafit.machine.precision import autocast
from spafit.strata import pretrained_names
from spafit.text.tokenization import Batch, Encodings

#: Gives the logits (B, C) of rows, in their order.
Logits = Callable[[Sequence[int]], Tensor]


def peft_twin(model: BertForSequenceClassification, *, own_draws: bool = False) -> nn.Module:
    """Build a model of transformers and PEFT that computes and trains the same as an adapted one.

    Parameters
    ----------
    model : BertForSequenceClassification
        Adapted by any plan whose LoRA has one rank, alpha and dropout.
    own_draws : bool
        Whether head and LoRA start as transformers and PEFT draw them, in place of copies.

    Returns
    -------
    nn.Module
        In evaluation mode, with its own copies of all weights, on the model's device.

    Raises
    ------
    ValueError
        If the model was not adapted, or its LoRA has several ranks, scales or rates.
    """
    if model.adaptation is None:
        raise ValueError("the model was not adapted; call spafit.adapt(model, plan) first")
    config = transformers.BertConfig(
        **model.config.to_json_dict(), num_labels=model.num_labels, attn_implementation="sdpa"
    )
    state = model.state_dict()
    pretrained = {name: state[name] for name in pretrained_names(model)}
    twin: nn.Module = transformers.BertForSequenceClassification(config)
    head = twin.get_submodule("classifier")
    drawn = {name: each.clone() for name, each in head.state_dict().items()}
    twin.to(model.classifier.weight)
    twin.load_state_dict(pretrained, strict=True)
    if own_draws:
        head.load_state_dict(drawn)
    twin.requires_grad_(False)
    lora = {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }
    if lora:
        twin = peft.get_peft_model(twin, lora_config(lora))

    theirs = {plain_name(name): parameter for name, parameter in twin.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias_delta.delta"):
                theirs[plain_name(name)].add_(parameter)
            elif name.endswith((".lora_A", ".lora_B")) and not own_draws:
                theirs[name].copy_(parameter)
    for name in model.adaptation.trainable:
        theirs[plain_name(name)].requires_grad_(True)
    return twin.eval()


def lora_config(lora: dict[str, LoRALinear]) -> peft.LoraConfig:
    """Return PEFT's settings of these modules, by their names."""
    settings = {(each.lora_A.shape[0], each.scaling, each.dropout) for each in lora.values()}
    if len(settings) > 1:
        raise ValueError(f"the baseline has one rank, scale and rate of LoRA, found {settings}")
    [(r, scaling, dropout)] = settings
    return peft.LoraConfig(
        r=r,
        lora_alpha=scaling * r,
        lora_dropout=dropout,
        bias="none",
        target_modules="|".join(map(re.escape, lora)),  # matched against whole names
        modules_to_save=["classifier"],
    )


def plain_name(name: str) -> str:
    """Return the common name of a parameter of either model; a bias delta is named as a bias."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    name = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)
    name = re.sub(r"^classifier\.modules_to_save\.default\.", "classifier.", name)
    return re.sub(r"\.bias_delta\.delta$", ".bias", name)


def padded_logits(
    twin: nn.Module,
    encodings: Encodings,
    precision: str = "float32",
    pad_to: int = 0,
    multiple: int = 1,
) -> Logits:
    """Run a twin on padded batches.

    For a GPU a batch is made once, in pinned memory, as a data loader's processes would prepare it;
    each call copies it to the device.

    Parameters
    ----------
    twin : nn.Module
        From :func:`peft_twin`, or what torch.compile makes of it.
    encodings : Encodings
        The data.
    precision : {"float32", "bf16", "fp16"}
        Other than float32 is autocast.
    pad_to : int
        The least length; 0 pads to the longest of the batch.
    multiple : int
        What the length is a multiple of.
    """
    device = next(twin.parameters()).device
    ready: dict[tuple[int, ...], Batch] = {}

    def batch_of(numbers: Sequence[int]) -> Batch:
        if device.type != "cuda":
            return padded_batch(encodings, numbers, pad_to, multiple)
        key = tuple(numbers)
        if key not in ready:
            batch = padded_batch(encodings, numbers, pad_to, multiple)
            ready[key] = Batch(*(tensor.pin_memory() for tensor in batch))
        return ready[key]

    def logits(numbers: Sequence[int]) -> Tensor:
        batch = batch_of(numbers)
        ids, mask, types = (tensor.to(device, non_blocking=True) for tensor in batch)
        with autocast(precision, device):
            output = twin(input_ids=ids, attention_mask=mask, token_type_ids=types)
        found: Tensor = output.logits
        return found

    return logits


def padded_batch(
    encodings: Encodings, numbers: Sequence[int], pad_to: int = 0, multiple: int = 1
) -> Batch:
    """Pad rows to the longest of them, or further to ``pad_to`` or the next ``multiple``."""
    ids, mask, types = encodings.batch(numbers)
    length = max(pad_to, ids.shape[1])
    missing = length + -length % multiple - ids.shape[1]
    return Batch(
        F.pad(ids, (0, missing), value=encodings.pad_id),
        F.pad(mask, (0, missing)),
        F.pad(types, (0, missing)),
    )

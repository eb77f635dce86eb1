"""The states of every layer of a frozen model, computed once and kept in a file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from spafit.bert import BertForSequenceClassification
from spafit.errors import WeightsError
from spafit.machine.precision import autocast
from spafit.strata import fingerprint
from spafit.tasks.task import Dataset
from spafit.text.tokenization import Encodings, Tokenizer
from spafit.training.inference import encode
from spafit.weights.safefile import SafeFile, save_tensors

SHOWN = {"cls": "[CLS]", "mean": "mean of tokens"}
"""How the states are called."""

STATES = tuple(SHOWN)
"""The kinds of states: that of [CLS], and the mean over all tokens of a text, [CLS] and [SEP]
included."""

FILE = "states.safetensors"

_BATCH = 32


def layer_states(
    model: BertForSequenceClassification, encodings: Encodings, *, quiet: bool = True
) -> dict[str, torch.Tensor]:
    """Compute the states of every layer, packed, in evaluation mode, in float32.

    Parameters
    ----------
    model : BertForSequenceClassification
        The model, on its device.
    encodings : Encodings
        n examples.
    quiet : bool
        Whether to show no progress, as without a terminal.

    Returns
    -------
    dict of str to torch.Tensor
        By the names of :data:`STATES`, (L + 1, n, D) each, on the CPU. Layer 0 is the output of the
        embeddings, layer l that of the l-th layer.
    """
    config, device = model.config, model.device
    shape = (config.num_hidden_layers + 1, len(encodings), config.hidden_size)
    found = {name: torch.empty(shape) for name in STATES}
    order = encodings.by_length(range(len(encodings)))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast("float32", device):
            for start in tqdm(
                range(0, len(order), _BATCH), "states", disable=quiet or None, leave=False
            ):
                rows = order[start : start + _BATCH]
                batch = encodings.packed(rows).to(device)
                X = model.bert.embeddings(*batch[:3])
                _, states = model.bert.encoder(X, batch.layout, output_hidden_states=True)
                tokens = torch.stack(states)[:, : batch.layout.tokens].float()  # (L + 1, N, D)
                found["cls"][:, rows] = tokens[:, batch.layout.first_rows].cpu()
                found["mean"][:, rows] = _means(tokens, batch.layout.lengths).cpu()
    finally:
        model.train(was_training)
    return found


def _means(tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the mean over the tokens of each sequence, (L + 1, B, D), for (L + 1, N, D)."""
    each = torch.split(tokens, list(lengths), dim=1)
    return torch.stack([states.mean(1) for states in each], dim=1)


def kept_states(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    data: dict[str, Dataset],
    folder: Path,
    *,
    say: Callable[[str], None],
    quiet: bool = True,
) -> dict[str, dict[str, torch.Tensor]]:
    """Read the states of every layer from a folder, or compute and keep them there.

    They are read only if they are those of this model, tokenizer and data, by their fingerprints.
    Anything else in their place, a damaged file included, is said and replaced.

    Parameters
    ----------
    model, tokenizer
        The frozen model, and its tokenizer.
    data : dict of str to Dataset
        By the name of the split.
    folder : Path
        It exists; the file is :data:`FILE`.
    say : callable of str
        Called with what was found.
    quiet : bool
        Whether to show no progress, as without a terminal.

    Returns
    -------
    dict of str to dict of str to torch.Tensor
        By split, what :func:`layer_states` returns.

    Raises
    ------
    WeightsError
        If the file cannot be written.
    """
    config = model.config
    about = {
        "base": fingerprint(model),
        # What the fingerprint of the weights does not tell.
        "config": f"{config.num_attention_heads} heads, eps {config.layer_norm_eps}",
        "tokenizer": tokenizer.fingerprint,
    }
    about |= {f"data.{split}": _digest(dataset) for split, dataset in data.items()}
    shapes = {
        f"{split}.{name}": (config.num_hidden_layers + 1, len(dataset), config.hidden_size)
        for split, dataset in data.items()
        for name in STATES
    }
    path = folder / FILE
    if path.exists():
        found, why = _read(path, about, shapes)
        if found is not None:
            say(f"states: those kept in {path}")
            return {split: {name: found[f"{split}.{name}"] for name in STATES} for split in data}
        say(f"states: computed anew, because {why}")
    states = {
        split: layer_states(model, encode(model, tokenizer, dataset, None), quiet=quiet)
        for split, dataset in data.items()
    }
    flat = {f"{split}.{name}": X for split, each in states.items() for name, X in each.items()}
    save_tensors(path, flat, {**about, "content": _content(flat)})
    return states


def _content(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the hash of all values, so that a damaged file is not taken for whole."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def _digest(dataset: Dataset) -> str:
    """Return the hash of the rows themselves, which may be a part of a file's."""
    return dataclasses.replace(dataset, sha256="").sha256


def _read(
    path: Path, about: dict[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, torch.Tensor] | None, str]:
    """Return the kept states, or None and why they are not those asked for."""
    try:
        with SafeFile(path) as file:
            other = [each for each in about if file.metadata.get(each) != about[each]]
            if other:
                return None, f"those in {path} are of another {', '.join(other)}"
            found = {name: (each.dtype, each.shape) for name, each in file.tensors.items()}
            if found != {name: ("F32", shape) for name, shape in shapes.items()}:
                return None, f"{path} has other tensors"
            states = {name: file.read(name) for name in shapes}
            if file.metadata.get("content") != _content(states):
                return None, f"{path} is damaged"
            return states, ""
    except WeightsError as error:
        return None, str(error)

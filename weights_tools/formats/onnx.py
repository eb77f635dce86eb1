"""A run as an ONNX graph and as a program of torch.export, for engines that run such graphs."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spafit.bert import BertForSequenceClassification, set_impl
from spafit.cli.trained import Trained
from spafit.errors import PlanError, WeightsError
from spafit.layout import Padded
from spafit.trunk.merging import merged_state_dict
from weights_tools.formats.beside import labels_in_order, score_note, write_beside

ONNX, PROGRAM = "model.onnx", "model.pt2"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")

LARGEST_IN_ONE_FILE = 1 << 30
"""Bytes of weights above which they lie in a second file; a file of ONNX has at most 2 GiB."""


class Graph(nn.Module):
    """A model in its plain form, without the checks of values, which are no part of a graph.

    Parameters
    ----------
    model : BertForSequenceClassification
        Set to its plain form, in evaluation mode.
    """

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.bert = model.bert
        self.classifier = model.classifier

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits (B, C) of a padded batch, each input int64 (B, T)."""
        layout = Padded(attention_mask.to(torch.bool))
        X = self.bert.embeddings(input_ids, token_type_ids)  # (B, T, D)
        X, _ = self.bert.encoder(X, layout)
        assert self.bert.pooler is not None
        logits: torch.Tensor = self.classifier(self.bert.pooler(layout.first(X)))
        return logits


def export(trained: Trained, folder: str | Path) -> list[str]:
    """Write a run as model.onnx and model.pt2, with config.json and the tokenizer's files.

    Both take ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 (B, T) of any B and T
    that the model has positions for, and give ``logits``, float32 (B, C). Adapters are merged into
    the weights; those that have no merged form stand in the graph beside them.

    What it takes, returns and refuses is said in :mod:`weights_tools.formats`.
    """
    missing = [each for each in ("onnx", "onnxscript") if importlib.util.find_spec(each) is None]
    if missing:
        raise WeightsError(
            f"an export to ONNX needs {' and '.join(missing)}: pip install '.[onnx]'"
        )
    folder = Path(folder)
    write_beside(trained, folder)
    notes = write_graphs(trained.runs[0].model, folder)
    longest = trained.runs[0].model.config.max_position_embeddings
    notes.append(f"{', '.join(INPUTS)}: int64 (batch, sequence), of at most {longest} tokens")
    labels = labels_in_order(trained)
    order = f", in the order {', '.join(labels)}" if labels else ""
    notes.append(f"logits: float32 (batch, {len(labels) or 1}){order}")
    notes += score_note(trained)
    notes.append(
        f"load a {PROGRAM} only if you trust who made it: torch.export.load reads pickles that the "
        "file names"
    )
    return notes


def write_graphs(model: BertForSequenceClassification, folder: Path) -> list[str]:
    """Write the graphs of a model, merged where it can be, into a folder; return notes."""
    plain, notes = _plain(model)
    program = _program(plain)
    try:
        with tempfile.TemporaryDirectory(prefix=".spafit-", dir=folder) as place, _quiet():
            _save(program, Path(place))
            for path in sorted(Path(place).iterdir(), reverse=True):  # .onnx after its weights
                path.replace(folder / path.name)
    except OSError as error:
        raise WeightsError(f"{folder} cannot be written: {error}; make room there") from None
    return notes


def _plain(
    trained: BertForSequenceClassification,
) -> tuple[BertForSequenceClassification, list[str]]:
    """Return a merged copy of a model on the CPU, in its plain form, and notes."""
    notes = []
    try:
        state = merged_state_dict(trained)
    except PlanError as error:
        notes.append(f"the adapters stand in the graph unmerged: {error}")
        model = copy.deepcopy(trained).cpu()
    else:
        model = BertForSequenceClassification(trained.config, trained.num_labels)
        model.load_state_dict(state)
    set_impl(model, "reference")
    return model.float().eval().requires_grad_(False), notes


def _program(model: BertForSequenceClassification) -> torch.export.ExportedProgram:
    """Trace a model for any B and T."""
    longest = model.config.max_position_embeddings
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=longest)}
    example = tuple(torch.ones(2, min(8, longest), dtype=torch.int64) for _ in INPUTS)
    return torch.export.export(Graph(model), example, dynamic_shapes=(shape,) * len(INPUTS))


def _save(program: torch.export.ExportedProgram, folder: Path) -> None:
    torch.export.save(program, folder / PROGRAM)
    shape = {0: "batch", 1: "sequence"}
    found: Any = torch.onnx.export(
        program,
        dynamic_shapes=dict.fromkeys(INPUTS, shape),
        input_names=INPUTS,
        output_names=("logits",),
        dynamo=True,
        verbose=False,
    )
    weights = sum(each.numel() * each.element_size() for each in program.state_dict.values())
    found.save(folder / ONNX, external_data=weights > LARGEST_IN_ONE_FILE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says of packages that have nothing to do with this model."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)

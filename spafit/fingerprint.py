"""A name for the values of a base model, so that an adapter knows the base it belongs to."""

from __future__ import annotations

import hashlib

import torch

from spafit.adapters import ADDED
from spafit.bert import BertForSequenceClassification
from spafit.errors import WeightsError


def fingerprint(model: BertForSequenceClassification) -> str:
    """SHA-256 over the pre-trained tensors of embeddings, encoder and pooler.

    The head and what techniques add do not count. Every tensor contributes its name, its shape and
    its values as little-endian float32, in the order of the names, so that a float16 file gives the
    same fingerprint whether it was loaded as float16 or as float32.

    Parameters
    ----------
    model : BertForSequenceClassification
        Adapted or not.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    WeightsError
        If the model has no values (it lies on the meta device).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.bert.named_parameters()):
        if name.rpartition(".")[2] in ADDED:
            continue
        if parameter.is_meta:
            raise WeightsError("a model on the meta device has no values to take a fingerprint of")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()

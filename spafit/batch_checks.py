"""What the model refuses: ids and masks that it would otherwise compute something wrong from."""

from __future__ import annotations

import torch

from spafit.config import BertConfig
from spafit.errors import ConfigError
from spafit.layout import PackedBatch


def check_padded(
    config: BertConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor,
) -> None:
    """Check a padded batch (B, T).

    Ids and masks that live on a GPU are not looked into, because that would stop it at every step.

    Raises
    ------
    ConfigError
        If shapes do not fit each other or the model, an id is outside its vocabulary, the mask
        holds more than 0 and 1, or a sequence has no real token.
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ConfigError(
            f"input_ids must be a batch of sequences, (B, T) with B and T at least 1, "
            f"found {tuple(input_ids.shape)}"
        )
    _check_length(config, input_ids.shape[1])
    for name, tensor in (
        ("attention_mask", attention_mask),
        ("token_type_ids", token_type_ids),
    ):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ConfigError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"found {tuple(tensor.shape)}"
            )
    _check_ids(config, input_ids, token_type_ids)
    if attention_mask is None or input_ids.device.type != "cpu":
        return
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ConfigError(
            "attention_mask must be 1 at real tokens and 0 at padding; this one holds other "
            "values, such as those that some programs add to the scores"
        )
    if not bool(attention_mask.any(dim=1).all()):
        raise ConfigError("every row of attention_mask needs at least one real token")


def check_packed(config: BertConfig, batch: PackedBatch, prefix: torch.Tensor | None) -> None:
    """Check a packed batch, and the hidden states that were kept for it, (N, D).

    Raises
    ------
    ConfigError
        If a sequence is longer than the model's positions, the prefix has another shape, or (on a
        CPU, where looking costs nothing) an id is outside its vocabulary.
    """
    _check_length(config, max(batch.layout.lengths))
    shape = (batch.layout.rows, config.hidden_size)
    if prefix is not None and prefix.shape != shape:
        raise ConfigError(
            f"the prefix of this batch must have shape {shape}, found {tuple(prefix.shape)}; "
            "give what BertModel.prefix gives for the same batch"
        )
    _check_ids(config, batch.input_ids, batch.token_type_ids)


def _check_length(config: BertConfig, tokens: int) -> None:
    positions = config.max_position_embeddings
    if tokens > positions:
        raise ConfigError(
            f"sequences of {tokens} tokens do not fit the model's {positions} positions; "
            f"encode with max_length={positions} or less"
        )


def _check_ids(config: BertConfig, input_ids: torch.Tensor, token_type_ids: torch.Tensor) -> None:
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, ids, size in (
        ("input_ids", input_ids, config.vocab_size),
        ("token_type_ids", token_type_ids, config.type_vocab_size),
    ):
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= size:
            raise ConfigError(
                f"{name} must lie in 0 .. {size - 1}, found {lowest} .. {highest}; "
                "is this the tokenizer of this model?"
            )

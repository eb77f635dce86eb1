"""BERT, in the order in which the data meets it.

Devlin et al. (2019), arXiv 1810.04805; the sub-layers, their names and the numbers of the equations
are those of the SPAFIT paper (Arora and Wang, 2024, arXiv 2405.00201, section 3). Attribute names
are the checkpoint's keys.

Legend: B batch, T tokens of the longest sequence, D hidden, A heads, Dh = D / A head size,
F intermediate, L layers, C labels. H1 .. H7 are the paper's hidden states; X is a layer's input.

Where the paper's printed equations and the checkpoint differ, we compute what the checkpoint was
trained with and say so at the line; tests/test_equations.py pins each such remark.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from spafit.adapters import LayerNorm, Linear
from spafit.config import BertConfig
from spafit.errors import ConfigError
from spafit.kernels import attention
from spafit.plans import Adaptation


class Embeddings(nn.Module):
    """Token ids (B, T) -> the first hidden state (B, T, D).

    X = Dropout(LayerNorm(word + position + token type)).
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        D = config.hidden_size
        # The embedding of padding receives no gradient, as in the checkpoint's own training code.
        self.word_embeddings = _embedding(config.vocab_size, D, config.pad_token_id)
        self.position_embeddings = _embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = _embedding(config.type_vocab_size, D)
        self.LayerNorm = LayerNorm(D, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor) -> torch.Tensor:
        """Embed (B, T) ids; gives (B, T, D)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
        X: torch.Tensor = (
            self.word_embeddings(input_ids)
            + self.token_type_embeddings(token_type_ids)
            + self.position_embeddings(positions)
        )  # (B, T, D)
        X = self.dropout(self.LayerNorm(X))
        return X


def _embedding(entries: int, D: int, padding_idx: int | None = None) -> nn.Embedding:
    """Make a table that nothing was drawn for yet: :func:`initialise` or a checkpoint fills it."""
    return nn.Embedding(entries, D, padding_idx, _weight=torch.empty(entries, D))


class SelfAttention(nn.Module):
    """attention.self, Eq. (1)-(5): every token looks at the tokens of its sequence."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = Linear(D, D)
        self.key = Linear(D, D)
        self.value = Linear(D, D)
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, X: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """Give H2 (B, T, D) for X (B, T, D); ``keep`` (B, 1, 1, T) is True at real tokens."""
        Q = self._split_heads(self.query(X))  # Eq. (1)  Q = W_q X + b_q      (B, A, T, Dh)
        K = self._split_heads(self.key(X))  # Eq. (2)  K = W_k X + b_k      (B, A, T, Dh)
        V = self._split_heads(self.value(X))  # Eq. (3)  V = W_v X + b_v      (B, A, T, Dh)
        # Eq. (4)  H1 = softmax(QKᵀ / √Dh) V
        # Eq. (5) as printed drops out H1; the checkpoint was trained with dropout on the softmax's
        # probabilities, inside Eq. (4). We follow the checkpoint, so H2 is H1 with its heads
        # joined.
        H1 = attention(Q, K, V, keep, dropout=self.dropout if self.training else 0.0)
        H2 = H1.transpose(1, 2).flatten(2)  # (B, T, D)
        return H2

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        return x.view(B, T, self.num_heads, D // self.num_heads).transpose(1, 2)  # (B, A, T, Dh)


class SelfOutput(nn.Module):
    """attention.output, Eq. (6)-(7): mix the heads and return to the residual stream."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.dense = Linear(D, D)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.LayerNorm = LayerNorm(D, config.layer_norm_eps)

    def forward(self, H2: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Give H4 (B, T, D) for H2 (B, T, D) and the layer's input X (B, T, D)."""
        H3 = self.dense(H2)  # Eq. (6)  H3 = W_m1 H2 + b_m1
        # Eq. (7) as printed is Dropout(LayerNorm(H3)), without the residual X. The checkpoint has
        # the residual, and dropout before it. We follow the checkpoint.
        H4: torch.Tensor = self.LayerNorm(self.dropout(H3) + X)
        return H4


class Attention(nn.Module):
    """The container of attention.self and attention.output; its names are the checkpoint's."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = SelfOutput(config)

    def forward(self, X: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """Give H4 (B, T, D) for X (B, T, D)."""
        H2 = self.self(X, keep)
        H4: torch.Tensor = self.output(H2, X)
        return H4


class Intermediate(nn.Module):
    """intermediate, Eq. (8): widen every token from D to F."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)

    def forward(self, H4: torch.Tensor) -> torch.Tensor:
        """Give H5 (B, T, F) for H4 (B, T, D)."""
        H5 = F.gelu(self.dense(H4))  # Eq. (8)  H5 = GELU(W_m2 H4 + b_m2), the exact (erf) form
        return H5


class Output(nn.Module):
    """output, Eq. (9)-(10): narrow from F to D and return to the residual stream."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, H5: torch.Tensor, H4: torch.Tensor) -> torch.Tensor:
        """Give H7 (B, T, D) for H5 (B, T, F) and the residual H4 (B, T, D)."""
        H6 = self.dense(H5)  # Eq. (9)  H6 = W_m3 H5 + b_m3
        # Eq. (10) as printed is Dropout(LayerNorm(H6)), without the residual H4. The checkpoint
        # has the residual, and dropout before it. We follow the checkpoint.
        H7: torch.Tensor = self.LayerNorm(self.dropout(H6) + H4)
        return H7


class Layer(nn.Module):
    """One encoder layer: attention.self, attention.output, intermediate, output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config)

    def forward(self, X: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """Give H7 (B, T, D), the next layer's X, for X (B, T, D)."""
        H4 = self.attention(X, keep)  # Eq. (1)-(7)
        H5 = self.intermediate(H4)  # Eq. (8)
        H7: torch.Tensor = self.output(H5, H4)  # Eq. (9)-(10)
        return H7


class Encoder(nn.Module):
    """The L layers, one after the other."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, X: torch.Tensor, keep: torch.Tensor | None, output_hidden_states: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Give the last layer's H7 (B, T, D) and, where asked for, all L + 1 hidden states."""
        hidden_states = [X] if output_hidden_states else []
        for layer in self.layer:
            X = layer(X, keep)
            if output_hidden_states:
                hidden_states.append(X)
        return X, tuple(hidden_states) or None


class Pooler(nn.Module):
    """The last hidden state of [CLS] -> tanh(W_p h + b_p)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """Give the pooled output (B, D) for (B, T, D)."""
        return torch.tanh(self.dense(last_hidden_state[:, 0]))


class BertOutput(NamedTuple):
    """What the encoder gives, under Hugging Face's names.

    Attributes
    ----------
    last_hidden_state : torch.Tensor, (B, T, D)
        H7 of the last layer.
    pooler_output : torch.Tensor, (B, D), or None
        The pooled [CLS]; None where the model was built without a pooler.
    hidden_states : tuple of torch.Tensor or None
        The embeddings and the L layers' H7, where they were asked for.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...] | None


class BertModel(nn.Module):
    """Embeddings, encoder and pooler.

    Parameters
    ----------
    config : BertConfig
        The sizes.
    add_pooler : bool
        Whether to build the pooler.
    """

    def __init__(self, config: BertConfig, add_pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooler else None
        initialise(self, config.initializer_range)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> BertOutput:
        """Encode a padded batch.

        Parameters
        ----------
        input_ids : torch.Tensor of int64, (B, T)
            Token ids.
        attention_mask : torch.Tensor, (B, T), optional
            1 (or True) at real tokens and 0 at padding; None means that all are real.
        token_type_ids : torch.Tensor of int64, (B, T), optional
            0 for the first text, 1 for the second; None means all 0.
        output_hidden_states : bool
            Whether to give the hidden states of all layers too.

        Returns
        -------
        BertOutput

        Raises
        ------
        ConfigError
            If shapes do not fit each other or the model, an id is outside its vocabulary, the mask
            holds more than 0 and 1, or a sequence has no real token. (Ids and masks that live on a
            GPU are not looked into, because that would stop the GPU at every step.)
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        self._check(input_ids, attention_mask, token_type_ids)
        keep = None  # (B, 1, 1, T)
        if attention_mask is not None:
            keep = attention_mask.to(torch.bool)[:, None, None, :]
        X = self.embeddings(input_ids, token_type_ids)
        last_hidden_state, hidden_states = self.encoder(X, keep, output_hidden_states)
        pooler_output = None if self.pooler is None else self.pooler(last_hidden_state)
        return BertOutput(last_hidden_state, pooler_output, hidden_states)

    def _check(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor,
    ) -> None:
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ConfigError(
                f"input_ids must be a batch of sequences, (B, T) with B and T at least 1, "
                f"found {tuple(input_ids.shape)}"
            )
        longest = self.config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise ConfigError(
                f"sequences of {input_ids.shape[1]} tokens do not fit the model's {longest} "
                f"positions; encode with max_length={longest} or less"
            )
        for name, tensor in (
            ("attention_mask", attention_mask),
            ("token_type_ids", token_type_ids),
        ):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ConfigError(
                    f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, "
                    f"found {tuple(tensor.shape)}"
                )
        if input_ids.device.type != "cpu":
            return
        for name, ids, size in (
            ("input_ids", input_ids, self.config.vocab_size),
            ("token_type_ids", token_type_ids, self.config.type_vocab_size),
        ):
            lowest, highest = int(ids.min()), int(ids.max())
            if lowest < 0 or highest >= size:
                raise ConfigError(
                    f"{name} must lie in 0 .. {size - 1}, found {lowest} .. {highest}; "
                    "is this the tokenizer of this model?"
                )
        if attention_mask is None:
            return
        if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
            raise ConfigError(
                "attention_mask must be 1 at real tokens and 0 at padding; this one holds other "
                "values, such as those that some programs add to the scores"
            )
        if not bool(attention_mask.any(dim=1).all()):
            raise ConfigError("every row of attention_mask needs at least one real token")


class BertForSequenceClassification(nn.Module):
    """BertModel, dropout, and a linear head: logits = W_c Dropout(pooled) + b_c.

    Parameters
    ----------
    config : BertConfig
        The sizes.
    num_labels : int
        C: the classes, or 1 for a score.
    """

    def __init__(self, config: BertConfig, num_labels: int = 2) -> None:
        super().__init__()
        if type(num_labels) is not int or num_labels < 1:
            raise ConfigError(f"num_labels must be a whole number of at least 1: {num_labels!r}")
        self.config = config
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(config.head_dropout_prob)
        self.classifier = Linear(config.hidden_size, num_labels)
        initialise(self.classifier, config.initializer_range)
        self.adaptation: Adaptation | None = None  # set by spafit.adapt

    @property
    def num_labels(self) -> int:
        """C, the rows of the classifier."""
        return self.classifier.weight.shape[0]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Give the logits (B, C) of a padded batch; arguments as for :class:`BertModel`."""
        pooled = self.bert(input_ids, attention_mask, token_type_ids).pooler_output  # (B, D)
        logits: torch.Tensor = self.classifier(self.dropout(pooled))
        return logits


def initialise(
    module: nn.Module, standard_deviation: float, generator: torch.Generator | None = None
) -> None:
    """Draw every matrix from N(0, σ²) and set biases to 0 and LayerNorms to identity.

    Parameters
    ----------
    module : nn.Module
        Its Linear, Embedding and LayerNorm parts are written to, in the order in which they were
        made. On the meta device there is nothing to write.
    standard_deviation : float
        σ, the configuration's ``initializer_range``.
    generator : torch.Generator, optional
        None takes torch's global one.
    """
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (Linear, nn.Embedding, LayerNorm)) and part.weight.is_meta:
                continue
            if isinstance(part, Linear):
                part.weight.normal_(0.0, standard_deviation, generator=generator)
                part.bias.zero_()
            elif isinstance(part, nn.Embedding):
                part.weight.normal_(0.0, standard_deviation, generator=generator)
                if part.padding_idx is not None:
                    part.weight[part.padding_idx].zero_()
            elif isinstance(part, LayerNorm):
                part.weight.fill_(1.0)
                part.bias.zero_()

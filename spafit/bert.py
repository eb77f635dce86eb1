"""BERT for sequence classification, its classes in the order of the forward pass.

Devlin et al. (2019), arXiv 1810.04805; the sub-layers, their names and the numbers of the equations
are those of the SPAFIT paper (Arora and Wang, 2024, arXiv 2405.00201, section 3.2). Attribute names
are the checkpoint's keys.

Legend: B batch, T tokens of the longest sequence, N tokens in all, D hidden, A heads, Dh = D / A
head size, F intermediate, L layers, C labels. H1 .. H7 are the paper's H_1 .. H_7; X is a layer's
input, the paper's x. W(X) is X Wᵀ, because tokens are rows. Hidden states have shape (N, D) without
padding or (B, T, D) with it: only ``layout`` tells the two apart, and shapes are written here as
(N, D).

Where the paper's printed equations and the checkpoint differ, we compute what the checkpoint was
trained with and say so at the line, as Eq. (5'), (7') and (10'); tests/test_equations.py tests each
such remark. H3 and H6, which the paper normalises before dropout and without a residual, therefore
do not occur here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spafit.adaptable import Dropout, LayerNorm, Linear, SublayerEnd, project
from spafit.adaptation import Adaptation
from spafit.config import BertConfig
from spafit.errors import ConfigError
from spafit.kernels.stacking import addresses, lay_together
from spafit.layout import (
    Layout,
    PackedBatch,
    Padded,
    Unchanged,
    Unpacking,
    check_packed,
    check_padded,
    pack,
)


class Embeddings(nn.Module):
    """Token ids (N,) -> the first hidden state (N, D).

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
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed ids (N,) or (B, T) as (N, D) or (B, T, D).

        ``position_ids`` has the same shape; without it the positions of each row are 0 to T - 1.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)  # (T,)
        X: torch.Tensor = (
            self.word_embeddings(input_ids)
            + self.token_type_embeddings(token_type_ids)
            + self.position_embeddings(position_ids)
        )  # (N, D)
        # Eq. (X)  X = Dropout(LayerNorm(word + position + token type))
        X = self.dropout(self.LayerNorm(X))
        return X


def _embedding(entries: int, D: int, padding_idx: int | None = None) -> nn.Embedding:
    """Make a table without values: :func:`initialise` draws them, or a checkpoint fills it."""
    return nn.Embedding(entries, D, padding_idx, _weight=torch.empty(entries, D))


class SelfAttention(nn.Module):
    """attention.self, Eq. (1)-(5): multi-head self-attention within each sequence.

    W_q, W_k and W_v lie side by side in memory, and so do their LoRA matrices A and B: Eq. (1)-(3)
    are then one product with one matrix (3·D, D), which is faster than three. Each is still a
    tensor with a storage of its own; see :mod:`spafit.kernels.stacking`.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = Linear(D, D)
        self.key = Linear(D, D)
        self.value = Linear(D, D)
        self.dropout = config.attention_probs_dropout_prob
        self.impl = "auto"  # the form of the kernel; see set_impl
        self.lay_side_by_side()

    def lay_side_by_side(self) -> None:
        """Move the matrices of query, key and value so that they lie side by side in memory.

        This is called where their memory is allocated, never in ``forward``. Matrices whose memory
        a user arranged differently are not moved; ``forward`` then works on a copy of them.
        """
        for matrices in self._matrices():
            lay_together(matrices)

    def _matrices(self) -> list[list[nn.Parameter]]:
        """Return the W, the A and the B of query, key and value, as far as they are parameters."""
        # Not by attribute: a parametrized or replaced map lacks it, or computes it at each access.
        maps = [getattr(each, "_parameters", {}) for each in (self.query, self.key, self.value)]
        found = ([each.get(name) for each in maps] for name in ("weight", "lora_A", "lora_B"))
        return [[each for each in matrices if each is not None] for matrices in found]

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> SelfAttention:
        """Move or cast the parameters, as ``to`` does, and lay the moved ones side by side."""
        before = [addresses(matrices) for matrices in self._matrices()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for matrices, were in zip(self._matrices(), before, strict=True):
            if addresses(matrices) != were:
                lay_together(matrices)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a copied or unpickled state, and lay its matrices side by side."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A tensor on a GPU may be shared with another process, which cannot be detected: leave it.
        if not any(each.is_cuda for matrices in self._matrices() for each in matrices):
            self.lay_side_by_side()

    def forward(self, X: torch.Tensor, layout: Layout, first_only: bool = False) -> torch.Tensor:
        """Return H2 (N, D) for X (N, D); with ``first_only`` (B, D), for the first tokens alone."""
        rate = self.dropout if self.training else 0.0
        # Eq. (1)  Q = W_q(X) + b_q
        # Eq. (2)  K = W_k(X) + b_k
        # Eq. (3)  V = W_v(X) + b_v
        # Eq. (4)  H1 = Multihead_attention(Q, K, V): in each head softmax(QKᵀ / √Dh) V
        # Eq. (5)  H2 = Dropout(H1), as printed
        # The checkpoint was trained with dropout on the probabilities instead, inside Eq. (4):
        # Eq. (5')  H2 = H1 = Dropout(softmax(QKᵀ / √Dh)) V
        if first_only:
            Q = self.query(layout.first(X))  # (B, D)
            KV = project(X, [self.key, self.value])  # (N, 2·D)
            return layout.attend_first(Q, KV, self.num_heads, rate, self.impl)
        QKV = project(X, [self.query, self.key, self.value])  # (N, 3·D)
        H2 = layout.attend(QKV, self.num_heads, rate, self.impl)  # (N, D)
        return H2


class SelfOutput(SublayerEnd):
    """attention.output, Eq. (6)-(7): a linear map of the joined heads, dropout, LayerNorm."""

    merges = ()  # an adapter that is added here has no merged form

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.dense = Linear(D, D)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.LayerNorm = LayerNorm(D, config.layer_norm_eps)

    def forward(self, H2: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Return H4 (N, D) for H2 (N, D) and the residual X (N, D), the layer's input."""
        # Eq. (6)  H3 = LayerNorm(W_3(H2) + b_3), as printed
        # Eq. (7)  H4 = Dropout(H3), as printed
        # The checkpoint was trained with dropout first, then the residual X, then LayerNorm:
        # Eq. (7')  H4 = LayerNorm(Dropout(W_3(H2) + b_3) + X)
        H4 = self.add_norm(self.dense(H2), X)  # adapters, if any, stand before the residual
        return H4


class Attention(nn.Module):
    """The attention sub-layer, Eq. (1)-(7): attention.self, then attention.output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = SelfOutput(config)

    def forward(self, X: torch.Tensor, layout: Layout, first_only: bool = False) -> torch.Tensor:
        """Return H4 (N, D) for X (N, D); with ``first_only`` (B, D)."""
        H2 = self.self(X, layout, first_only)
        H4: torch.Tensor = self.output(H2, layout.first(X) if first_only else X)
        return H4


class Intermediate(nn.Module):
    """intermediate, Eq. (8): the first map of the feed-forward network, from D to F, and GELU."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)

    def forward(self, H4: torch.Tensor) -> torch.Tensor:
        """Return H5 (N, F) for H4 (N, D)."""
        # Eq. (8)  H5 = GELU(W_5(H4) + b_5), in the exact (erf) form
        H5 = project(H4, [self.dense], gelu=True)
        return H5


class Output(SublayerEnd):
    """output, Eq. (9)-(10): the second feed-forward map, from F to D, dropout, LayerNorm."""

    merges = ()  # an adapter that is added here has no merged form

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.intermediate_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, H5: torch.Tensor, H4: torch.Tensor) -> torch.Tensor:
        """Return H7 (N, D) for H5 (N, F) and the residual H4 (N, D)."""
        # Eq. (9)   H6 = LayerNorm(W_6(H5) + b_6), as printed
        # Eq. (10)  H7 = Dropout(H6), as printed
        # The checkpoint was trained with dropout first, then the residual H4, then LayerNorm:
        # Eq. (10')  H7 = LayerNorm(Dropout(W_6(H5) + b_6) + H4)
        H7 = self.add_norm(self.dense(H5), H4)  # adapters, if any, stand before the residual
        return H7


class Layer(nn.Module):
    """One encoder layer: attention.self, attention.output, intermediate, output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config)

    @property
    def dropout(self) -> tuple[float, ...]:
        """The rates of dropout of the attention's probabilities and of the two sub-layers."""
        return self.attention.self.dropout, self.attention.output.dropout.p, self.output.dropout.p

    @dropout.setter
    def dropout(self, rates: tuple[float, ...]) -> None:
        attention = self.attention
        attention.self.dropout, attention.output.dropout.p, self.output.dropout.p = rates

    def forward(self, X: torch.Tensor, layout: Layout, first_only: bool = False) -> torch.Tensor:
        """Return H7 (N, D), the next layer's X, for X (N, D).

        With ``first_only`` H7 is (B, D), computed for each sequence's first token alone. That is
        all that the pooler reads, and of the layer's matrix products it takes only K and V, a
        sixth, over all tokens.
        """
        H4 = self.attention(X, layout, first_only)  # Eq. (1)-(7)
        H5 = self.intermediate(H4)  # Eq. (8)
        H7: torch.Tensor = self.output(H5, H4)  # Eq. (9)-(10)
        return H7


class Encoder(nn.Module):
    """The stack of L layers.

    Attributes
    ----------
    recomputed : set of int
        Numbers of the layers that keep only their input in training and are recomputed in backward
        (activation checkpointing): less memory for one more forward pass of these layers. Dropout
        draws the same masks again.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.recomputed: set[int] = set()

    def forward(
        self,
        X: torch.Tensor,
        layout: Layout,
        *,
        start: int = 0,
        stop: int | None = None,
        first_only: bool = False,
        output_hidden_states: bool = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run layers ``start`` to ``stop - 1``, all of them by default.

        Returns H7 of the last of them, (N, D) or with ``first_only`` (B, D); and X and the H7 of
        each layer if ``output_hidden_states`` is set, else an empty list.
        """
        stop = len(self.layer) if stop is None else stop
        hidden_states = [X] if output_hidden_states else []
        for number in range(start, stop):
            layer = self.layer[number]
            last_rows = first_only and number == len(self.layer) - 1
            if number in self.recomputed and torch.is_grad_enabled():
                # The reentrant form loses all gradients if X itself needs none, as it does after
                # frozen layers.
                X = checkpoint(layer, X, layout, last_rows, use_reentrant=False)
            else:
                X = layer(X, layout, last_rows)
            if output_hidden_states:
                hidden_states.append(X)
        return X, hidden_states


class Pooler(nn.Module):
    """tanh(W_p(h) + b_p), where h is the last hidden state of [CLS]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        """Return the pooled output (B, D) for the first tokens' last hidden states (B, D)."""
        # Eq. (pooled)  pooled = tanh(W_p(h) + b_p)
        return torch.tanh(self.dense(first))


class BertOutput(NamedTuple):
    """The outputs of :class:`BertModel`, under Hugging Face's names.

    Attributes
    ----------
    last_hidden_state : torch.Tensor, (B, T, D)
        H7 of the last layer; 0 at padding, which is not computed. (If a sequence begins with
        padding, the batch stays padded and padding is computed too, because the pooler reads the
        first position.)
    pooler_output : torch.Tensor, (B, D), or None
        The pooled [CLS]; None if the model was built without a pooler.
    hidden_states : tuple of torch.Tensor or None
        The embeddings and the H7 of all L layers, each (B, T, D), if they were asked for; at
        padding as above. ``hidden_states[l][:, 0]`` is [CLS] after l layers, in every form.
    attentions : tuple of torch.Tensor or None
        The attention probabilities of all L layers, each (B, A, T, T), if they were asked for: what
        V is multiplied by, in training after dropout. They are 0 at keys that are padding.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None = None


class BertModel(nn.Module):
    """Embeddings, encoder and pooler.

    Parameters
    ----------
    config : BertConfig
        The sizes.
    add_pooler : bool
        Whether to build the pooler.

    Attributes
    ----------
    packed : bool
        Whether padded input is packed inside, so that nothing is computed for padding; see
        :func:`set_impl`.
    """

    def __init__(self, config: BertConfig, add_pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooler else None
        self.packed = True
        initialise(self, config.initializer_range)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
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
        output_attentions : bool
            Whether to give the attention probabilities of all layers too. Only the plain form has
            them: ``spafit.set_impl(model, "reference")``.

        Returns
        -------
        BertOutput

        Raises
        ------
        ConfigError
            If types or shapes do not fit each other or the model, an id is outside its vocabulary,
            the mask holds other values than 0 and 1, or a sequence has no real token. (Values of
            ids and masks on a GPU are not checked, because the host would wait for it at every
            step.) If attention probabilities are asked for in another form than the plain one, or a
            layer with an attention of the user's own does not give any.
        """
        tokens, layout, back = self.lay_out(input_ids, attention_mask, token_type_ids)
        probabilities: list[torch.Tensor] = []
        if output_attentions:
            self._require_plain_attention()
            assert isinstance(layout, Padded)
            layout.probabilities = probabilities
        X = self.embeddings(*tokens)
        X, states = self.encoder(X, layout, output_hidden_states=output_hidden_states)
        pooled = None
        if self.pooler is not None:
            pooled = back.per_sequence(self.pooler(layout.first(X)))
        if output_attentions and len(probabilities) != len(self.encoder.layer):
            raise ConfigError(
                f"{len(probabilities)} of {len(self.encoder.layer)} layers gave attention "
                "probabilities; an attention of your own gives them by layout.attend"
            )
        return BertOutput(
            back.hidden(X),
            pooled,
            tuple(map(back.hidden, states)) or None,
            tuple(probabilities) or None,
        )

    def pooled(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the pooled output (B, D) alone, for which the last layer computes fewer rows.

        Arguments and errors as for :meth:`forward`.
        """
        tokens, layout, back = self.lay_out(input_ids, attention_mask, token_type_ids)
        # The plain form (see set_impl) computes the last layer for all tokens.
        X, _ = self.encoder(self.embeddings(*tokens), layout, first_only=self.packed)
        return back.per_sequence(self.pool(X if self.packed else layout.first(X)))

    def pooled_packed(self, batch: PackedBatch, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """Return the pooled output (B, D) of a packed batch, in its order.

        Parameters
        ----------
        batch : PackedBatch
            From :meth:`spafit.text.tokenization.Encodings.packed`.
        prefix : torch.Tensor, (N, D) or (B, D), optional
            What :meth:`prefix` gave for this batch, from which the model continues.

        Raises
        ------
        ConfigError
            If a sequence is longer than the model's positions, ids or prefix have another type or
            shape, or (on a CPU, where checking is cheap) an id is outside its vocabulary.
        """
        start = 0 if prefix is None else self.frozen_depth
        check_packed(self.config, batch, prefix, per_sequence=start == len(self.encoder.layer))
        if prefix is not None and start == len(self.encoder.layer) and self.is_frozen:
            return prefix
        X = self.embeddings(*batch[:3]) if prefix is None else prefix  # (N, D), or (B, D) after L
        first, _ = self.encoder(X, batch.layout, start=start, first_only=True)  # (B, D)
        return self.pool(first)

    @property
    def device(self) -> torch.device:
        """The device of the weights, of the first where they lie on several."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the weights, of the first where they have several."""
        return next(self.parameters()).dtype

    @property
    def frozen_depth(self) -> int:
        """The number of layers below the first one in which anything trains.

        It is 0 if the embeddings train, because every hidden state then changes with them.
        """
        if any(parameter.requires_grad for parameter in self.embeddings.parameters()):
            return 0
        depth = 0
        for layer in self.encoder.layer:
            if any(parameter.requires_grad for parameter in layer.parameters()):
                break
            depth += 1
        return depth

    @property
    def is_frozen(self) -> bool:
        """Whether nothing here trains: whatever does is a head on the pooled output."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def freeze_dropout(self) -> None:
        """Switch dropout off in all that :meth:`prefix` computes."""
        depth = self.frozen_depth
        if depth:
            self.embeddings.eval()
        for layer in self.encoder.layer[:depth]:
            layer.eval()
        if self.pooler is not None and self.is_frozen:
            self.pooler.eval()

    @torch.no_grad()
    def prefix(self, batch: PackedBatch) -> torch.Tensor:
        """Return the output of group 1, the embeddings and the layers below the first that trains.

        It is the hidden states (N, D). If no layer trains, it is what the rest reads of them alone:
        [CLS], (B, D), or if the pooler does not train either, the pooled output (B, D). It is
        computed with dropout unless these parts are in evaluation mode.
        """
        X = self.embeddings(*batch[:3])
        X, _ = self.encoder(X, batch.layout, stop=self.frozen_depth, first_only=True)
        return self.pool(X) if self.is_frozen else X

    def pool(self, first: torch.Tensor) -> torch.Tensor:
        """Return the pooled output (B, D) for the last hidden states of the first tokens (B, D).

        Raises
        ------
        ConfigError
            If the model was built without a pooler.
        """
        if self.pooler is None:
            raise ConfigError("this model was built without a pooler (add_pooler=False)")
        pooled: torch.Tensor = self.pooler(first)
        return pooled

    def _require_plain_attention(self) -> None:
        attentions = [each for each in self.modules() if isinstance(each, SelfAttention)]
        if self.packed or any(each.impl != "reference" for each in attentions):
            raise ConfigError(
                "only the plain form holds attention probabilities; call "
                'spafit.set_impl(model, "reference") before asking for output_attentions'
            )

    def lay_out(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
    ) -> tuple[tuple[torch.Tensor, ...], Layout, Unpacking | Unchanged]:
        """Check a padded batch; return the embeddings' inputs, its layout, and how to unpack it."""
        check_padded(self.config, input_ids, attention_mask, token_type_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        keep = None if attention_mask is None else attention_mask.to(torch.bool)
        # Not packed if a row begins with padding, because the pooler reads the first position.
        if self.packed and (keep is None or bool(keep[:, 0].all())):
            pad_id = self.config.pad_token_id or 0
            batch, back = pack(input_ids, keep, token_type_ids, pad_id)
            return batch[:3], batch.layout, back
        return (input_ids, token_type_ids), Padded(keep), Unchanged()


class ClassifierOutput(NamedTuple):
    """What :class:`BertForSequenceClassification` gives if it is asked for more than logits.

    Attributes
    ----------
    logits : torch.Tensor, (B, C)
        The head's output.
    hidden_states, attentions : tuple of torch.Tensor or None
        As in :class:`BertOutput`.
    """

    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


class BertForSequenceClassification(nn.Module):
    """BertModel, dropout, and a linear head: logits = W_c(Dropout(pooled)) + b_c.

    Parameters
    ----------
    config : BertConfig
        The sizes.
    num_labels : int
        C, the number of classes, or 1 for a regression score.
    """

    def __init__(self, config: BertConfig, num_labels: int = 2) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(config.head_dropout_prob)
        self.classifier = new_head(config, num_labels)
        self.adaptation: Adaptation | None = None  # the one in use; see spafit.use
        self.adaptations: dict[str, Adaptation] = {}  # all, by name; set by spafit.adapt
        self.mix: object = None  # all at once; made by spafit.trunk.batches where it is needed

    @property
    def num_labels(self) -> int:
        """C, the number of logits."""
        return self.classifier.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the encoder; see :attr:`BertModel.device`."""
        return self.bert.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the encoder; see :attr:`BertModel.dtype`."""
        return self.bert.dtype

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> torch.Tensor | ClassifierOutput:
        """Return the logits (B, C) of a padded batch; arguments and errors as :class:`BertModel`'s.

        Returns
        -------
        torch.Tensor or ClassifierOutput
            The logits alone, or with the hidden states or attention probabilities that were asked
            for. With these the last layer is computed for all tokens, so that the logits of a fast
            form are equal to rounding only.
        """
        batch = (input_ids, attention_mask, token_type_ids)
        if not (output_hidden_states or output_attentions):
            # Eq. (logits)  logits = W_c(Dropout(pooled)) + b_c
            logits: torch.Tensor = self.classifier(self.dropout(self.bert.pooled(*batch)))
            return logits
        out = self.bert(
            *batch, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        logits = self.classifier(self.dropout(out.pooler_output))
        return ClassifierOutput(logits, out.hidden_states, out.attentions)

    def forward_packed(
        self, batch: PackedBatch, prefix: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits (B, C) of a packed batch, in its order.

        Parameters
        ----------
        batch : PackedBatch
            From :meth:`spafit.text.tokenization.Encodings.packed`, on the model's device.
        prefix : torch.Tensor, (N, D) or (B, D), optional
            The output of group 1 (:meth:`BertModel.prefix`), from which to continue.
        """
        pooled = self.bert.pooled_packed(batch, prefix)  # (B, D)
        logits: torch.Tensor = self.classifier(self.dropout(pooled))
        return logits

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> BertForSequenceClassification:
        """Move or cast all parameters, as ``to`` does: also those that are not in use."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = {each: each for each in self.parameters()}  # from old to new parameters
        others = [each for one in self._every_adaptation() for each in one.modules()]
        for module in dict.fromkeys(others).keys() - set(self.modules()):
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else fn(buffer)
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if parameter not in moved:
                    values, grad = fn(parameter.detach()), parameter.grad
                    if torch._has_compatible_shallow_copy_type(parameter, values):
                        parameter.data = values
                        moved[parameter] = parameter
                    else:  # as from the meta device
                        moved[parameter] = nn.Parameter(values, parameter.requires_grad)
                    if grad is not None:
                        moved[parameter].grad = fn(grad)
                module._parameters[key] = moved[parameter]
        self._lay_adapters_side_by_side()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a copied or unpickled state, and lay the matrices that are not in use together."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not any(each.is_cuda for each in self.parameters()):  # as SelfAttention.__setstate__
            self._lay_adapters_side_by_side()

    def _every_adaptation(self) -> list[Adaptation]:
        """Return all adaptations, those of which a merged form stands in their place included."""
        known = self.adaptations.values()
        return [*known, *(each.merged_from for each in known if each.merged_from is not None)]

    def _lay_adapters_side_by_side(self) -> None:
        """Lay query, key and value side by side, also where they are not in use."""
        used = self.adaptation
        others = [each for each in self._every_adaptation() if each is not used]
        if used is not None and others:
            used.take(self)
        for other in others:
            other.put(self)
            lay_side_by_side(self)
            other.take(self)
        if used is not None and others:
            used.put(self)


def new_head(
    config: BertConfig, num_labels: int, generator: torch.Generator | None = None
) -> Linear:
    """Return a head for C labels, drawn as by :func:`initialise`."""
    if type(num_labels) is not int or num_labels < 1:
        raise ConfigError(f"num_labels must be a whole number of at least 1: {num_labels!r}")
    head = Linear(config.hidden_size, num_labels)
    initialise(head, config.initializer_range, generator)
    return head


def lay_side_by_side(model: nn.Module) -> None:
    """Lay query, key and value side by side in every layer; see :class:`SelfAttention`."""
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.lay_side_by_side()


def set_impl(model: nn.Module, impl: str) -> None:
    """Choose the form in which a model computes: the plain one, or a fast one.

    Parameters
    ----------
    model : nn.Module
        A model of this module, or a part of one.
    impl : {"auto", "fused", "triton", "reference"}
        ``"reference"``: padded batches, and every operation written out as its equation, as
        Hugging Face computes it; it can be differentiated twice, hooks on the sub-modules see
        tensors (B, T, ...), and attention probabilities can be had (``output_attentions=True``).
        ``"auto"``, the default: packed batches and the best form of every operation that the
        machine has; hooks see tensors (N, ...) of the real tokens, except for the last layer, which
        may compute [CLS] alone. ``"fused"``: as ``"auto"``, but an operation without a fused form
        for the tensors at hand raises. ``"triton"``: the Triton kernels for linear maps, for
        attention over packed sequences, and for dropout with LayerNorm; dropout alone, which has
        none, is as in ``"auto"``.

    Raises
    ------
    ConfigError
        If ``impl`` is not one of the four.
    """
    if impl not in ("auto", "fused", "triton", "reference"):
        raise ConfigError(
            f'there is no impl={impl!r}; choose "auto", "fused", "triton" or "reference"'
        )
    for module in model.modules():
        if isinstance(module, (Linear, LayerNorm, SelfAttention)):
            module.impl = impl
        elif isinstance(module, Dropout):
            module.impl = "auto" if impl == "triton" else impl
        elif isinstance(module, BertModel):
            module.packed = impl != "reference"


def initialise(
    module: nn.Module, standard_deviation: float, generator: torch.Generator | None = None
) -> None:
    """Draw every matrix from N(0, σ²) and set biases to 0 and LayerNorms to identity.

    Parameters
    ----------
    module : nn.Module
        Its Linear, Embedding and LayerNorm modules are initialised in the order of
        ``module.modules()``; those on the meta device are left out.
    standard_deviation : float
        σ, the configuration's ``initializer_range``.
    generator : torch.Generator, optional
        None uses torch's global generator.
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

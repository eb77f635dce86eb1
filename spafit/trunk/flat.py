"""The forward pass of a model that only predicts, on a CPU: one flat loop over tensors.

Its plain form is :meth:`spafit.bert.BertForSequenceClassification.forward_packed` in evaluation
mode. What is decided there at each call is decided here once: adapters are merged into the weights,
query, key and value are one matrix, and matrices are rounded to the type of the products and laid
out as the library of products reads them fastest. The model itself is not changed, and may use
another adapter afterwards. It is not to be trained on meanwhile, because what needs no other form
is shared with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from spafit import bert
from spafit.adaptable import Adaptable, Dropout, LayerNorm, Linear, can_be_bypassed
from spafit.errors import PlanError
from spafit.kernels.products import LaidOut
from spafit.kernels.stacking import stacked
from spafit.layout import PackedBatch, check_packed
from spafit.trunk.merging import to_be_merged

_OURS = (
    *(bert.BertForSequenceClassification, bert.BertModel, bert.Embeddings, bert.Encoder),
    *(bert.Layer, bert.Attention, bert.SelfAttention, bert.SelfOutput, bert.Intermediate),
    *(bert.Output, bert.Pooler, nn.Embedding, nn.ModuleList, nn.Dropout, Dropout),
)
"""The classes whose ``forward`` stands here once more."""


class _Norm(NamedTuple):
    """LayerNorm with γ, β and eps; the sums are in float32."""

    gamma: torch.Tensor
    beta: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(x, self.gamma.shape, self.gamma, self.beta, self.eps)


class _Layer(NamedTuple):
    """The maps of a layer; of Q, K and V one, but in the last layer that of Q and that of K, V."""

    QKV: list[LaidOut]
    dense: LaidOut
    norm: _Norm
    up: LaidOut
    down: LaidOut
    last_norm: _Norm


def why_not_flat(model: bert.BertForSequenceClassification) -> str:
    """Return why :class:`FlatModel` would not compute what a model computes, or ""."""
    kinds = {(each.device.type, each.dtype) for each in model.parameters()}
    if kinds not in ({("cpu", torch.float32)}, {("cpu", torch.float64)}):
        return "it is not on a CPU, in float32 or float64"
    inside: set[nn.Module] = set()  # what is merged, or else refused
    for name, module in model.named_modules():
        if isinstance(module, Adaptable):
            if getattr(module, "impl", "auto") not in ("auto", "fused"):
                return f"{name} has another form"
            inside.update(module.modules())
        if isinstance(module, (Linear, LayerNorm)) or (
            module in inside and type(module) not in _OURS
        ):
            continue
        replaced = any(callable(getattr(type(module), each, None)) for each in vars(module))
        if type(module) not in _OURS or replaced or not can_be_bypassed(module):
            return f"{name or 'the model'}, a {type(module).__name__}, may compute something else"
    try:
        to_be_merged(model)
    except PlanError as error:
        return str(error)
    return ""


class FlatModel:
    """The forward pass of a model that only predicts.

    Parameters
    ----------
    model : BertForSequenceClassification
        One for which :func:`why_not_flat` gives no reason.
    dtype : torch.dtype, optional
        Of the matrices: that of the model, or bfloat16. What a product takes and gives is then
        rounded to bfloat16, too; residuals, LayerNorm, attention and the head are in float32.
    """

    @torch.no_grad()
    def __init__(
        self, model: bert.BertForSequenceClassification, dtype: torch.dtype | None = None
    ) -> None:
        dtype = model.dtype if dtype is None else dtype
        adapted = set(to_be_merged(model).values())
        embeddings, pooler = model.bert.embeddings, model.bert.pooler
        assert pooler is not None

        def tensors(module: Linear | LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
            if module in adapted:
                merged = module.merged()
                return merged["weight"], merged["bias"]
            return module.weight.detach(), module.bias.detach()

        def norm(module: LayerNorm) -> _Norm:
            return _Norm(*tensors(module), module.eps)

        def laid_out(*maps: Linear) -> LaidOut:
            weights, biases = zip(*map(tensors, maps), strict=True)
            return LaidOut(stacked(weights), torch.cat(biases), dtype)

        def of_layer(layer: Any, is_last: bool) -> _Layer:
            attention, output = layer.attention.self, layer.attention.output
            Q, K, V = attention.query, attention.key, attention.value
            return _Layer(
                [laid_out(Q), laid_out(K, V)] if is_last else [laid_out(Q, K, V)],
                laid_out(output.dense),
                norm(output.LayerNorm),
                laid_out(layer.intermediate.dense),
                laid_out(layer.output.dense),
                norm(layer.output.LayerNorm),
            )

        self.config, self.dtype = model.config, dtype
        self._tables = [
            table.weight.detach()
            for table in (
                embeddings.word_embeddings,
                embeddings.token_type_embeddings,
                embeddings.position_embeddings,
            )
        ]
        self._norm = norm(embeddings.LayerNorm)
        layers = list(model.bert.encoder.layer)
        self._layers = [of_layer(layer, layer is layers[-1]) for layer in layers]
        self._pooler, self._head = laid_out(pooler.dense), tensors(model.classifier)

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Return the logits (B, C) of a packed batch, in its order."""
        check_packed(self.config, batch, None)
        layout, A = batch.layout, self.config.num_attention_heads
        word, kind, position = map(F.embedding, batch[:3], self._tables)
        X = self._norm(word.add_(kind).add_(position))  # (N, D)
        narrow, wide = self.dtype, X.dtype
        for QKV, dense, norm, up, down, last_norm in self._layers:
            if len(QKV) == 1:
                H2 = layout.attend(QKV[0](X.to(narrow)), A)  # (N, D)
            else:  # the last layer, of which the pooler reads the first tokens alone
                first = layout.first(X)  # (B, D)
                Q, KV = QKV[0](first.to(narrow)), QKV[1](X.to(narrow))
                H2, X = layout.attend_first(Q.to(wide), KV.to(wide), A), first
            H4 = norm(X + dense(H2.to(narrow)))
            H5 = up(H4.to(narrow), gelu=True)
            X = last_norm(H4 + down(H5))
        pooled = torch.tanh(self._pooler(X.to(narrow)).to(wide))
        return F.linear(pooled, *self._head)

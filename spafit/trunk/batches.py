"""One trunk, many tasks: several adapters of one model on the sequences of one batch.

The layers below the first that an adapter changes are those of the pre-trained model, and are
computed once for all adapters. Above, there are two ways to the same numbers:

- in turn, one adapter after the other;
- mixed: the rows of all adapters in one batch, those of an adapter side by side. A product with a
  pre-trained matrix is computed once for the rows of all; only what was added to it differs. Where
  adapters have few rows each, reading the matrices takes longest, and mixed they are read once.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from spafit.adaptable import (
    LayerNorm,
    Linear,
    SublayerEnd,
    add_norm,
    can_be_bypassed,
    can_be_stacked,
)
from spafit.adaptation import Adaptation, Place, twin
from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError, PlanError
from spafit.kernels import Part, stacked_linear
from spafit.layout import Packed, PackedBatch, Unpacking, check_packed
from spafit.strata import named_adapter, use, using

MIXED_BELOW = 512
"""Adapters with fewer tokens each, in the mean, are mixed; see benchmarks/many_tasks.py."""

T = TypeVar("T")


def forward_tasks(
    model: BertForSequenceClassification,
    batch: PackedBatch,
    sequences: Mapping[str, Sequence[int]],
    *,
    mixed: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Return the logits of each of several adapters for its sequences of one batch.

    They are those of the adapter by itself, but for rounding.

    Parameters
    ----------
    model : BertForSequenceClassification
        A model with these adapters. The one in use is in use again afterwards.
    batch : PackedBatch
        All sequences, on the model's device.
    sequences : mapping of str to sequence of int
        For each adapter, by its name, the numbers of its sequences in the batch. A sequence may be
        for any number of adapters.
    mixed : bool, optional
        Whether the adapters are mixed, in evaluation mode, or computed in turn; None chooses by
        their tokens.

    Returns
    -------
    dict of str to torch.Tensor, (n, C)
        The logits of each adapter's n sequences, in their order; C is its number of labels.

    Raises
    ------
    PlanError
        If there is no adapter of a name, the one in use cannot be taken out (:func:`spafit.use`),
        or they are to be mixed and one is of a kind that cannot be.
    ConfigError
        If the batch does not fit the model, or has no sequence of a number.
    """
    adapters = {name: named_adapter(model, name) for name in sequences}
    check_packed(model.config, batch, None)
    if not adapters:
        return {}
    if mixed and model.training:
        raise PlanError(
            "adapters are mixed in evaluation mode alone; call model.eval(), or give mixed=False"
        )
    lengths = batch.layout.lengths
    for name, numbers in sequences.items():
        if not len(numbers) or not all(0 <= each < len(lengths) for each in numbers):
            raise ConfigError(
                f"the adapter {name!r:.200} needs one or more sequences from 0 to "
                f"{len(lengths) - 1}, found {list(numbers)!r:.80}"
            )
    with using(model, None):
        if mixed is None:
            tokens = sum(lengths[number] for numbers in sequences.values() for number in numbers)
            few = len(sequences) > 1 and tokens < MIXED_BELOW * len(sequences)
            mixed = few and not model.training and not _mix_of(model).why_not
        return (_mixed if mixed else _in_turn)(model, batch, adapters, sequences)


def _in_turn(
    model: BertForSequenceClassification,
    batch: PackedBatch,
    adapters: Mapping[str, Adaptation],
    sequences: Mapping[str, Sequence[int]],
) -> dict[str, torch.Tensor]:
    """Compute one adapter after the other, and the pre-trained layers up to its first between."""
    bert, logits = model.bert, dict.fromkeys(adapters, torch.empty(0))
    X, depth = bert.embeddings(*batch[:3]), 0
    depths = {  # dropout of a plan's own is also in the layers below
        name: 0 if model.training and each.dropout else each.depth
        for name, each in adapters.items()
    }
    for name in sorted(adapters, key=depths.__getitem__):
        start, depth = depth, depths[name]
        X, _ = bert.encoder(X, batch.layout, start=start, stop=depth, first_only=True)
        with using(model, name):
            pooled = _pooled(model, batch, X, depth, sequences[name])
            logits[name] = model.classifier(model.dropout(pooled))
    return logits


def _mixed(
    model: BertForSequenceClassification,
    batch: PackedBatch,
    adapters: Mapping[str, Adaptation],
    sequences: Mapping[str, Sequence[int]],
) -> dict[str, torch.Tensor]:
    """Compute all adapters at once, from the first layer that one of them adapts."""
    mix = _mix_of(model)
    if mix.why_not:
        raise PlanError(f"the adapters cannot be mixed, because {mix.why_not}; give mixed=False")
    numbers = [list(sequences.get(name, ())) for name in mix.names]
    together = list(itertools.chain(*numbers))
    depth = min(each.depth for each in adapters.values())
    X = model.bert.embeddings(*batch[:3])
    X, _ = model.bert.encoder(X, batch.layout, stop=depth, first_only=True)
    lengths = batch.layout.lengths
    mix.rows.divide([[lengths[each] for each in some] for some in numbers])
    with mix.put(model):
        pooled = _pooled(model, batch, X, depth, together)
    parts = torch.split(pooled, [len(some) for some in numbers])
    found = dict(zip(mix.names, parts, strict=True))
    return {name: each.head(model.dropout(found[name])) for name, each in adapters.items()}


def _pooled(
    model: BertForSequenceClassification,
    batch: PackedBatch,
    X: torch.Tensor,
    depth: int,
    sequences: Sequence[int],
) -> torch.Tensor:
    """Return the pooled output (n, D) of some sequences by the layers from ``depth`` on.

    X are the hidden states (N, D) of the batch there, or after all layers (B, D).
    """
    bert = model.bert
    part, rows = batch.taken(sequences)
    if depth == 0:  # an adapter may train the embeddings
        H = bert.embeddings(*part[:3])
    elif depth < len(bert.encoder.layer):
        H = X.index_select(0, rows)
    else:
        H = X.index_select(0, torch.tensor(sequences, device=X.device))
    first, _ = bert.encoder(H, part.layout, start=depth, first_only=True)
    return bert.pool(first)


class _Rows:
    """Which rows of the tensors of a mixed batch belong to which adapter."""

    def divide(self, lengths: Sequence[Sequence[int]]) -> None:
        """Give each adapter as many sequences, of these lengths, one adapter after the other."""
        self.sequences = [0, *itertools.accumulate(map(len, lengths))]
        self.tokens = [0, *itertools.accumulate(map(sum, lengths))]

    def of(self, members: Sequence[T], x: torch.Tensor) -> list[tuple[T, slice]]:
        """Return the members that have rows of a tensor, (N, ...) or (B, ...), each with its rows.

        There is a member for each adapter. Rows of no sequence are the last adapter's.
        """
        ends = list(self.sequences if len(x) == self.sequences[-1] else self.tokens)
        ends[-1] = len(x)
        pairs = zip(members, itertools.pairwise(ends), strict=True)
        return [(member, slice(start, end)) for member, (start, end) in pairs if start < end]


class _Mixed(nn.Module):
    """In the place of a module: that of each adapter, on the adapter's own rows.

    Parameters
    ----------
    rows : _Rows
        The rows of each adapter.
    members : sequence of nn.Module
        The module of each adapter. They are no children: their modes and types are kept by
        :func:`spafit.use`.
    """

    def __init__(self, rows: _Rows, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.rows, self.members = rows, tuple(members)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return what each member makes of its rows of the inputs, (rows, ...)."""
        return torch.cat(
            [
                member(*(each[some] for each in inputs))
                for member, some in self.rows.of(self.members, inputs[0])
            ]
        )


class _MixedLinear(_Mixed):
    """y = x Wᵀ + b for all rows; then for each adapter's own + δ + s (x Aᵀ) Bᵀ, and l ⊙ y."""

    def __init__(self, rows: _Rows, members: Sequence[nn.Module], base: Linear) -> None:
        super().__init__(rows, members)
        self.base = (base,)  # no child

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Map x (rows, in) to (rows, out)."""
        [x], [base] = inputs, self.base
        rows = self.rows.of(self.members, x)
        if not all(_shares(member, base) for member, _ in rows):
            return super().forward(x)
        y = stacked_linear(x, [Part(base.weight, base.bias)], impl=base.impl)
        if torch.is_grad_enabled():  # each change of a part of y would copy all of its gradient
            return torch.cat(
                [_completed(member, x[some], y[some].clone()) for member, some in rows]
            )
        for member, some in rows:
            own = y[some]
            changed = _completed(member, x[some], own)
            if changed is not own:
                own.copy_(changed)
        return y


def _shares(member: nn.Module, base: Linear) -> bool:
    """Return whether a map is the base's product with something added or its output scaled."""
    return (
        isinstance(member, Linear)
        and can_be_stacked(member)
        and member.weight is base.weight
        and member.bias is base.bias
        and (member.ia3 is None or getattr(member.ia3, "of", "") == "output")
    )


def _completed(member: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return what a map makes of x (rows, in), given y = x Wᵀ + b (rows, out), which it changes."""
    assert isinstance(member, Linear)
    if not member.adapters_on:
        return y
    part = member.part()
    if part.bias is not member.bias:
        y += part.bias - member.bias
    if part.bias_delta is not None:
        y += part.bias_delta
    if part.lora_A is not None and part.lora_B is not None:
        U = F.linear(x, part.lora_A).to(y.dtype)
        y.addmm_(U, part.lora_B.to(y.dtype).t(), alpha=part.scaling)
    if member.ia3 is not None:
        scaled: torch.Tensor = member.ia3(x, lambda _: y)
        return scaled
    return y


class _MixedAdapters(nn.Module):
    """H' at the end of a sub-layer: each adapter's bottlenecks on the adapter's own rows.

    Parameters
    ----------
    rows : _Rows
        The rows of each adapter.
    members : sequence of (SublayerEnd, LayerNorm)
        The end of the sub-layer with each adapter's bottlenecks, and its LayerNorm.
    """

    def __init__(self, rows: _Rows, members: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.rows, self.members = rows, tuple(members)

    def forward(self, H: torch.Tensor, X: torch.Tensor, _: object) -> torch.Tensor:
        """Return H' (rows, D) for H and the residual X (rows, D)."""
        changed = []
        for (end, norm), some in self.rows.of(self.members, H):
            h, x = H[some], X[some]
            assert isinstance(end, SublayerEnd) and isinstance(norm, LayerNorm)
            if end.adapters is not None and end.adapters_on:
                normed = functools.partial(add_norm, drop=None, norm=norm)
                for adapter in end.adapters.values():
                    h = adapter(h, x, normed)
            changed.append(h)
        return torch.cat(changed)


def _only_adds(end: nn.Module, base: SublayerEnd, own: Mapping[str, nn.Module]) -> bool:
    """Return whether the end of a sub-layer is the base's but for its bottlenecks.

    Other modules in it may be of the places ``own`` of the same adapter.
    """
    known = {*base.children(), *own.values()}
    return (
        type(end) is type(base)
        and can_be_bypassed(end)
        and vars(end).keys() <= vars(base).keys()
        and all(each in known for key, each in end.named_children() if key != "adapters")
    )


class _Mix:
    """All adapters of a model, mixed: what stands in each place that one of them adapts.

    Attributes
    ----------
    names : tuple of str
        The adapters, in the order of their rows.
    rows : _Rows
        The rows of each.
    why_not : str
        Why they cannot be mixed, or "".
    """

    def __init__(self, model: BertForSequenceClassification) -> None:
        self.names, self.rows, self.why_not = tuple(model.adaptations), _Rows(), ""
        self.built_from = _adapted(model)
        self.places: list[Place] = []
        own = [
            {place.path: place.adapted for place in each.places[:-1]}
            for each in model.adaptations.values()
        ]
        paths = dict.fromkeys(itertools.chain(*own))
        bases = {path: model.get_submodule(path) for path in paths}
        norms = {
            path: each.LayerNorm for path, each in bases.items() if isinstance(each, SublayerEnd)
        }
        for path, base in bases.items():
            if isinstance(base, SublayerEnd) and not all(
                _only_adds(each[path], base, each) for each in own if path in each
            ):
                self.why_not = f"one of them changes the whole of {path}"
        for path, base in bases.items():
            mixed: nn.Module
            members = [adapted.get(path, base) for adapted in own]
            if isinstance(base, SublayerEnd):
                of_each = [each.get(f"{path}.LayerNorm", norms[path]) for each in own]
                ends = list(zip(members, of_each, strict=True))
                mixed = twin(base)
                mixed.adapters = nn.ModuleDict({"mixed": _MixedAdapters(self.rows, ends)})
            elif isinstance(base, Linear):
                mixed = _MixedLinear(self.rows, members, base)
            else:
                mixed = _Mixed(self.rows, members)
            mixed.training = base.training  # or it would give the base its own mode
            self.places.append(Place(model, path, mixed))
        for place in reversed(self.places):
            place.take(model)

    @contextmanager
    def put(self, model: BertForSequenceClassification) -> Iterator[None]:
        """Put the mixed modules into a model that is the pre-trained one, inside the block."""
        for name in self.names:  # so that the modes, forms and tensors of all are the model's
            use(model, name)
        use(model, None)
        for place in self.places:
            place.put(model)
        try:
            yield
        finally:
            for place in reversed(self.places):
                place.take(model)


def _mix_of(model: BertForSequenceClassification) -> _Mix:
    """Return a model's adapters, mixed; it is made again if one of them has changed."""
    mix = model.mix
    if not isinstance(mix, _Mix) or not _are_same(mix.built_from, _adapted(model)):
        mix = model.mix = _Mix(model)
    return mix


def _adapted(model: BertForSequenceClassification) -> list[nn.Module | None]:
    """Return what stands in all places with the adapters, and what stands there now."""
    places = [place for each in model.adaptations.values() for place in each.places]
    present = [place.parent(model)._modules[place.child] for place in places]
    return [*present, *(place.adapted for place in places)]


def _are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def forward_rows(
    model: BertForSequenceClassification,
    adapters: Sequence[str],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Return the logits of a padded batch whose rows are each for an adapter of its own.

    Parameters
    ----------
    model : BertForSequenceClassification
        A model with these adapters.
    adapters : sequence of str
        The adapter of each of the B rows.
    input_ids, attention_mask, token_type_ids : torch.Tensor, (B, T)
        As for the model itself.

    Returns
    -------
    list of torch.Tensor, (C,)
        The logits of each row; C is its adapter's number of labels.

    Raises
    ------
    PlanError, ConfigError
        As :func:`forward_tasks`, and as the model itself.
    """
    if len(adapters) != len(input_ids):
        raise ConfigError(f"{len(input_ids)} rows need an adapter each, found {len(adapters)}")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(adapters):
        rows.setdefault(name, []).append(row)
    tokens, layout, back = model.bert.lay_out(input_ids, attention_mask, token_type_ids)
    if isinstance(layout, Packed):
        assert isinstance(back, Unpacking)
        places = back.sequences.tolist()
        sequences = {name: [places[row] for row in some] for name, some in rows.items()}
        ids, types, positions = tokens
        found = forward_tasks(model, PackedBatch(ids, types, positions, layout), sequences)
    else:  # the plain form
        found, given = {}, (input_ids, attention_mask, token_type_ids)
        for name, some in rows.items():
            with using(model, name):
                found[name] = model(*(None if each is None else each[some] for each in given))
    each_of = {name: iter(logits) for name, logits in found.items()}
    return [next(each_of[name]) for name in adapters]

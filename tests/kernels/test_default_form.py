"""The default form, packed and fused, compared with Hugging Face's BERT in everything it computes.

The oracle is transformers' BERT with the same weights, and the model's own reference form, which
tests/test_equations.py holds against it equation by equation. Models, batches and tolerances are
those of tests/support/hf_twin.py.
"""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.hf_twin import (
    BATCHES,
    CONFIG,
    FUSED_PATHS,
    PADDED,
    Batch,
    assert_same,
    make_pair,
    names_in_graph,
)
from torch import nn

from spafit.bert import set_impl
from spafit.kernels.dropout import draw_bits, scale_of, threshold


@dataclasses.dataclass
class Run:
    """What one pass for the hidden states of all layers computed, in any form."""

    states: tuple[torch.Tensor, ...]  # L + 1 hidden states (B, T, D)
    last: torch.Tensor  # (B, T, D)
    pooled: torch.Tensor  # (B, D)
    inside: dict[str, torch.Tensor]  # H2, H4, H5 and H7 of every layer, as they lie
    loss: torch.Tensor  # ()
    parameters: dict[str, torch.Tensor]  # their gradients
    inside_gradients: dict[str, torch.Tensor]


def run(model: Any, inputs: Batch) -> Run:
    """Run forward and backward from a loss that pulls at every real token's hidden states.

    At padding the forms differ, and nothing may depend on it.
    """
    keep = real_tokens(inputs)
    inside: dict[str, torch.Tensor] = {}

    def record(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        inside[name] = output[0] if isinstance(output, tuple) else output

    hooks = [
        layer.get_submodule(path).register_forward_hook(
            functools.partial(record, f"layer {i} {symbol}")
        )
        for i, layer in enumerate(model.bert.encoder.layer)
        for symbol, path in FUSED_PATHS.items()
    ]
    out = model.bert(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(6)
    loss = torch.zeros((), dtype=out.pooler_output.dtype)
    for tensor in [*out.hidden_states, out.pooler_output]:
        pull = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        pull = pull / math.sqrt(tensor[..., 0].numel())
        pull = pull * keep[..., None] if tensor.dim() == 3 else pull
        loss = loss + (tensor * pull.to(tensor.dtype)).sum()
    parameters = dict(model.bert.named_parameters())
    gradients = torch.autograd.grad(loss, [*parameters.values(), *inside.values()])
    n = len(parameters)
    return Run(
        out.hidden_states,
        out.last_hidden_state,
        out.pooler_output,
        inside,
        loss,
        dict(zip(parameters, gradients[:n], strict=True)),
        dict(zip(inside, gradients[n:], strict=True)),
    )


def logits_and_gradients(
    model: nn.Module, inputs: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits, and every parameter's gradient of a pull at each of them."""
    output = model(**inputs)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    generator = torch.Generator().manual_seed(7)
    pull = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad((logits * pull).sum(), list(named.values()))
    return logits, dict(zip(named, gradients, strict=True))


def real_tokens(inputs: Batch) -> torch.Tensor:
    """Return (B, T) of bool: True at real tokens."""
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


def is_packed(inputs: Batch) -> bool:
    """Return whether each row begins with a real token, which the pooler reads."""
    return bool(real_tokens(inputs)[:, 0].all())


def as_packed(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """(B, T, ...) -> (tokens, ...): real tokens alone, the shorter sequences first."""
    order = sorted(range(len(keep)), key=lambda row: int(keep[row].sum()))
    return torch.cat([x[row][keep[row]] for row in order])


FUSED_OPERATIONS = {"_PackedAttentionBackward", "_StackedLinearBackward", "_DropoutAddNormBackward"}


@functools.cache
def runs(batch_name: str, dtype: torch.dtype) -> tuple[Run, Run, Run]:
    """Return the default form's run, the reference form's and Hugging Face's."""
    config, inputs = BATCHES[batch_name]
    ours, theirs = make_pair(config, dtype)
    plain = run(ours, inputs)
    set_impl(ours, "auto")
    return run(ours, inputs), plain, run(theirs, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("batch", BATCHES)
class TestDefaultForm:
    """Oracle: Hugging Face's eager BERT and the reference form, for the form that users run.

    That is packed and fused: query, key and value are one product, and dropout, residual and
    LayerNorm one operation.
    """

    def test_it_is_packed_and_fused(self, batch: str, dtype: torch.dtype) -> None:
        """Else the tests below would hold the reference form against itself."""
        mine, plain, _ = runs(batch, dtype)
        inputs = BATCHES[batch][1]
        expected = (
            FUSED_OPERATIONS
            if is_packed(inputs)
            else FUSED_OPERATIONS - {"_PackedAttentionBackward"}
        )
        assert names_in_graph(mine.loss) & FUSED_OPERATIONS == expected
        assert not names_in_graph(plain.loss) & FUSED_OPERATIONS
        assert (mine.inside["layer 0 H2"].dim() == 2) == is_packed(inputs)

    def test_hidden_states_and_pooled_output(self, batch: str, dtype: torch.dtype) -> None:
        """At padding, which is not computed, the hidden states are exactly 0."""
        mine, *oracles = runs(batch, dtype)
        config, inputs = BATCHES[batch]
        keep = real_tokens(inputs)
        assert len(mine.states) == config.num_hidden_layers + 1
        assert torch.equal(mine.last, mine.states[-1])
        for i, state in enumerate(mine.states):
            if is_packed(inputs):
                assert torch.count_nonzero(state[~keep]) == 0
            for oracle in oracles:
                expected = oracle.states[i]
                if is_packed(inputs):
                    assert_same(state[keep], expected[keep], f"hidden state {i}")
                else:
                    assert_same(state, expected, f"hidden state {i}")
        for oracle in oracles:
            assert_same(mine.pooled, oracle.pooled)

    def test_sub_layers_and_their_gradients(self, batch: str, dtype: torch.dtype) -> None:
        """H2, H4, H5 and H7 of every layer, token by token.

        The rows after the last token pull at nothing.
        """
        mine, *oracles = runs(batch, dtype)
        inputs = BATCHES[batch][1]
        keep = real_tokens(inputs)
        assert len(mine.inside) == len(FUSED_PATHS) * BATCHES[batch][0].num_hidden_layers
        for name, tensor in mine.inside.items():
            gradient = mine.inside_gradients[name]
            for oracle in oracles:
                values, pulls = oracle.inside[name], oracle.inside_gradients[name]
                if is_packed(inputs):
                    values, pulls = as_packed(values, keep), as_packed(pulls, keep)
                assert_same(tensor[: len(values)], values, name)
                assert_same(gradient[: len(pulls)], pulls, name)
            if is_packed(inputs):
                assert torch.count_nonzero(gradient[int(keep.sum()) :]) == 0

    def test_every_gradient(self, batch: str, dtype: torch.dtype) -> None:
        """Of every parameter below the head, from every real token's hidden states."""
        mine, *oracles = runs(batch, dtype)
        for oracle in oracles:
            assert mine.parameters.keys() == oracle.parameters.keys()
            for name, gradient in mine.parameters.items():
                assert_same(gradient, oracle.parameters[name], name)

    def test_logits_and_gradients_of_the_classifier(self, batch: str, dtype: torch.dtype) -> None:
        """The last layer computes [CLS] rows alone here."""
        config, inputs = BATCHES[batch]
        ours, theirs = make_pair(config, dtype)
        oracles = [logits_and_gradients(ours, inputs), logits_and_gradients(theirs, inputs)]
        set_impl(ours, "auto")
        mine, my_gradients = logits_and_gradients(ours, inputs)
        for expected, their_gradients in oracles:
            assert_same(mine, expected)
            assert my_gradients.keys() == their_gradients.keys()
            for name, gradient in my_gradients.items():
                assert_same(gradient, their_gradients[name], name)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode: Any, batch: str, dtype: torch.dtype) -> None:
        """As predictions are made: what backward would need is not kept, and GELU is in place."""
        config, inputs = BATCHES[batch]
        ours, theirs = make_pair(config, dtype)
        keep = real_tokens(inputs)
        set_impl(ours, "auto")
        with mode():
            mine = ours.bert(**inputs, output_hidden_states=True)
            expected = theirs.bert(**inputs, output_hidden_states=True)
            assert_same(ours(**inputs), theirs(**inputs).logits)
        states = zip(mine.hidden_states, expected.hidden_states, strict=True)
        for i, (state, hf_state) in enumerate(states):
            assert_same(state[keep], hf_state[keep], f"hidden state {i}")
            if is_packed(inputs):
                assert torch.count_nonzero(state[~keep]) == 0
        assert torch.equal(mine.last_hidden_state, mine.hidden_states[-1])
        assert_same(mine.pooler_output, expected.pooler_output)


class TestDefaultFormInTraining:
    """Oracle: Hugging Face's eager BERT in training mode, its dropout drawing as the fused form."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
    def test_every_dropout_sits_at_its_place_with_its_own_rate(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without padding, packed rows are the padded ones one after the other.

        So the same masks fall on the same entries, in the order of the data; that those masks are
        fair is tested in test_dropout.py.
        """
        config = dataclasses.replace(
            CONFIG, hidden_dropout_prob=0.15, attention_probs_dropout_prob=0.25
        )
        inputs = BATCHES["no mask"][1]
        ours, theirs = make_pair(config, dtype)
        set_impl(ours, "auto")
        still = run(ours, inputs)

        def hf_dropout(
            x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
        ) -> torch.Tensor:
            if not training or p == 0:
                return x
            kept = draw_bits(x.shape) >= threshold(p)
            return x * kept.to(x.dtype) * scale_of(p, x.device)

        torch.manual_seed(9)
        mine = run(ours.train(), inputs)
        monkeypatch.setattr(F, "dropout", hf_dropout)
        torch.manual_seed(9)
        expected = run(theirs.train(), inputs)
        assert names_in_graph(mine.loss) >= FUSED_OPERATIONS
        assert (mine.pooled - still.pooled).abs().max() > 0.1
        for i, (state, hf_state) in enumerate(zip(mine.states, expected.states, strict=True)):
            assert_same(state, hf_state, f"hidden state {i}")
        assert_same(mine.pooled, expected.pooled)
        for name, tensor in mine.inside.items():
            assert_same(tensor, expected.inside[name].flatten(0, 1), name)
        for name, gradient in mine.inside_gradients.items():
            assert_same(gradient, expected.inside_gradients[name].flatten(0, 1), name)
        for name, gradient in mine.parameters.items():
            assert_same(gradient, expected.parameters[name], name)


class TestTheDefaultFormsTestsCanFail:
    """Oracle: none; the losses above must give every parameter a voice, as the trace's does."""

    @pytest.mark.parametrize("loss", ["hidden states", "logits"])
    def test_every_parameter_has_a_gradient_of_weight(self, loss: str) -> None:
        if loss == "hidden states":
            gradients = runs("padded", torch.float64)[0].parameters
        else:
            ours, _ = make_pair(CONFIG, torch.float64)
            set_impl(ours, "auto")
            gradients = logits_and_gradients(ours, PADDED)[1]
        for name, gradient in gradients.items():
            largest = float(gradient.abs().max())
            if name.endswith("key.bias"):
                assert largest < 1e-12, name
            else:
                assert largest > 1e-2, name

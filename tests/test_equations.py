"""Every equation of the SPAFIT paper's section 3.2, held against Hugging Face's BERT.

The oracle is transformers' BERT with ``attn_implementation="eager"`` and the same weights: every
intermediate tensor of Eq. (1)-(10), every hidden state, the pooled output, the logits, and every
gradient. Beside it, each equation is written out once more from the weights in plain torch, so that
a test reads as the equation that it tests.

Eq. (1)-(4) and (8) are computed as the paper prints them. The checkpoint departs from Eq. (5)-(7),
(9) and (10): there a test writes out the checkpoint's form, and TestAsPrinted the printed one,
which gives other numbers.

The equations are traced in the model's reference form, where every sub-module is called by itself.
Models, batches and tolerances are those of tests/support/hf_twin.py; the form that users run is
held in tests/kernels/test_default_form.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.hf_twin import (
    BATCHES,
    CONFIG,
    PADDED,
    B,
    L,
    T,
    assert_same,
    make_pair,
    trace,
    traces,
)

from spafit.bert import set_impl
from spafit.errors import ConfigError
from spafit.layout import Packed, Padded


class Equations:
    """One padded batch in one dtype; the layers' symbols and weights, ready for an equation."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.ours, self.theirs, self.weights = traces("padded", dtype)
        self.keep = PADDED["attention_mask"].bool()[:, None, None, :]  # (B, 1, 1, T)

    def layers(self) -> list[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
        """Return i, the layer's input X, and its symbols, for every layer."""
        return [(i, self.ours.state[i], self.ours.layer[i]) for i in range(L)]

    def weight_and_bias(self, i: int, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and the bias of a sub-layer of layer i."""
        prefix = f"bert.encoder.layer.{i}.{path}"
        return self.weights[f"{prefix}.weight"], self.weights[f"{prefix}.bias"]

    def check(self, i: int, symbol: str, equation: torch.Tensor) -> None:
        """Hold spafit's tensor against the equation written out and against Hugging Face's."""
        ours = self.ours.layer[i][symbol]
        assert_same(ours, equation, f"layer {i}: {symbol} and its equation")
        assert_same(ours, self.theirs.layer[i][symbol], f"layer {i}: {symbol} and Hugging Face")


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def equations(request: pytest.FixtureRequest) -> Equations:
    return Equations(request.param)


def split_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, T, D) -> (B, A, T, Dh), head a being the columns a Dh .. (a + 1) Dh - 1."""
    Dh = CONFIG.head_size
    return torch.stack([x[..., a * Dh : (a + 1) * Dh] for a in range(5)], dim=1)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """γ ⊙ (x - mean) / √(variance + eps) + β, the variance being the mean of the squares."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return weight * centred / torch.sqrt(variance + CONFIG.layer_norm_eps) + bias


class TestEachEquation:
    """Oracle: the equation in plain torch, and the same tensor inside Hugging Face's BERT."""

    def test_embeddings(self, equations: Equations) -> None:
        """Eq. (X), dropout being off: X = LayerNorm(word + position + token type)."""
        weights, ids, types = equations.weights, PADDED["input_ids"], PADDED["token_type_ids"]
        word = weights["bert.embeddings.word_embeddings.weight"][ids]
        position = weights["bert.embeddings.position_embeddings.weight"][:T]
        token_type = weights["bert.embeddings.token_type_embeddings.weight"][types]
        gamma = weights["bert.embeddings.LayerNorm.weight"]
        beta = weights["bert.embeddings.LayerNorm.bias"]
        X = equations.ours.state[0]
        assert_same(X, layer_norm(word + position + token_type, gamma, beta))
        assert_same(X, equations.theirs.state[0])

    def test_equation_1_queries(self, equations: Equations) -> None:
        """Eq. (1): Q = W_q(x) + b_q."""
        for i, X, _ in equations.layers():
            W_q, b_q = equations.weight_and_bias(i, "attention.self.query")
            equations.check(i, "Q", split_heads(X @ W_q.T + b_q))

    def test_equation_2_keys(self, equations: Equations) -> None:
        """Eq. (2): K = W_k(x) + b_k."""
        for i, X, _ in equations.layers():
            W_k, b_k = equations.weight_and_bias(i, "attention.self.key")
            equations.check(i, "K", split_heads(X @ W_k.T + b_k))

    def test_equation_3_values(self, equations: Equations) -> None:
        """Eq. (3): V = W_v(x) + b_v."""
        for i, X, _ in equations.layers():
            W_v, b_v = equations.weight_and_bias(i, "attention.self.value")
            equations.check(i, "V", split_heads(X @ W_v.T + b_v))

    def test_equation_4_attention(self, equations: Equations) -> None:
        """Eq. (4): H_1 = softmax(QKᵀ / √Dh) V in each head, over each one's real tokens."""
        for i, _, h in equations.layers():
            scores = torch.einsum("bath,bash->bats", h["Q"], h["K"]) / math.sqrt(CONFIG.head_size)
            weights = scores.exp() * equations.keep
            P = weights / weights.sum(-1, keepdim=True)
            assert_same(P, equations.theirs.layer[i]["P"])
            equations.check(i, "H1", torch.einsum("bats,bash->bath", P, h["V"]))

    def test_equation_5_joined_heads(self, equations: Equations) -> None:
        """Eq. (5): H_2 = Dropout(H_1), dropout being off: H_1 with its heads side by side."""
        for i, _, h in equations.layers():
            equations.check(i, "H2", torch.cat(list(h["H1"].unbind(dim=1)), dim=-1))

    def test_equation_6_attention_output(self, equations: Equations) -> None:
        """Eq. (6): W_3(H_2) + b_3, the linear map inside its LayerNorm."""
        for i, _, h in equations.layers():
            W_3, b_3 = equations.weight_and_bias(i, "attention.output.dense")
            equations.check(i, "W3 H2 + b3", h["H2"] @ W_3.T + b_3)

    def test_equations_6_and_7_with_residual(self, equations: Equations) -> None:
        """Eq. (7'): H_4 = LayerNorm(Dropout(W_3(H_2) + b_3) + X), dropout being off."""
        for i, X, h in equations.layers():
            gamma, beta = equations.weight_and_bias(i, "attention.output.LayerNorm")
            equations.check(i, "H4", layer_norm(h["W3 H2 + b3"] + X, gamma, beta))

    def test_equation_8_intermediate(self, equations: Equations) -> None:
        """Eq. (8): H_5 = GELU(W_5(H_4) + b_5), GELU(x) = x Φ(x) = x (1 + erf(x / √2)) / 2."""
        for i, _, h in equations.layers():
            W_5, b_5 = equations.weight_and_bias(i, "intermediate.dense")
            x = h["H4"] @ W_5.T + b_5
            equations.check(i, "H5", x * (1 + torch.erf(x / math.sqrt(2))) / 2)
            # The tanh form, which other models use, is another function.
            assert (F.gelu(x, approximate="tanh") - h["H5"]).abs().max() > 1e-4

    def test_equation_9_output(self, equations: Equations) -> None:
        """Eq. (9): W_6(H_5) + b_6, the linear map inside its LayerNorm."""
        for i, _, h in equations.layers():
            W_6, b_6 = equations.weight_and_bias(i, "output.dense")
            equations.check(i, "W6 H5 + b6", h["H5"] @ W_6.T + b_6)

    def test_equations_9_and_10_with_residual(self, equations: Equations) -> None:
        """Eq. (10'): H_7 = LayerNorm(Dropout(W_6(H_5) + b_6) + H_4), dropout being off.

        It is the next layer's X.
        """
        for i, _, h in equations.layers():
            gamma, beta = equations.weight_and_bias(i, "output.LayerNorm")
            equations.check(i, "H7", layer_norm(h["W6 H5 + b6"] + h["H4"], gamma, beta))
            assert torch.equal(h["H7"], equations.ours.state[i + 1])

    def test_pooled_output_and_logits(self, equations: Equations) -> None:
        """Eq. (pooled), tanh(W_p h + b_p), h being [CLS]; Eq. (logits), W_c pooled + b_c."""
        weights, ours, theirs = equations.weights, equations.ours, equations.theirs
        W_p, b_p = weights["bert.pooler.dense.weight"], weights["bert.pooler.dense.bias"]
        W_c, b_c = weights["classifier.weight"], weights["classifier.bias"]
        pooled = torch.tanh(ours.state[-1][:, 0] @ W_p.T + b_p)
        assert_same(ours.pooled, pooled)
        assert_same(ours.pooled, theirs.pooled)
        assert_same(ours.logits, pooled @ W_c.T + b_c)
        assert_same(ours.logits, theirs.logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("batch", BATCHES)
class TestWholeModel:
    """Oracle: Hugging Face's eager BERT on batches of many shapes, forward and backward."""

    def test_every_tensor(self, batch: str, dtype: torch.dtype) -> None:
        """Q, K, V, H1 .. H7, every linear map, hidden state, pooled output and logits."""
        ours, theirs, _ = traces(batch, dtype)
        assert theirs.named.keys() - ours.named.keys() == {
            f"layer {i} P" for i in range(len(theirs.layer))
        }
        for name, tensor in ours.named.items():
            assert_same(tensor, theirs.named[name], name)

    def test_every_gradient(self, batch: str, dtype: torch.dtype) -> None:
        """The gradient of every parameter, of the embeddings, and of every tensor in between."""
        ours, theirs, weights = traces(batch, dtype)
        assert weights.keys() <= ours.gradients.keys()
        assert ours.named.keys() <= ours.gradients.keys()
        for name, gradient in ours.gradients.items():
            assert_same(gradient, theirs.gradients[name], name)

    def test_asked_for_hidden_states(self, batch: str, dtype: torch.dtype) -> None:
        """``output_hidden_states=True`` gives what Hugging Face gives under the same name."""
        config, inputs = BATCHES[batch]
        ours, theirs = make_pair(config, dtype)
        with torch.no_grad():
            mine = ours.bert(**inputs, output_hidden_states=True)
            expected = theirs.bert(**inputs, output_hidden_states=True)
        assert mine.hidden_states is not None
        assert len(mine.hidden_states) == config.num_hidden_layers + 1
        for i, (state, hf_state) in enumerate(
            zip(mine.hidden_states, expected.hidden_states, strict=True)
        ):
            assert_same(state, hf_state, f"hidden state {i}")
        assert_same(mine.last_hidden_state, expected.last_hidden_state)
        assert_same(mine.pooler_output, expected.pooler_output)

    def test_asked_for_attentions(self, batch: str, dtype: torch.dtype) -> None:
        """``output_attentions=True`` gives Hugging Face's tuple, from either entry point."""
        config, inputs = BATCHES[batch]
        ours, theirs = make_pair(config, dtype)
        with torch.no_grad():
            alone = ours(**inputs)
            mine = ours(**inputs, output_hidden_states=True, output_attentions=True)
            inner = ours.bert(**inputs, output_attentions=True)
            expected = theirs(**inputs, output_hidden_states=True, output_attentions=True)
        A, length = config.num_attention_heads, inputs["input_ids"].shape[1]
        assert len(mine.attentions) == config.num_hidden_layers
        assert inner.hidden_states is None
        for name in ("attentions", "hidden_states"):
            for i, (found, hf) in enumerate(
                zip(getattr(mine, name), getattr(expected, name), strict=True)
            ):
                assert_same(found, hf, f"{name} {i}")
        for found, again in zip(mine.attentions, inner.attentions, strict=True):
            assert found.shape == (len(found), A, length, length)
            assert torch.equal(found, again)
        assert torch.equal(mine.logits, alone)


class TestHooks:
    """Oracle: a hook on the module of the same path in Hugging Face's BERT."""

    @pytest.mark.parametrize(
        "path",
        [
            "embeddings.LayerNorm",
            "encoder.layer.1",
            "encoder.layer.0.attention",
            "encoder.layer.2.attention.self.query",
            "encoder.layer.2.attention.self.value",
            "encoder.layer.3.attention.output",
            "encoder.layer.3.attention.output.dense",
            "encoder.layer.4.attention.output.LayerNorm",
            "encoder.layer.4.attention.output.dropout",
            "encoder.layer.0.intermediate",
            "encoder.layer.5.intermediate.dense",
            "encoder.layer.5.output",
            "encoder.layer.5.output.dense",
            "encoder.layer.5.output.LayerNorm",
        ],
    )
    def test_a_hook_sees_the_padded_batch(self, path: str) -> None:
        """A single hook: no other module is called by itself on its account."""
        seen = []
        for model in make_pair(CONFIG, torch.float64):
            model.get_submodule(f"bert.{path}").register_forward_hook(
                lambda module, given, found: seen.append(
                    (given[0], found[0] if isinstance(found, tuple) else found)
                )
            )
            with torch.no_grad():
                model(**PADDED)
        [(given, found), (hf_given, hf_found)] = seen
        assert found.shape[:2] == (B, T)
        assert_same(found, hf_found, path)
        assert_same(given, hf_given, path)


class TestAttentionsAskedFor:
    """Oracle: the probabilities that Hugging Face gives, or the message of a refusal."""

    def test_in_training_they_are_what_v_is_multiplied_by(self) -> None:
        """After dropout: dropped entries are 0, and they have a gradient."""
        model, _ = make_pair(CONFIG, torch.float64)
        out = model.train()(**PADDED, output_attentions=True)
        for P in out.attentions:
            P.retain_grad()
        torch.autograd.backward(out.logits.sum())
        kept = PADDED["attention_mask"].bool()[:, None, None, :].expand_as(out.attentions[0])
        dropped = (out.attentions[0] == 0) & kept
        assert 0.01 < dropped.sum() / kept.sum() < 0.3  # the rate is 0.1
        assert all(float(P.grad.abs().max()) > 0 for P in out.attentions)

    @pytest.mark.parametrize("impl", ["auto", "fused"])
    def test_a_fast_form_has_none_and_says_what_to_do(self, impl: str) -> None:
        model, _ = make_pair(CONFIG, torch.float64)
        set_impl(model, impl)
        for entry in (model, model.bert):
            with pytest.raises(ConfigError, match=r'set_impl\(model, "reference"\)'):
                entry(**PADDED, output_attentions=True)
        set_impl(model, "reference")
        set_impl(model.bert.encoder.layer[2], impl)  # also a single layer
        with pytest.raises(ConfigError, match=r'set_impl\(model, "reference"\)'):
            model(**PADDED, output_attentions=True)

    def test_an_attention_that_gives_none_is_noticed(self) -> None:
        class Own(torch.nn.Module):
            def forward(self, X: torch.Tensor, *_: Any) -> torch.Tensor:
                return X

        model, _ = make_pair(CONFIG, torch.float64)
        model.bert.encoder.layer[1].attention.self = Own()
        with pytest.raises(ConfigError, match="5 of 6 layers gave attention probabilities"):
            model(**PADDED, output_attentions=True)

    def test_cls_of_every_layer_from_both_entries_in_every_form(self) -> None:
        model, theirs = make_pair(CONFIG, torch.float64)
        with torch.no_grad():
            expected = theirs(**PADDED, output_hidden_states=True)
            for impl in ("reference", "auto", "fused"):
                set_impl(model, impl)
                found = model(**PADDED, output_hidden_states=True)
                inner = model.bert(**PADDED, output_hidden_states=True)
                assert found.attentions is None
                assert_same(found.logits, expected.logits, impl)
                assert len(found.hidden_states) == len(inner.hidden_states) == L + 1
                for state, other, hf in zip(
                    found.hidden_states, inner.hidden_states, expected.hidden_states, strict=True
                ):
                    assert_same(state[:, 0], hf[:, 0], impl)
                    assert torch.equal(state, other)


class TestTheseTestsCanFail:
    """Oracle: none; the weights and the loss must give every term a voice."""

    def test_every_parameter_has_a_gradient_of_weight(self) -> None:
        """Except the key bias: it adds the same to all scores of a query, and softmax ignores it.

        So a term that is lost, or a gradient that is, cannot hide below a tolerance.
        """
        ours, _, weights = traces("padded", torch.float64)
        for name in weights:
            largest = float(ours.gradients[name].abs().max())
            if name.endswith("key.bias"):
                assert largest < 1e-12, name
            else:
                assert largest > 1e-2, name

    def test_padding_id_learns_nothing(self) -> None:
        """Row [PAD] of the word embeddings has no gradient, even where the id is attended to."""
        ours, theirs, _ = traces("padded", torch.float64)
        for side in (ours, theirs):
            gradient = side.gradients["bert.embeddings.word_embeddings.weight"]
            assert torch.count_nonzero(gradient[CONFIG.pad_token_id]) == 0

    def test_attention_is_not_uniform(self) -> None:
        """Some query gives a token more than twice its equal share, in every head and layer."""
        _, theirs, _ = traces("no mask", torch.float64)
        for layer in theirs.layer:
            assert (layer["P"].amax(dim=(0, 2, 3)) > 2 / T).all()


class TestAsPrinted:
    """Oracle: Hugging Face's numbers, which the equations as the paper prints them do not give."""

    def test_equations_6_and_7(self) -> None:
        """Eq. (6), LayerNorm(W_3(H_2) + b_3), and Eq. (7), Dropout(H_3), dropout being off."""
        e = Equations(torch.float64)
        for i in range(L):
            h = e.theirs.layer[i]
            W_3, b_3 = e.weight_and_bias(i, "attention.output.dense")
            gamma, beta = e.weight_and_bias(i, "attention.output.LayerNorm")
            H_3 = layer_norm(h["H2"] @ W_3.T + b_3, gamma, beta)
            H_4 = F.dropout(H_3, training=False)
            assert (H_4 - h["H4"]).abs().mean() > 0.1
            assert (H_4 - e.ours.layer[i]["H4"]).abs().mean() > 0.1

    def test_equations_9_and_10(self) -> None:
        """Eq. (9), LayerNorm(W_6(H_5) + b_6), and Eq. (10), Dropout(H_6), dropout being off."""
        e = Equations(torch.float64)
        for i in range(L):
            h = e.theirs.layer[i]
            W_6, b_6 = e.weight_and_bias(i, "output.dense")
            gamma, beta = e.weight_and_bias(i, "output.LayerNorm")
            H_6 = layer_norm(h["H5"] @ W_6.T + b_6, gamma, beta)
            H_7 = F.dropout(H_6, training=False)
            assert (H_7 - h["H7"]).abs().mean() > 0.1
            assert (H_7 - e.ours.layer[i]["H7"]).abs().mean() > 0.1

    @pytest.mark.parametrize("side", ["spafit", "spafit fused", "Hugging Face"])
    @pytest.mark.parametrize("name", ["SelfOutput", "Output"])
    def test_dropout_falls_before_the_residual(self, name: str, side: str) -> None:
        """With nearly all dropped, Eq. (7') and Eq. (10') leave LayerNorm(residual).

        By Eq. (7) and Eq. (10) zeros would be left.
        """
        block = self._block(name, side)
        block.dropout.p = 1 - 1e-12
        # The fused form keeps one entry in 65,536 even so; under this seed none of these 420.
        torch.manual_seed(8)
        width = CONFIG.hidden_size if name == "SelfOutput" else CONFIG.intermediate_size
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(B, T, width, generator=generator, dtype=torch.float64)
        residual = torch.randn(B, T, CONFIG.hidden_size, generator=generator, dtype=torch.float64)
        output = block.train()(x, residual)
        norm = block.LayerNorm
        assert_same(output, layer_norm(residual, norm.weight, norm.bias))
        assert output.abs().min() > 0

    @staticmethod
    def _model(side: str) -> Any:
        ours, theirs = make_pair(CONFIG, torch.float64)
        set_impl(ours, "reference" if side == "spafit" else "auto")
        return theirs if side == "Hugging Face" else ours

    @staticmethod
    def _block(name: str, side: str) -> Any:
        layer = TestAsPrinted._model(side).bert.encoder.layer[1]
        return layer.attention.output if name == "SelfOutput" else layer.output

    @pytest.mark.parametrize("side", ["spafit", "spafit fused", "spafit packed", "Hugging Face"])
    def test_equation_5_dropout_falls_on_the_probabilities(self, side: str) -> None:
        """Eq. (5'): with one token P = 1, so a head's whole H1 is dropped, or doubled.

        The rate is 1/2. Eq. (5), as printed, would drop and double the entries of H_1 one by one.
        """
        part = self._model(side).bert.encoder.layer[0].attention.self.train()
        if side == "Hugging Face":
            part.dropout.p = 0.5
        else:
            part.dropout = 0.5
        X = torch.randn(200, 1, CONFIG.hidden_size, dtype=torch.float64)
        torch.manual_seed(4)
        if side == "Hugging Face":
            H2 = part(X, None)[0]
        elif side == "spafit packed":
            H2 = part(X.flatten(0, 1), Packed([1] * 200)).view(X.shape)
        else:
            H2 = part(X, Padded())
        V = part.value(X)
        share = (H2 / V).unflatten(-1, (5, 4))  # (200, 1, A, Dh): 0 or 2
        doubled = share[..., 0] > 1  # (200, 1, A), of each head's first entry
        assert_same(share, 2.0 * doubled[..., None].double().expand_as(share))
        # 1,000 heads at a rate of 1/2: the standard deviation of the share is 0.016.
        assert abs(float(doubled.double().mean()) - 0.5) < 0.08

    def test_training_with_dropout_is_hugging_faces(self) -> None:
        """From the same seed, all five kinds of dropout fall on the same entries.

        Our plain form draws its random numbers as Hugging Face's eager attention does, so the whole
        training step must agree: each dropout sits at its place, with its own rate. The fused form
        draws others: TestDefaultForm lends them to Hugging Face's model.
        """
        config = dataclasses.replace(
            CONFIG,
            hidden_dropout_prob=0.15,
            attention_probs_dropout_prob=0.25,
            classifier_dropout=0.35,
        )
        ours, theirs = make_pair(config, torch.float64)
        torch.manual_seed(5)
        mine = trace(ours.train(), PADDED)
        torch.manual_seed(5)
        expected = trace(theirs.train(), PADDED)
        still = trace(ours.eval(), PADDED)
        assert (mine.logits - still.logits).abs().max() > 0.1
        for name, tensor in mine.named.items():
            assert_same(tensor, expected.named[name], name)
        for name, gradient in mine.gradients.items():
            assert_same(gradient, expected.gradients[name], name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("batch", BATCHES)
class TestDefaultAttention:
    """Oracle: Hugging Face's tensors and the reference form's, for the fused form left padded.

    So are batches computed that begin with padding: by PyTorch's fused attention. The hooks of the
    trace have each map called by itself, so that Q, K, V and H1 are seen in this form too.
    """

    def test_every_tensor_and_gradient(self, batch: str, dtype: torch.dtype) -> None:
        config, inputs = BATCHES[batch]
        ours, _ = make_pair(config, dtype)
        set_impl(ours, "auto")
        ours.bert.packed = False
        fused = trace(ours, inputs)
        for oracle in traces(batch, dtype)[:2]:
            for name, tensor in fused.named.items():
                assert_same(tensor, oracle.named[name], name)
            for name, gradient in fused.gradients.items():
                assert_same(gradient, oracle.gradients[name], name)

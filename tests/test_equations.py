"""Every equation of the SPAFIT paper's section 3, held against Hugging Face's BERT.

The oracle is transformers' BERT with ``attn_implementation="eager"`` and the same weights: every
intermediate tensor of Eq. (1)-(10), every hidden state, the pooled output, the logits, and every
gradient. Beside it, each equation is written out once more from the weights in plain torch, so that
a test reads as the equation that it tests.

The equations are traced in the model's reference form, where every sub-module is called by itself.
The form that users run, packed and fused, is held against Hugging Face's model and against the
reference form, in all that it computes too.

Two tensors are the same if they differ by at most 1e-12 in float64 or 1e-5 in float32, absolutely
while their entries are of the order of 1, and as a share of the largest entry where that is larger.

Legend: B batch, T tokens of the longest, D hidden, A heads, Dh head size, F intermediate, L layers,
C labels. All sizes are pairwise unequal, and all weights are far from their initial values, so that
a swapped axis or a dropped term fails.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spafit.layout
from spafit.bert import BertForSequenceClassification, set_impl
from spafit.config import BertConfig
from spafit.kernels.dropout import draw_bits, scale_of, threshold
from spafit.layout import Packed, Padded

transformers = pytest.importorskip("transformers")
hf_bert = pytest.importorskip("transformers.models.bert.modeling_bert")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

B, T, C, L = 3, 7, 8, 6
CONFIG = BertConfig(
    vocab_size=99,
    hidden_size=20,
    num_hidden_layers=L,
    num_attention_heads=5,  # Dh = 4
    intermediate_size=37,
    max_position_embeddings=13,
    type_vocab_size=2,
)
# The full length of a real BERT. A T² L is what costs, so A and L are small.
LONG_CONFIG = dataclasses.replace(
    CONFIG,
    num_hidden_layers=1,
    num_attention_heads=4,  # Dh = 5
    max_position_embeddings=512,
)

# Symbol -> path in a layer, whose output it is on both sides.
PATHS = {
    "H2": "attention.self",
    "H3": "attention.output.dense",
    "H4": "attention.output",
    "H5": "intermediate",
    "H6": "output.dense",
    "H7": "output",
}

# Those of them that are computed as such in the fused form, where the others are only a step inside
# one operation. Hooks on these modules change nothing of what it does.
FUSED_PATHS = {symbol: PATHS[symbol] for symbol in ("H2", "H4", "H5", "H7")}

Batch = dict[str, torch.Tensor]


def assert_same(ours: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Compare to the tolerance of the type, see the module's docstring."""
    assert ours.dtype == expected.dtype, what
    assert ours.shape == expected.shape, what
    scale = max(1.0, float(expected.detach().abs().max()))
    worst = float((ours.detach() - expected.detach()).abs().max())
    assert worst <= TOLERANCE[ours.dtype] * scale, f"{what}: {worst:.3g} at scale {scale:.3g}"


def make_batch(lengths: list[int] | None, T: int, seed: int = 1) -> Batch:
    """Random ids with both token types; ``lengths`` None means no mask at all."""
    generator = torch.Generator().manual_seed(seed)
    B = 3 if lengths is None else len(lengths)
    batch = {
        "input_ids": torch.randint(0, CONFIG.vocab_size, (B, T), generator=generator),
        "token_type_ids": torch.randint(0, 2, (B, T), generator=generator),
    }
    batch["token_type_ids"][0, 0], batch["token_type_ids"][0, -1] = 0, 1
    batch["input_ids"][0, 0] = CONFIG.pad_token_id  # a padding id that is attended to
    if lengths is not None:
        mask = torch.arange(T) < torch.tensor(lengths)[:, None]
        batch["attention_mask"] = mask.long()
        batch["input_ids"][~mask] = CONFIG.pad_token_id
    return batch


PADDED = make_batch([7, 4, 1], T)
# The first token of every row is real, so that the batch is packed, from places that are not one
# run; and no row has the length or the gaps of another.
HOLES = [[1, 0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 1, 1, 1]]
BATCHES = {
    "padded": (CONFIG, PADDED),
    "no mask": (CONFIG, make_batch(None, T)),
    "gaps": (CONFIG, {**PADDED, "attention_mask": torch.tensor([[0, 1, 1, 0, 1, 0, 1]] * B)}),
    "gaps after [CLS]": (CONFIG, {**PADDED, "attention_mask": torch.tensor(HOLES)}),
    "1 token": (CONFIG, make_batch([1, 1, 1], 1)),
    "2 tokens": (CONFIG, make_batch([2, 1, 2], 2)),
    "511 tokens": (LONG_CONFIG, make_batch([511, 210, 3], 511)),
    "512 tokens": (LONG_CONFIG, make_batch([17, 512, 300], 512)),
}


def fill_with_random_weights(model: nn.Module, seed: int = 0) -> None:
    """Write weights under which every term of every equation matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("LayerNorm.weight"):
                noise = 1.0 + 0.3 * noise
            elif name.endswith("bias"):
                noise = 0.3 * noise
            elif name.endswith(("query.weight", "key.weight")):
                noise = 1.9 * noise / math.sqrt(parameter.shape[1])  # attention far from uniform
            elif name.endswith("attention.output.dense.weight"):
                noise = 0.5 * noise / math.sqrt(parameter.shape[1])  # tokens stay unlike each other
            elif "embeddings" not in name:
                noise = noise / math.sqrt(parameter.shape[1])
            parameter.copy_(noise)


def make_pair(config: BertConfig, dtype: torch.dtype) -> tuple[BertForSequenceClassification, Any]:
    """Build spafit's model and Hugging Face's with the same weights, in eval mode.

    spafit's is in its plain form: padded, and every module called by itself.
    """
    ours = BertForSequenceClassification(config, num_labels=C).to(dtype)
    fill_with_random_weights(ours)
    hf_config = transformers.BertConfig(**config.to_json_dict(), num_labels=C)
    hf_config._attn_implementation = "eager"
    theirs = transformers.BertForSequenceClassification(hf_config).to(dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    set_impl(ours, "reference")
    return ours.eval(), theirs.eval()


@dataclasses.dataclass
class Trace:
    """What one forward and backward pass computed, under the paper's symbols."""

    state: list[torch.Tensor]  # L + 1 hidden states (B, T, D): a layer's X, and the last H7
    layer: list[dict[str, torch.Tensor]]  # per layer: Q, K, V, P, H1 (per head), H2 .. H7
    pooled: torch.Tensor  # (B, D)
    logits: torch.Tensor  # (B, C)
    gradients: dict[str, torch.Tensor]  # of every parameter, and of every tensor above

    def __post_init__(self) -> None:
        symbols = {f"layer {i} {s}": t for i, one in enumerate(self.layer) for s, t in one.items()}
        states = {f"hidden state {i}": t for i, t in enumerate(self.state)}
        self.named = {**states, **symbols, "pooled": self.pooled, "logits": self.logits}


def trace(model: nn.Module, batch: Batch) -> Trace:
    """Run either side's model forward and backward and record every intermediate tensor."""
    outputs: dict[str, torch.Tensor] = {}
    heads: list[dict[str, torch.Tensor]] = []

    def record(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[path] = output[0] if isinstance(output, tuple) else output

    def spafit_attention(
        Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, *args: Any, **options: Any
    ) -> torch.Tensor:
        H1 = original(Q, K, V, *args, **options)  # (B, A, T, Dh)
        heads.append({"Q": Q, "K": K, "V": V, "H1": H1})
        return H1

    def hf_attention(
        module: nn.Module, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, *args: Any, **opt: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        joined, P = original_hf(module, Q, K, V, *args, **opt)
        H1 = joined.transpose(1, 2)  # (B, T, A, Dh) -> (B, A, T, Dh)
        heads.append({"Q": Q, "K": K, "V": V, "P": P, "H1": H1})
        return H1.transpose(1, 2), P

    original = vars(spafit.layout)["attention"]
    original_hf = hf_bert.eager_attention_forward
    hooks = [
        module.register_forward_hook(functools.partial(record, path))
        for path, module in model.named_modules()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spafit.layout.attention", spafit_attention)
        patch.setattr(hf_bert, "eager_attention_forward", hf_attention)
        result = model(**batch)
    for hook in hooks:
        hook.remove()

    number_of_layers = len(heads)
    result = Trace(
        state=[outputs["bert.embeddings"]]
        + [outputs[f"bert.encoder.layer.{i}"] for i in range(number_of_layers)],
        layer=[
            heads[i] | {s: outputs[f"bert.encoder.layer.{i}.{path}"] for s, path in PATHS.items()}
            for i in range(number_of_layers)
        ],
        pooled=outputs["bert.pooler"],
        logits=result if isinstance(result, torch.Tensor) else result.logits,
        gradients={},
    )
    # A loss that pulls at every entry of every hidden state, at the pooled output and the logits.
    # 1/√(B T) keeps the gradients of the parameters, which are sums over tokens, of the order of 1.
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), dtype=result.logits.dtype)
    for tensor in [*result.state, result.pooled, result.logits]:
        pull = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        pull = pull / math.sqrt(tensor[..., 0].numel())
        loss = loss + (tensor * pull.to(tensor.dtype)).sum()
    sources: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **result.named}
    gradients = torch.autograd.grad(loss, list(sources.values()))
    result.gradients = dict(zip(sources, gradients, strict=True))
    return result


@functools.cache
def traces(batch_name: str, dtype: torch.dtype) -> tuple[Trace, Trace, dict[str, torch.Tensor]]:
    """Give spafit's trace, Hugging Face's, and the weights they share."""
    config, batch = BATCHES[batch_name]
    ours, theirs = make_pair(config, dtype)
    return trace(ours, batch), trace(theirs, batch), ours.state_dict()


def names_in_graph(tensor: torch.Tensor) -> set[str]:
    """Give the names of all operations that autograd recorded on the way to ``tensor``."""
    nodes, found = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [before for before, _ in node.next_functions]
    return {node.name() for node in found}


class Equations:
    """One padded batch in one dtype; the layers' symbols and weights, ready for an equation."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.ours, self.theirs, self.weights = traces("padded", dtype)
        self.keep = PADDED["attention_mask"].bool()[:, None, None, :]  # (B, 1, 1, T)

    def layers(self) -> list[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
        """Give i, the layer's input X, and its symbols, for every layer."""
        return [(i, self.ours.state[i], self.ours.layer[i]) for i in range(L)]

    def weight_and_bias(self, i: int, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the weight and the bias of a sub-layer of layer i."""
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
        """X = LayerNorm(word + position + token type)."""
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
        """Q = W_q X + b_q."""
        for i, X, _ in equations.layers():
            W_q, b_q = equations.weight_and_bias(i, "attention.self.query")
            equations.check(i, "Q", split_heads(X @ W_q.T + b_q))

    def test_equation_2_keys(self, equations: Equations) -> None:
        """K = W_k X + b_k."""
        for i, X, _ in equations.layers():
            W_k, b_k = equations.weight_and_bias(i, "attention.self.key")
            equations.check(i, "K", split_heads(X @ W_k.T + b_k))

    def test_equation_3_values(self, equations: Equations) -> None:
        """V = W_v X + b_v."""
        for i, X, _ in equations.layers():
            W_v, b_v = equations.weight_and_bias(i, "attention.self.value")
            equations.check(i, "V", split_heads(X @ W_v.T + b_v))

    def test_equation_4_attention(self, equations: Equations) -> None:
        """H1 = softmax(QKᵀ / √Dh) V, over the real tokens of each sequence."""
        for i, _, h in equations.layers():
            scores = torch.einsum("bath,bash->bats", h["Q"], h["K"]) / math.sqrt(CONFIG.head_size)
            weights = scores.exp() * equations.keep
            P = weights / weights.sum(-1, keepdim=True)
            assert_same(P, equations.theirs.layer[i]["P"])
            equations.check(i, "H1", torch.einsum("bats,bash->bath", P, h["V"]))

    def test_equation_5_joined_heads(self, equations: Equations) -> None:
        """H2 = H1 with its heads side by side; the printed dropout on H1 is inside Eq. (4)."""
        for i, _, h in equations.layers():
            equations.check(i, "H2", torch.cat(list(h["H1"].unbind(dim=1)), dim=-1))

    def test_equation_6_attention_output(self, equations: Equations) -> None:
        """H3 = W_m1 H2 + b_m1."""
        for i, _, h in equations.layers():
            W_m1, b_m1 = equations.weight_and_bias(i, "attention.output.dense")
            equations.check(i, "H3", h["H2"] @ W_m1.T + b_m1)

    def test_equation_7_residual_and_layer_norm(self, equations: Equations) -> None:
        """H4 = LayerNorm(Dropout(H3) + X), dropout being off here."""
        for i, X, h in equations.layers():
            gamma, beta = equations.weight_and_bias(i, "attention.output.LayerNorm")
            equations.check(i, "H4", layer_norm(h["H3"] + X, gamma, beta))

    def test_equation_8_intermediate(self, equations: Equations) -> None:
        """H5 = GELU(W_m2 H4 + b_m2), GELU(x) = x Φ(x) = x (1 + erf(x / √2)) / 2."""
        for i, _, h in equations.layers():
            W_m2, b_m2 = equations.weight_and_bias(i, "intermediate.dense")
            x = h["H4"] @ W_m2.T + b_m2
            equations.check(i, "H5", x * (1 + torch.erf(x / math.sqrt(2))) / 2)
            # The tanh form, which other models use, is another function.
            assert (F.gelu(x, approximate="tanh") - h["H5"]).abs().max() > 1e-4

    def test_equation_9_output(self, equations: Equations) -> None:
        """H6 = W_m3 H5 + b_m3."""
        for i, _, h in equations.layers():
            W_m3, b_m3 = equations.weight_and_bias(i, "output.dense")
            equations.check(i, "H6", h["H5"] @ W_m3.T + b_m3)

    def test_equation_10_residual_and_layer_norm(self, equations: Equations) -> None:
        """H7 = LayerNorm(Dropout(H6) + H4), dropout being off here; it is the next layer's X."""
        for i, _, h in equations.layers():
            gamma, beta = equations.weight_and_bias(i, "output.LayerNorm")
            equations.check(i, "H7", layer_norm(h["H6"] + h["H4"], gamma, beta))
            assert torch.equal(h["H7"], equations.ours.state[i + 1])

    def test_pooled_output_and_logits(self, equations: Equations) -> None:
        """The pooled output is tanh(W_p h + b_p), h being [CLS]; logits = W_c pooled + b_c."""
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
        """Q, K, V, H1 .. H7 of every layer, every hidden state, the pooled output, the logits."""
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

    def test_equations_7_and_10_without_residual_are_another_function(self) -> None:
        """H4 = Dropout(LayerNorm(H3)) and H7 = Dropout(LayerNorm(H6)), dropout being off."""
        e = Equations(torch.float64)
        for i in range(L):
            h = e.theirs.layer[i]
            printed_H4 = layer_norm(h["H3"], *e.weight_and_bias(i, "attention.output.LayerNorm"))
            printed_H7 = layer_norm(h["H6"], *e.weight_and_bias(i, "output.LayerNorm"))
            assert (printed_H4 - h["H4"]).abs().mean() > 0.1
            assert (printed_H7 - h["H7"]).abs().mean() > 0.1

    @pytest.mark.parametrize("side", ["spafit", "spafit fused", "Hugging Face"])
    @pytest.mark.parametrize("name", ["SelfOutput", "Output"])
    def test_dropout_falls_before_the_residual(self, name: str, side: str) -> None:
        """With nearly all dropped, LayerNorm(residual) is left; as printed, zeros would be."""
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
        """With one token P = 1, so a head's whole H1 is dropped or doubled, at a rate of 1/2.

        Dropout on H1, as printed, would drop and double its entries one by one.
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
    trace have each map called by itself, so that Q, K, V, H1, H3 and H6 are seen in this form too.
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
    """Give the logits, and every parameter's gradient of a pull at each of them."""
    output = model(**inputs)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    generator = torch.Generator().manual_seed(7)
    pull = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad((logits * pull).sum(), list(named.values()))
    return logits, dict(zip(named, gradients, strict=True))


def real_tokens(inputs: Batch) -> torch.Tensor:
    """Give (B, T) of bool: True at real tokens."""
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


def is_packed(inputs: Batch) -> bool:
    """Whether each row begins with a real token; else it stays padded, the pooler looking there."""
    return bool(real_tokens(inputs)[:, 0].all())


def as_packed(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """(B, T, ...) -> (tokens, ...): real tokens alone, the shorter sequences first."""
    order = sorted(range(len(keep)), key=lambda row: int(keep[row].sum()))
    return torch.cat([x[row][keep[row]] for row in order])


FUSED_OPERATIONS = {"_PackedAttentionBackward", "_StackedLinearBackward", "_DropoutAddNormBackward"}


@functools.cache
def runs(batch_name: str, dtype: torch.dtype) -> tuple[Run, Run, Run]:
    """Give the default form's run, the reference form's and Hugging Face's."""
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

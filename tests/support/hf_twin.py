"""spafit's BERT and Hugging Face's with the same weights, batches for both, and what they compute.

The oracle of tests/test_equations.py and tests/kernels/test_default_form.py: transformers' BERT
with ``attn_implementation="eager"``.

Two tensors are the same if they differ by at most 1e-12 in float64 or 1e-5 in float32, absolutely
while their entries are of the order of 1, and as a share of the largest entry where that is larger.

Legend: B batch, T tokens of the longest, D hidden, A heads, Dh head size, F intermediate, L layers,
C labels. All sizes are pairwise unequal, and all weights are far from their initial values, so that
a swapped axis or a dropped term fails.
"""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import nn

import spafit.layout
from spafit.bert import BertForSequenceClassification, set_impl
from spafit.config import BertConfig

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

# Symbol -> path in a layer, whose output it is on both sides. The printed H3 and H6 stand for
# nothing in the checkpoint; the linear maps inside their equations do.
PATHS = {
    "H2": "attention.self",
    "W3 H2 + b3": "attention.output.dense",
    "H4": "attention.output",
    "H5": "intermediate",
    "W6 H5 + b6": "output.dense",
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
    layer: list[dict[str, torch.Tensor]]  # per layer: Q, K, V, P, H1 (per head), and PATHS
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
    """Return spafit's trace, Hugging Face's, and the weights they share."""
    config, batch = BATCHES[batch_name]
    ours, theirs = make_pair(config, dtype)
    return trace(ours, batch), trace(theirs, batch), ours.state_dict()


def names_in_graph(tensor: torch.Tensor) -> set[str]:
    """Return the names of all operations that autograd recorded on the way to ``tensor``."""
    nodes, found = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [before for before, _ in node.next_functions]
    return {node.name() for node in found}

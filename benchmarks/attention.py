"""Attention over sequences of real lengths, forward and backward, dropout on.

    python -m benchmarks.attention --task rte

The baseline is what transformers does: queries, keys and values padded to the longest sequence of
the batch, PyTorch's ``scaled_dot_product_attention`` with a mask. The candidates take the packed
tokens, in each form of ``spafit.kernels.packed_attention``; in the fused one also with one bundle a
sequence, and with one bundle for all, which pads to the longest as the baseline does, to show what
dividing the sequences into bundles is worth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders.models import SHAPES
from benchmarks.contenders.packed_pairs import Pair
from benchmarks.harness.arguments import add_data_arguments, device_of, settings_of
from benchmarks.harness.lengths import load_rows
from benchmarks.harness.report import place, results, write_results
from benchmarks.harness.timing import Contender, Rows, compare
from spafit.kernels import packed_attention
from spafit.kernels.packed_attention import make_bundles

TOLERANCE = 1e-4


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_data_arguments(parser, out="attention")
    parser.add_argument("--model-shape", choices=SHAPES, default="large", help="for D and A")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--impls", nargs="+", default=["reference", "sdpa", "fused"])
    parsed = parser.parse_args(arguments)
    device = device_of(parsed)
    config = SHAPES[parsed.model_shape]
    A, D = config.num_attention_heads, config.hidden_size

    data = load_rows(parsed.task, "train", parsed.data, parsed.vocab)
    batches = data.draw(parsed.batches, parsed.batch_size, parsed.seed)
    torch.manual_seed(parsed.seed)
    lengths = data.encodings.lengths
    drawn = {rows: [lengths[row] for row in rows.numbers] for rows in batches}
    pairs = {rows: Pair.draw(its, 3 * D, D, device) for rows, its in drawn.items()}
    timings = compare(
        padded_contender(pairs, A, parsed.dropout),
        [
            *(packed_contender(pairs, A, parsed.dropout, impl) for impl in parsed.impls),
            packed_contender(pairs, A, parsed.dropout, "fused", "one a sequence"),
            packed_contender(pairs, A, parsed.dropout, "fused", "one for all"),
        ],
        batches,
        repeats=parsed.repeats,
        tolerance=TOLERANCE,
    )
    settings = {
        **settings_of(parsed, data.source),
        "heads": A,
        "dropout": parsed.dropout,
    }
    rows = results(settings, timings, place(device, "float32"))
    title = f"Attention, D = {D}, {A} heads, dropout {parsed.dropout:g}, {parsed.task.upper()}"
    write_results(parsed.out, rows, title)


def padded_contender(pairs: dict[Rows, Pair], num_heads: int, dropout: float) -> Contender:
    """Make the baseline, as transformers computes it."""

    def attend(batch: Pair, rate: float) -> tuple[Tensor, Tensor]:
        B, T, _ = batch.padded.shape
        Q, K, V = (
            part.view(B, T, num_heads, -1).transpose(1, 2) for part in batch.padded.chunk(3, dim=2)
        )
        mask = batch.keep[:, None, None, :].expand(B, 1, T, T)
        H1 = F.scaled_dot_product_attention(Q, K, V, attn_mask=mask, dropout_p=rate)
        output = H1.transpose(1, 2).reshape(B, T, -1)
        [gradient] = torch.autograd.grad(output, batch.padded, batch.padded_upstream)
        return output, gradient

    def check(rows: Rows) -> dict[str, Tensor]:
        output, gradient = attend(pairs[rows], 0.0)
        keep = pairs[rows].keep
        return {"output": output[keep], "gradient of Q, K and V": gradient[keep]}

    return Contender("padded, SDPA", lambda rows: attend(pairs[rows], dropout), check)


def packed_contender(
    pairs: dict[Rows, Pair], num_heads: int, dropout: float, impl: str, division: str = ""
) -> Contender:
    """Make a candidate on packed tokens, in the layout's bundles or in another division."""

    def attend(batch: Pair, rate: float) -> tuple[Tensor, Tensor]:
        lengths = batch.layout.lengths
        bundles = batch.layout.bundles
        if division:
            counts = [len(lengths)] if division == "one for all" else [1] * len(lengths)
            bundles = make_bundles(lengths, counts, batch.packed.device)
        output = packed_attention(batch.packed, bundles, num_heads, rate, impl)
        [gradient] = torch.autograd.grad(output, batch.packed, batch.packed_upstream)
        return output, gradient

    def check(rows: Rows) -> dict[str, Tensor]:
        output, gradient = attend(pairs[rows], 0.0)
        return {
            "output": output[: rows.tokens],
            "gradient of Q, K and V": gradient[: rows.tokens],
        }

    name = ", ".join(filter(None, ("packed", impl, division)))
    return Contender(name, lambda rows: attend(pairs[rows], dropout), check)


if __name__ == "__main__":
    main()

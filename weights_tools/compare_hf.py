"""Compare our BERT with Hugging Face's, layer by layer, on the same weights (``compare-hf``)."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from spafit.errors import WeightsError
from spafit.text.tokenization import load_tokenizer
from spafit.weights.hub import local_folder
from spafit.weights.pretrained import load_pretrained, load_report

SENTENCES = (
    "The cat that the children saw sleeps.",
    "No weapons of mass destruction were found in the country, the report said on Tuesday.",
    "Yes.",
)

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCES = {"float32": 1e-5, "float64": 1e-12}

EPILOG = """\
examples:
  python -m weights_tools compare-hf tiny
  python -m weights_tools compare-hf models/my-bert --dtype float64 --text "Any sentence."
"""


@dataclass(frozen=True)
class Row:
    """The difference between one hidden state and Hugging Face's.

    Attributes
    ----------
    name : str
        Which: embeddings, layer 0 and so on, pooled.
    difference : float
        The largest absolute difference over all real tokens.
    largest : float
        The largest absolute value of Hugging Face's.
    tolerance : float
        What :attr:`difference` may be where all values are within 1; relative to
        :attr:`largest` where they are not.
    """

    name: str
    difference: float
    largest: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the two are the same to the tolerance; a NaN never is."""
        return self.difference <= self.tolerance * max(1.0, self.largest)


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command."""
    parser = verbs.add_parser(
        "compare-hf",
        help="run Hugging Face's BERT and ours, and print the largest difference, layer by layer",
        description="Run transformers' eager BERT and spafit's on the same sentences and weights, "
        "and print the largest absolute difference of every hidden state, and OK or DIFF. The exit "
        "code is 0 if all are OK, else 1. Needs transformers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="a model's folder or hub name")
    parser.add_argument(
        "--text", action="append", metavar="TEXT", help="a sentence; may be given several times"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of both (float32)")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="the difference that is still OK where values are within 1, and relative to the "
        "largest value where they are not (1e-5 in float32, 1e-12 in float64)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print one line for each hidden state; return 1 if one differs."""
    tolerance = options.tolerance if options.tolerance is not None else TOLERANCES[options.dtype]
    rows = compare(
        options.folder, list(options.text or SENTENCES), DTYPES[options.dtype], tolerance
    )
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  {'difference':>10}  {'largest':>10}")
    for row in rows:
        verdict = "OK" if row.ok else "DIFF"
        print(f"{row.name:{width}}  {row.difference:10.2e}  {row.largest:10.2e}  {verdict}")
    return 0 if all(row.ok for row in rows) else 1


def compare(
    name_or_folder: str, texts: list[str], dtype: torch.dtype, tolerance: float
) -> list[Row]:
    """Run both models.

    Parameters
    ----------
    name_or_folder : str
        As for :func:`spafit.weights.pretrained.load_pretrained`; with the files of a tokenizer.
    texts : list of str
        One batch, padded to the longest.
    dtype : torch.dtype
        Of both models.
    tolerance : float
        See :class:`Row`.

    Returns
    -------
    list of Row
        The embeddings, each layer, and the pooled output where the file has a pooler.

    Raises
    ------
    WeightsError
        If transformers is missing, or the weights cannot be loaded.
    """
    try:
        import transformers
    except ImportError:
        raise WeightsError(
            "compare-hf needs transformers, to compare with: pip install '.[test]'"
        ) from None
    folder = local_folder(name_or_folder)
    ours = load_pretrained(folder, dtype=dtype)
    max_length = ours.config.max_position_embeddings
    batch = load_tokenizer(folder).encode(texts, max_length=max_length).batch(range(len(texts)))
    transformers.logging.set_verbosity_error()  # it lists the tensors that it leaves out
    transformers.logging.disable_progress_bar()
    theirs = transformers.BertModel.from_pretrained(
        folder, attn_implementation="eager", local_files_only=True
    )
    theirs = theirs.to(dtype).eval()
    arguments = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    with torch.no_grad():
        found = ours.bert(*arguments, output_hidden_states=True)
        expected = theirs(*arguments, output_hidden_states=True)

    real = batch.attention_mask.bool()  # (B, T); values at padding have no meaning
    rows = []
    for number, (a, b) in enumerate(
        zip(found.hidden_states, expected.hidden_states, strict=True), start=-1
    ):
        name = "embeddings" if number < 0 else f"layer {number}"
        rows.append(_row(name, a[real], b[real], tolerance))
    drawn = {name for name, _ in load_report(ours).newly_drawn}
    if "bert.pooler.dense.weight" not in drawn:
        rows.append(_row("pooled", found.pooler_output, expected.pooler_output, tolerance))
    return rows


def _row(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> Row:
    difference = float((found - expected).abs().max())
    return Row(name, difference, float(expected.abs().max()), tolerance)

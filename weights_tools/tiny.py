"""Write a small random BERT with a tokenizer, in each of the known spellings (``make-tiny``)."""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path

import torch

from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import WeightsError
from spafit.files.replacing import replacing
from spafit.text.tokenization import load_tokenizer
from spafit.weights.safefile import save_tensors

STYLES = {
    "new": "with the prefix bert., LayerNorm weight and bias",
    "old": "with the prefix bert., LayerNorm gamma and beta, and the heads cls.*",
    "bare": "without prefix, LayerNorm weight and bias, and position_ids",
}
"""The naming styles of real checkpoints."""

WORDS = "the a cat dog child children student teacher sees see likes like sleeps sleep old quickly"

EPILOG = """\
examples:
  python -m weights_tools make-tiny tiny
  python -m weights_tools make-tiny old --style old --layers 6 --seed 1
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command."""
    parser = verbs.add_parser(
        "make-tiny",
        help="write a small random checkpoint with tokenizer, for tests",
        description="Write config.json, model.safetensors and a cased tokenizer of a small random "
        "BERT, which spafit and transformers both load. All sizes differ from each other.",
        epilog=EPILOG + "\nstyles:\n" + "".join(f"  {k:5} {v}\n" for k, v in STYLES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="to be made; empty if it exists")
    parser.add_argument("--style", choices=STYLES, default="new", help="spelling (new)")
    parser.add_argument("--seed", type=int, default=0, help="of the values (0)")
    parser.add_argument("--layers", type=int, default=4, metavar="L", help="layers (4)")
    parser.add_argument("--hidden", type=int, default=24, metavar="D", help="hidden size (24)")
    parser.add_argument("--heads", type=int, default=3, metavar="A", help="attention heads (3)")
    parser.add_argument(
        "--intermediate", type=int, default=37, metavar="F", help="intermediate size (37)"
    )
    parser.add_argument("--positions", type=int, default=53, help="longest sequence (53)")
    parser.add_argument(
        "--labels", type=int, metavar="C", help="write a classifier with C labels too"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the folder, and print what it holds."""
    folder = make_tiny(
        options.folder,
        seed=options.seed,
        style=options.style,
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        intermediate_size=options.intermediate,
        max_position_embeddings=options.positions,
        num_labels=options.labels,
    )
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


def make_tiny(
    folder: str | Path,
    *,
    seed: int = 0,
    style: str = "new",
    num_hidden_layers: int = 4,
    hidden_size: int = 24,
    num_attention_heads: int = 3,
    intermediate_size: int = 37,
    max_position_embeddings: int = 53,
    num_labels: int | None = None,
) -> Path:
    """Write a small random BERT that spafit and transformers both load.

    Every parameter, including LayerNorms and biases, is far from its usual initial value, so that a
    swapped or missing one is noticed. A seed gives the same values in every style.

    Parameters
    ----------
    folder : str or Path
        To be made; an existing one must be empty.
    seed : int
        Of the values.
    style : str
        A key of :data:`STYLES`.
    num_hidden_layers, hidden_size, num_attention_heads, intermediate_size : int
        L, D, A and F. The defaults, with 2 token types and the vocabulary, are pairwise unequal.
    max_position_embeddings : int
        The longest sequence.
    num_labels : int, optional
        C of a classifier to be written too; None writes none.

    Returns
    -------
    Path
        The folder: config.json, model.safetensors, vocab.txt, tokenizer.json and
        tokenizer_config.json.

    Raises
    ------
    WeightsError
        If the folder is not empty or cannot be written, or there is no such style.
    ConfigError
        If the sizes do not go together.
    """
    if style not in STYLES:
        raise WeightsError(f"there is no style {style!r}; give one of {', '.join(STYLES)}")
    vocabulary = _vocabulary()
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        type_vocab_size=2,
    )
    tensors = _respell(_draw(config, num_labels, seed), style, config)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise WeightsError(f"{folder} is not empty; give a folder that is, or a new one")
    except OSError as error:
        raise WeightsError(f"{folder} cannot be made: {error.strerror}") from None
    with replacing(folder / "vocab.txt", WeightsError) as temporary:
        temporary.write_text("\n".join(vocabulary) + "\n", encoding="utf-8", newline="\n")
    load_tokenizer(folder).save(folder)
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    labels = {"num_labels": num_labels} if num_labels else {}
    entries = {"architectures": ["BertModel"], **labels, **config.to_json_dict()}
    # Last, so that an incomplete folder is not a valid model.
    with replacing(folder / "config.json", WeightsError) as temporary:
        temporary.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    return folder


def _vocabulary() -> list[str]:
    """Return special tokens, every printable ASCII character, its continuation, and some words."""
    alphanumeric = string.ascii_letters + string.digits
    return [
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        *(alphanumeric + string.punctuation),
        *(f"##{character}" for character in alphanumeric),
        *(word for word in WORDS.split() if len(word) > 1),
    ]


def _draw(config: BertConfig, num_labels: int | None, seed: int) -> dict[str, torch.Tensor]:
    """Draw a value for every parameter of the model, in the order of their names."""
    with torch.device("meta"):
        model = BertForSequenceClassification(config, num_labels or 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, like in sorted(model.state_dict().items()):
        drawn[name] = 0.2 * torch.randn(like.shape, generator=generator, device="cpu")
        if name.endswith("LayerNorm.weight"):
            drawn[name] += 1.0
    if num_labels is None:
        del drawn["classifier.weight"], drawn["classifier.bias"]
    return drawn


def _respell(
    tensors: dict[str, torch.Tensor], style: str, config: BertConfig
) -> dict[str, torch.Tensor]:
    """Rename the tensors as in a style, and add its further ones."""
    D, V, P = config.hidden_size, config.vocab_size, config.max_position_embeddings
    if style == "old":
        older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in older.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        tensors |= {
            "cls.predictions.bias": torch.zeros(V),
            "cls.predictions.transform.dense.weight": torch.eye(D),
            "cls.predictions.transform.dense.bias": torch.zeros(D),
            "cls.predictions.transform.LayerNorm.gamma": torch.ones(D),
            "cls.predictions.transform.LayerNorm.beta": torch.zeros(D),
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
            "cls.seq_relationship.weight": torch.zeros(2, D),
            "cls.seq_relationship.bias": torch.zeros(2),
        }
    if style == "bare":
        tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
        tensors["embeddings.position_ids"] = torch.arange(P)[None]  # (1, P)
    return tensors

"""Masked-token loss. Oracle: transformers' BertForMaskedLM, with the same tokens masked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.small_runs import make_dataset
from torch.nn.functional import cross_entropy

from spafit.errors import ConfigError, DataError, WeightsError
from spafit.experiments.inspect.masked import MASK, load_masked_head, mask, masked_loss
from spafit.text.tokenization import load_tokenizer
from spafit.training.inference import encode
from spafit.weights.pretrained import load_pretrained
from spafit.weights.safefile import SafeFile, save_tensors
from weights_tools.tiny import make_tiny

PREFIX = "cls.predictions."


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny checkpoint whose head of the pre-training is drawn at random."""
    folder = make_tiny(tmp_path_factory.mktemp("headed") / "tiny", style="old", num_hidden_layers=2)
    generator = torch.Generator().manual_seed(3)
    with SafeFile(folder / "model.safetensors") as file:
        tensors = {name: file.read(name) for name in file.tensors}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX) and "decoder" not in name:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def respelt(folder: Path, to: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """Copy a checkpoint with some tensors changed, or left out."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    with SafeFile(folder / "model.safetensors") as file:
        tensors = {name: file.read(name) for name in file.tensors}
    tensors |= {name: value for name, value in change.items() if value is not None}
    kept = {name: value for name, value in tensors.items() if change.get(name, value) is not None}
    save_tensors(to / "model.safetensors", kept, {"format": "pt"})
    return to


def test_is_that_of_transformers(headed: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load_pretrained(headed), load_tokenizer(headed)
    encodings = encode(model, tokenizer, make_dataset("rte", 37), None)
    masked = mask(tokenizer, encodings, 4)
    model.train()
    found = masked_loss(model, load_masked_head(headed, model), masked)
    assert model.training
    theirs = transformers.BertForMaskedLM.from_pretrained(headed).eval()
    batch = masked.encodings.batch(range(37))
    targets = torch.full_like(batch.input_ids, -100)
    for row, (positions, tokens) in enumerate(zip(masked.positions, masked.tokens, strict=True)):
        targets[row, positions] = torch.tensor(tokens)
    with torch.no_grad():
        logits = theirs(**batch).logits
    expected = float(cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert found == pytest.approx(expected, rel=1e-5)
    assert masked.count == int((targets != -100).sum())


def test_which_tokens_are_masked(headed: Path) -> None:
    tokenizer = load_tokenizer(headed)
    texts = ["a cat sees the old dog " * 5, "", "cat", f"cat {MASK}"]
    encodings = tokenizer.encode(texts, max_length=53)
    one, same, other = (mask(tokenizer, encodings, seed) for seed in (1, 1, 2))
    assert one == same and one.positions != other.positions
    mask_id = tokenizer.recipe.vocab[MASK]
    assert list(map(len, one.positions)) == [round(0.15 * 30), 0, 1, 1]
    assert one.positions[3] == [1]  # a [MASK] of the text's own hides nothing that is known
    for before, after, positions, tokens in zip(
        encodings.input_ids, one.encodings.input_ids, one.positions, one.tokens, strict=True
    ):
        assert [before[at] for at in positions] == tokens
        assert all(after[at] == mask_id for at in positions)
        unchanged = set(range(len(before))) - set(positions)
        assert all(before[at] == after[at] for at in unchanged)
        assert not set(tokens) & {tokenizer.cls_id, tokenizer.sep_id, mask_id}
    with pytest.raises(DataError, match="no token that could be masked"):
        mask(tokenizer, tokenizer.encode([""], max_length=9), 0)
    del tokenizer.recipe.vocab[MASK]
    with pytest.raises(ConfigError, match=r"the tokenizer has no \[MASK\]"):
        mask(tokenizer, encodings, 0)


def test_a_head_is_read_strictly(headed: Path, tiny: Path, tmp_path: Path) -> None:
    base = load_pretrained(headed)
    E = base.bert.embeddings.word_embeddings.weight.detach()
    with pytest.raises(WeightsError, match="its head of the pre-training"):
        load_masked_head(tiny, load_pretrained(tiny))
    cases: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
        "untied": ({f"{PREFIX}decoder.weight": E + 1}, "is not the word embeddings"),
        "short": ({f"{PREFIX}bias": torch.zeros(7)}, r"d is \[7\], expected"),
        "part": ({f"{PREFIX}transform.dense.bias": None}, "has no cls.predictions.transform.dense"),
    }
    for name, (change, said) in cases.items():
        with pytest.raises(WeightsError, match=said):
            load_masked_head(respelt(headed, tmp_path / name, change), base)
    without = respelt(headed, tmp_path / "tied", {f"{PREFIX}decoder.weight": None})
    assert torch.equal(load_masked_head(without, base).W, load_masked_head(headed, base).W)

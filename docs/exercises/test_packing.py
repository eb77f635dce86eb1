"""Tests of exercise 5: ``python -m pytest docs/exercises/test_packing.py``."""

import torch
from packing import pack, unpack

import spafit
from spafit.layout import Packed

IDS = torch.tensor([[5, 8, 9, 7, 6], [5, 6, 0, 0, 0], [5, 9, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def test_only_real_tokens_are_left() -> None:
    """10 of 15, in their order, counted from 0 in each sequence."""
    ids, positions, lengths = pack(IDS, MASK)
    assert ids.tolist() == [5, 8, 9, 7, 6, 5, 6, 5, 9, 6]
    assert positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]
    assert lengths == [5, 2, 3]


def test_there_and_back() -> None:
    """What was padding is 0."""
    ids, _, lengths = pack(IDS, MASK)
    back = unpack(ids[:, None].float(), lengths)
    assert back.shape == (3, 5, 1)
    assert torch.equal(back[..., 0].long(), IDS * MASK)


def test_a_model_gives_the_same_hidden_states() -> None:
    """Your packed tokens through spafit's layers, against the padded batch."""
    torch.manual_seed(0)
    config = spafit.BertConfig(hidden_size=20, num_hidden_layers=2, num_attention_heads=5)
    bert = spafit.BertModel(config).eval()
    ids, positions, lengths = pack(IDS, MASK)
    with torch.no_grad():
        X = bert.embeddings(ids, torch.zeros_like(ids), positions)
        X, _ = bert.encoder(X, Packed(lengths))
        padded = bert(IDS, MASK).last_hidden_state
    torch.testing.assert_close(unpack(X, lengths), padded, rtol=0, atol=1e-5)

"""What was forgotten: the adapter off, and probes with it on.

Oracle: the base itself, changed by hand in one number, or not at all.
"""

from __future__ import annotations

import pytest
import torch
from support.small_runs import SmallRun, make_dataset

from spafit.experiments.inspect.forgetting import adapter_off, probe_scores
from spafit.experiments.probe import linear_probe
from spafit.experiments.probe.layers import probe
from spafit.experiments.probe.states import layer_states
from spafit.strata import fingerprint
from spafit.training.inference import encode
from spafit.weights.pretrained import load_pretrained


@pytest.mark.parametrize("method", ["spafit", "spafit-direct"])
def test_an_adapter_that_is_off_is_the_base(small: SmallRun, method: str) -> None:
    base, model = load_pretrained(small.folder), small.model(method)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += parameter.requires_grad * 0.1
    encodings = encode(base, small.tokenizer, make_dataset("rte", 37), None)
    with torch.no_grad():
        after = model(*encodings.batch([0]))
    found = adapter_off(model, base, encodings)
    assert found is not None and found.is_identical and found.texts == 37
    assert found.off == found.base == fingerprint(base)
    with torch.no_grad():
        assert torch.equal(model(*encodings.batch([0])), after)  # it is on again
        assert not torch.equal(base(*encodings.batch([0])), after)

        model.bert.encoder.layer[3].output.dense.weight[0, 0] += 1
    found = adapter_off(model, base, encodings)
    assert found is not None and not found.is_identical
    assert found.off != found.base and not found.states and not found.logits


def test_full_fine_tuning_cannot_be_switched_off(small: SmallRun) -> None:
    base = load_pretrained(small.folder)
    encodings = encode(base, small.tokenizer, small.dev, None)
    assert adapter_off(small.model("full"), base, encodings) is None


class TestProbeScores:
    def test_are_those_of_the_last_layer(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(linear_probe, "STRENGTHS", (1.0, 0.1))  # to save time
        train, dev = small.train, make_dataset("rte", 31, "dev", seed=2)
        base, seeds = load_pretrained(small.folder), [4, 7]
        tasks = {"rte": (train, dev)}
        scores = probe_scores(base, small.tokenizer, tasks, seeds)
        assert list(scores) == [("rte", "cls"), ("rte", "mean")]
        states = {
            split: {
                kind: each[4:]
                for kind, each in layer_states(
                    base, encode(base, small.tokenizer, rows, None)
                ).items()
            }
            for split, rows in (("train", train), ("dev", dev))
        }
        for kind, one in probe(states, train, dev, seeds).items():
            assert scores["rte", kind] == tuple(one.scores["accuracy"][0])

        # An untrained adapter changes no feature, and the same seeds draw the same rows.
        model = small.model()
        assert probe_scores(model, small.tokenizer, tasks, seeds) == scores
        with torch.no_grad():
            model.bert.encoder.layer[3].output.LayerNorm.bias_delta.delta += 1  # constant features
            assert probe_scores(model, small.tokenizer, tasks, seeds) == scores
            model.bert.encoder.layer[3].output.LayerNorm.weight.zero_()
        for (_, kind), each in probe_scores(model, small.tokenizer, tasks, seeds).items():
            assert set(each) <= {15 / 31, 16 / 31}, kind  # nothing is left: a constant answer

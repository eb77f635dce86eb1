"""The states of every layer: what they are, and when kept ones are used again.

Oracle: the model's own hidden states of padded batches in the plain form, and a count of how often
states are computed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.small_runs import SmallRun, make_dataset

import spafit
from spafit.experiments.probe import states
from spafit.experiments.probe.states import FILE, STATES, kept_states, layer_states
from spafit.training.inference import encode
from spafit.weights.pretrained import load_pretrained


class TestLayerStates:
    def test_are_those_of_the_plain_form(self, small: SmallRun) -> None:
        model = load_pretrained(small.folder)
        encodings = encode(model, small.tokenizer, make_dataset("rte", 37), None)
        assert len(set(encodings.lengths)) > 3
        model.train()
        found = layer_states(model, encodings)
        assert model.training
        spafit.set_impl(model.eval(), "reference")
        batch = encodings.batch(range(37))
        with torch.no_grad():
            hidden = torch.stack(model.bert(*batch, output_hidden_states=True).hidden_states)
        mask = batch.attention_mask[:, :, None]
        expected = {"cls": hidden[:, :, 0], "mean": (hidden * mask).sum(2) / mask.sum(1)}
        assert set(found) == set(STATES)
        for name in STATES:
            assert found[name].shape == (5, 37, 24)
            assert torch.allclose(found[name], expected[name], atol=1e-5)


class TestKeptStates:
    @pytest.fixture
    def computed(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Count the rows of each data set whose states are computed."""
        counts: list[int] = []

        def counted(model: object, encodings: object, **more: object) -> object:
            counts.append(len(encodings))  # type: ignore[arg-type]
            return layer_states(model, encodings, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(states, "layer_states", counted)
        return counts

    def test_are_computed_once(self, small: SmallRun, tmp_path: Path, computed: list[int]) -> None:
        said: list[str] = []
        both = [self.states(small, tmp_path, said) for _ in range(2)]
        assert computed == [25, 11]
        assert said == [f"states: those kept in {tmp_path / FILE}"]
        for split in ("train", "dev"):
            for name in STATES:
                assert torch.equal(both[0][split][name], both[1][split][name])
        assert [path.name for path in tmp_path.iterdir()] == [FILE]

    @pytest.mark.parametrize("other", ["base", "config", "tokenizer", "data.train", "data.dev"])
    def test_of_something_else_are_computed_anew(
        self, small: SmallRun, tmp_path: Path, computed: list[int], other: str
    ) -> None:
        said: list[str] = []
        self.states(small, tmp_path, said)
        del computed[:]
        found = self.states(small, tmp_path, said, other)
        assert len(computed) == 2
        assert said == [
            f"states: computed anew, because those in {tmp_path / FILE} are of another {other}"
        ]
        again = self.states(small, tmp_path, said, other)
        assert len(computed) == 2 and torch.equal(again["dev"]["cls"], found["dev"]["cls"])

    @pytest.mark.parametrize("damage", ["cut", "flipped", "not a file of tensors"])
    def test_of_a_damaged_file_are_computed_anew(
        self, small: SmallRun, tmp_path: Path, computed: list[int], damage: str
    ) -> None:
        said: list[str] = []
        before = self.states(small, tmp_path, said)
        path = tmp_path / FILE
        content = bytearray(path.read_bytes())
        if damage == "cut":
            del content[-10:]
        elif damage == "flipped":
            content[-3] ^= 1
        else:
            content = bytearray(b"hello")
        path.write_bytes(content)
        after = self.states(small, tmp_path, said)
        assert len(computed) == 4 and len(said) == 1 and "computed anew, because" in said[0]
        assert torch.equal(before["train"]["mean"], after["train"]["mean"])

    def states(
        self, small: SmallRun, folder: Path, said: list[str], other: str = ""
    ) -> dict[str, dict[str, torch.Tensor]]:
        model, tokenizer = load_pretrained(small.folder), small.tokenizer
        data = {"train": small.train, "dev": small.dev}
        if other == "base":
            with torch.no_grad():
                model.bert.encoder.layer[2].output.dense.bias[3] += 1e-3
        elif other == "config":
            model.bert.config = model.config = dataclasses.replace(
                model.config, layer_norm_eps=1e-5
            )
        elif other == "tokenizer":
            tokenizer = spafit.load_tokenizer(small.folder, split_special_tokens=True)
            assert tokenizer.fingerprint != small.tokenizer.fingerprint
        elif other:
            split = other.removeprefix("data.")
            examples = data[split].examples
            first = dataclasses.replace(examples[0], text_a="dog dog")
            data[split] = dataclasses.replace(data[split], examples=(first, *examples[1:]))
        return kept_states(model, tokenizer, data, folder, say=said.append)

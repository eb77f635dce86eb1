"""``export --format hf``: the folder, as transformers loads it.

Oracle: the run's own logits, in transformers' model, tokenizer and pipeline, to 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.exchanged import PAIRS, TEXTS, a_run, apart, batch_of, logits_of, three

import spafit
from spafit.adapters import IA3, BiasDelta, LayerNormGain, LoRA, SeriesAdapter
from spafit.plans import Plan
from weights_tools.__main__ import main

transformers = pytest.importorskip("transformers")

NORMS = "attention.output.LayerNorm, layer.output.LayerNorm"
PLANS: dict[str, Plan | str] = {
    "spafit": "SPAFIT-0-1-II",
    "bitfit": spafit.plan("bitfit", 4, bias="direct"),
    "full": "full",
    "ia3": "ia3",
    "head": "linear-probe",
    "mixed": three({"query, key": [LoRA(3, 5.0)], "value": [IA3()], NORMS: [LayerNormGain()]}),
}


@pytest.mark.parametrize("name", PLANS)
def test_transformers_loads_it(name: str, tiny: Path, tmp_path: Path) -> None:
    trained = a_run(tmp_path / "run", tiny, PLANS[name])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--format", "hf"]) == 0
    auto = transformers.AutoModelForSequenceClassification
    theirs, said = auto.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    batch = batch_of(tiny)
    expected = logits_of(trained.runs[0].model, batch)
    assert apart(logits_of(theirs, batch), expected) < 1e-5
    base = spafit.load_pretrained(tiny, num_labels=3)
    assert apart(logits_of(base, batch), expected) > 1e-2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(TEXTS, PAIRS, padding=True)["input_ids"] == batch["input_ids"].tolist()
    assert theirs.config.problem_type == "single_label_classification"
    names = ["contradiction", "neutral", "entailment"]  # the run's order, not the task's
    assert theirs.config.id2label == dict(enumerate(names))
    assert theirs.config.label2id == {each: row for row, each in enumerate(names)}
    again = spafit.load_pretrained(tmp_path / "hf", num_labels=3)
    assert apart(logits_of(again, batch), expected) < 1e-6


def test_the_pipeline(tiny: Path, tmp_path: Path) -> None:
    task = spafit.Task("mine", ("text",), ("ill", "Ähnlich"), ("accuracy",))
    trained = a_run(tmp_path / "run", tiny, "SPAFIT-0-1-I", task)
    main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--format", "hf"])
    texts = [*TEXTS, " ".join(["the cat sees"] * 40)]  # longer than the model
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "hf"))
    found = pipe(texts, truncation=True)
    own = spafit.dataset(texts)
    labels, probabilities = trained.predict(
        spafit.dataset([each.text_a for each in own], task=task)
    )
    assert [each["label"] for each in found] == labels
    assert probabilities is not None
    for each, row in zip(found, probabilities, strict=True):
        assert abs(each["score"] - row.max()) < 1e-5


def test_a_score(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a range of its own: the note says how it is had from the logit."""
    task = spafit.Task("mine", ("text",), (), ("pearson",), scale=(3.0, 2.0))
    trained = a_run(tmp_path / "run", tiny, "lora-i", task)
    main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--format", "hf"])
    assert "note: the score is 3.0 + 2.0 times the logit" in capsys.readouterr().out
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "hf"))
    scores, _ = trained.predict(spafit.dataset(TEXTS, task=task))
    found = [3.0 + 2.0 * each["score"] for each in pipe(TEXTS)]
    assert apart(torch.tensor(found), torch.tensor(scores)) < 1e-4


class TestRefusals:
    def refused(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
        assert main([str(each) for each in arguments]) == 2
        [line] = capsys.readouterr().err.strip().split("\n")
        return line

    def test_what_has_no_merged_form(
        self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plan = three({"layer.output": [SeriesAdapter()], "query": [BiasDelta()]})
        a_run(tmp_path / "run", tiny, plan)
        said = self.refused(capsys, "export", tmp_path / "run", tmp_path / "hf", "--format", "hf")
        assert "adapters.series" in said and "--format adapters" in said
        assert not (tmp_path / "hf").exists()

    def test_a_folder_in_use(
        self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        a_run(tmp_path / "run", tiny, "lora-i")
        said = self.refused(capsys, "export", tmp_path / "run", tmp_path, "--format", "hf")
        assert "is not empty" in said
        said = self.refused(capsys, "export", tiny, tmp_path / "hf", "--format", "hf")
        assert "run.json" in said
        assert not (tmp_path / "hf").exists()

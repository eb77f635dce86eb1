"""Whether a file's classifier is taken, and what is said of it, on tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spafit.bert import BertForSequenceClassification
from spafit.errors import WeightsError
from spafit.weights.heads import label_names_of
from spafit.weights.pretrained import load_pretrained, load_report, load_weights
from weights_tools import make_tiny

ONE = {"num_hidden_layers": 1, "num_labels": 2}
NAMES = {"id2label": {"0": "NO", "1": "YES"}}


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("headed") / "two", **ONE)


def load(folder: Path, changes: dict[str, Any], num_labels: int = 2) -> Any:
    """Load a folder whose config.json says something more."""
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **changes}))
    try:
        return load_pretrained(folder, num_labels=num_labels)
    finally:
        path.write_text(before)


def is_taken(model: BertForSequenceClassification, folder: Path) -> bool:
    stored = load_file(folder / "model.safetensors")["classifier.weight"]
    return torch.equal(model.classifier.weight, stored)


class TestKind:
    """Oracle: the file's rows, which are taken or not; one line of the report says which and why.

    By default `architectures` says what make_tiny writes: BertModel, as where a config.json was
    copied from the base.
    """

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"architectures": None},
            {"architectures": []},
            {"architectures": ["BertForSequenceClassification"]},
            {"architectures": "BertForSequenceClassification"},
            {"architectures": ["BertForMaskedLM"]},
            {"problem_type": "single_label_classification"},
            {"problem_type": None},
        ],
        ids=str,
    )
    def test_a_classifier_of_sentences_is_taken(
        self, headed: Path, changes: dict[str, Any]
    ) -> None:
        model = load(headed, changes)
        assert is_taken(model, headed)
        assert load_report(model).newly_drawn == ()
        assert str(load_report(model)).count("took the file's classifier: the order of its ") == 1

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification, no"),
            ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice, no BertFor"),
            ({"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering, no BertF"),
            ({"architectures": ["BertModel", "BertCRF"]}, "name BertCRF"),
            ({"architectures": ["BertForMultiLabelSequenceClassification"]}, "BertForMultiLabel"),
            ({"architectures": ["BertMulti_labelForSequenceClassification"]}, "name BertMulti_"),
            ({"architectures": "BertForTokenClassification"}, "BertForTokenClassification"),
            ({"architectures": ["a\x1b[1m\n"]}, r"name a\x1b[1m\n, no"),
            ({"architectures": [3]}, "name 3, no"),
            ({"problem_type": "multi_label_classification"}, "multi_label_classification: the fil"),
            ({"problem_type": "regression"}, "regression: the file's classifier is of another"),
        ],
        ids=str,
    )
    def test_a_head_of_another_kind_is_drawn_anew(
        self, headed: Path, changes: dict[str, Any], reason: str
    ) -> None:
        model = load(headed, {**changes, **NAMES})
        assert not is_taken(model, headed)
        report = load_report(model)
        assert [name for name, _ in report.dropped] == ["classifier.weight", "classifier.bias"]
        assert [name for name, _ in report.newly_drawn] == ["classifier.weight", "classifier.bias"]
        assert str(report).count(reason) == 4
        assert (report.head, report.labels) == ("", None)

    def test_a_score_may_be_a_regression(self, tmp_path: Path) -> None:
        folder = make_tiny(tmp_path / "score", num_hidden_layers=1, num_labels=1)
        model = load(folder, {"problem_type": "regression", "id2label": {"0": "LABEL_0"}}, 1)
        assert is_taken(model, folder)
        assert load_report(model).labels is None
        assert "took the file's classifier: a score\n" in f"{load_report(model)}\n"
        choice = load(folder, {"architectures": ["BertForMultipleChoice"]}, 1)
        assert not is_taken(choice, folder)

    def test_a_head_of_another_shape_or_none_is_told_as_before(self, headed: Path) -> None:
        report = load_report(load(headed, {**NAMES, "architectures": ["BertCRF"]}, 3))
        assert "the model needs [3, 24]" in report.newly_drawn[0][1]
        assert (report.head, report.labels) == ("", None)


class TestNames:
    """Oracle: what each config.json says by itself."""

    @pytest.mark.parametrize(
        ("entries", "names"),
        [
            (NAMES, ("NO", "YES")),
            ({"id2label": {"1": "YES", "0": "NO"}}, ("NO", "YES")),
            ({"id2label": {"0": 1, "1": 0}}, ("1", "0")),
            ({"id2label": {"0": "note", "1": "none"}}, ("note", "none")),
            ({"label2id": {"YES": 1, "NO": 0}}, ("NO", "YES")),
            ({"label2id": {"YES": "1", "NO": "0"}}, ("NO", "YES")),
            ({"label2id": ["NO", "YES"]}, ("NO", "YES")),
            ({"id2label": ["NO", "YES"]}, ("NO", "YES")),
            ({"id2label": {"01": "YES", "00": "NO"}}, ("NO", "YES")),
            ({**NAMES, "label2id": {"YES": 7}}, ("NO", "YES")),
            ({**NAMES, "label2id": {"yes": 1, "no": 0}}, ("NO", "YES")),
            ({**NAMES, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, ("NO", "YES")),
            ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"a": 1, "b": 0}}, "ba"),
        ],
        ids=str,
    )
    def test_are_known(self, entries: dict[str, Any], names: tuple[str, ...] | str) -> None:
        found, words = label_names_of(entries, 2)
        assert found == tuple(names)
        assert ", ".join(names) in words

    @pytest.mark.parametrize(
        "entries",
        [
            {},
            {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
            {"id2label": ["LABEL_0", "LABEL_1"], "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
            {"id2label": {}, "label2id": None},
        ],
        ids=str,
    )
    def test_are_unknown(self, entries: dict[str, Any]) -> None:
        assert label_names_of(entries, 2) == (
            None,
            "the order of its labels is unknown, because config.json does not name them",
        )

    @pytest.mark.parametrize(
        "entries",
        [
            {"id2label": {"0": "LABEL_1", "1": "YES"}},
            {"id2label": {"0": "NO", "1": "no"}},
            {"id2label": {"0": "NO"}},
            {"id2label": {"0": "NO", "1": "YES", "2": "PERHAPS"}},
            {"id2label": {"1": "NO", "2": "YES"}},
            {"id2label": {"0": "NO", "00": "YES"}},
            {"id2label": {"0": "NO", "1": None}},
            {"id2label": {"0": "NO", "1": True}},
            {"id2label": {"0": "NO", "1": ["YES"]}},
            {"id2label": ["NO", "NO"]},
            {"id2label": "NO, YES"},
            {"label2id": {"NO": 0, "YES": 0}},
            {"label2id": {"NO": False, "YES": True}},
            {"label2id": {"NO": [], "YES": {}}},
            {"label2id": {"NO": "a", "YES": "1\n"}},
        ],
        ids=str,
    )
    def test_that_are_not_understood_are_said(self, entries: dict[str, Any]) -> None:
        found, words = label_names_of(entries, 2)
        [(key, _)] = entries.items()
        assert found is None
        assert f"is unknown, because config.json's {key} does not give each of the 2 rows" in words
        assert words.isprintable()

    @pytest.mark.parametrize("kind", [int, str])
    def test_that_contradict_each_other_are_unknown(self, kind: type) -> None:
        ids = {"YES": kind(0), "NO": kind(1)}
        found, words = label_names_of({**NAMES, "label2id": ids}, 2)
        assert found is None
        assert "id2label and label2id do not agree" in words

    def test_are_in_the_report(self, headed: Path) -> None:
        report = load_report(load(headed, {"id2label": {"0": "a\x1b[1m\nb", "1": "YES"}}))
        assert report.labels == ("a\x1b[1m\nb", "YES")
        line = r"took the file's classifier: its labels are a\x1b[1m\nb, YES, in this order, by con"
        assert line in str(report)

    def test_weights_alone_name_nothing(self, headed: Path, tmp_path: Path) -> None:
        """A folder without a config.json, for a model that is there already."""
        model = load_pretrained(headed)
        (tmp_path / "model.safetensors").write_bytes((headed / "model.safetensors").read_bytes())
        assert "is unknown" in load_weights(model, tmp_path).head
        (tmp_path / "config.json").write_text("[]")
        with pytest.raises(WeightsError, match="must hold a JSON object, found list"):
            load_weights(model, tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(WeightsError, match="cannot be read as JSON"):
            load_weights(model, tmp_path)

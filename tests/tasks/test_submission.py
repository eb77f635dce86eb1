"""The submission files, written, zipped and refused."""

import zipfile
from pathlib import Path

import pytest

from spafit.errors import DataError
from spafit.tasks.glue import load, read_file
from spafit.tasks.submission import missing_submissions, write_submission, zip_submission


class TestSubmission:
    """Oracle: GLUE's form, as its server's sample submission shows it."""

    def test_numbers_for_cola(self, tmp_path: Path) -> None:
        predictions = ["acceptable", "unacceptable"] * 531 + ["acceptable"]
        path = write_submission(tmp_path / "new", "cola", predictions)
        assert path == tmp_path / "new" / "CoLA.tsv"
        lines = path.read_bytes().split(b"\n")
        assert lines[:3] == [b"index\tprediction", b"0\t1", b"1\t0"]
        assert lines[-2:] == [b"1062\t1", b""]
        assert len(lines) == 1063 + 2

    def test_wnli_counts_the_other_way_round_than_rte(self, tmp_path: Path) -> None:
        wnli = write_submission(tmp_path, "wnli", ["entailment"] * 146)
        assert wnli.read_text().endswith("\n145\t1\n")
        rte = write_submission(tmp_path, "rte", ["not_entailment"] * 3000)
        assert rte.read_text().endswith("\n2999\tnot_entailment\n")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["RTE.tsv", "WNLI.tsv"]

    def test_names_for_mnli(self, tmp_path: Path) -> None:
        path = write_submission(tmp_path, "mnli-mm", ["contradiction"] * 9847)
        assert path.name == "MNLI-mm.tsv"
        assert path.read_text().startswith("index\tprediction\n0\tcontradiction\n")

    def test_scores_are_clipped_to_three_places(self, tmp_path: Path) -> None:
        scores = [5.3, -0.2, -0.0, 2.34567, 1, 4.9996] + [2.5] * 1373
        lines = write_submission(tmp_path, "sts-b", scores).read_text().splitlines()
        values = [line.split("\t")[1] for line in lines[1:8]]
        assert values == ["5.000", "0.000", "0.000", "2.346", "1.000", "5.000", "2.500"]

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"RTE.tsv needs 3000 predictions.*found 2999"):
            write_submission(tmp_path, "rte", ["entailment"] * 2999)
        with pytest.raises(DataError, match="prediction 145 for WNLI is '1'; expected one of not_"):
            write_submission(tmp_path, "wnli", ["entailment"] * 145 + ["1"])
        for wrong in (float("nan"), float("inf"), "3.0"):
            with pytest.raises(DataError, match=r"prediction 0 for STS-B is .* finite number"):
                write_submission(tmp_path, "sts-b", [wrong] + [2.5] * 1378)
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match="file cannot be created"):
            write_submission(tmp_path / "file", "wnli", ["entailment"] * 146)

    def test_the_data_set_that_was_predicted(self, tmp_path: Path, glue_root: Path) -> None:
        predictions = ["entailment"] * 146
        test = load("wnli", "test", glue_root)
        assert write_submission(tmp_path, "wnli", predictions, dataset=test).is_file()
        with pytest.raises(DataError, match="test split of WNLI, found the dev split of WNLI"):
            write_submission(tmp_path, "wnli", predictions, dataset=load("wnli", "dev", glue_root))
        with pytest.raises(DataError, match="test split of WNLI, found the test split of RTE"):
            write_submission(tmp_path, "wnli", predictions, dataset=load("rte", "test", glue_root))
        body = (glue_root / "WNLI" / "test.tsv").read_text() + "146\tbad\n"
        (tmp_path / "t.tsv").write_text(body)
        bad = read_file("wnli", tmp_path / "t.tsv", "test", max_bad_rows=1)
        with pytest.raises(DataError, match="read without 1 bad row,"):
            write_submission(tmp_path, "wnli", predictions, dataset=bad)

    def test_zip(self, tmp_path: Path) -> None:
        write_submission(tmp_path, "wnli", ["entailment"] * 146)
        write_submission(tmp_path, "ax", ["neutral"] * 1104)
        (tmp_path / "notes.tsv").write_text("not a submission")
        assert missing_submissions(tmp_path) == (
            "CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "STS-B.tsv", "QQP.tsv", "MNLI-m.tsv",
            "MNLI-mm.tsv", "QNLI.tsv", "RTE.tsv",
        )  # fmt: skip
        path = zip_submission(tmp_path)
        with zipfile.ZipFile(path) as archive:
            assert archive.namelist() == ["WNLI.tsv", "AX.tsv"]
            assert archive.read("WNLI.tsv") == (tmp_path / "WNLI.tsv").read_bytes()
        once = path.read_bytes()
        assert zip_submission(tmp_path).read_bytes() == once
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "AX.tsv", "WNLI.tsv", "notes.tsv", "submission.zip",
        ]  # fmt: skip

    def test_zip_refuses_what_glue_would(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no submission file"):
            zip_submission(tmp_path)
        path = write_submission(tmp_path, "wnli", ["entailment"] * 146)
        good = path.read_text()
        for bad, message in (
            (good.replace("index\t", "id\t"), "not in GLUE's form"),
            (good + "146\t1\n", "146 rows, found .* and 147 rows"),
            (good.removesuffix("\n"), "not in GLUE's form"),
            (good.replace("7\t1", "7\t2"), "line 9: expected index 7"),
            (good.replace("7\t1", "8\t1"), "line 9: expected index 7"),
        ):
            path.write_text(bad)
            with pytest.raises(DataError, match=message):
                zip_submission(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["WNLI.tsv"]

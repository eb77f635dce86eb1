"""Names in zips and indices that lead out of the folder: nothing outside is written or removed."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.file_server import FileServer
from support.outside import CLIMBING, PROMISE, Place, Promise, served, tree

from spafit.errors import DataError, SpafitError, WeightsError
from spafit.tasks import download
from spafit.tasks.download import DownloadError, Original, Source, download_glue
from spafit.text.tokenization import load_tokenizer
from spafit.weights.safe_folder import SafeFolder

RTE = {
    "RTE/train.tsv": b"index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
    "RTE/dev.tsv": b"index\tsentence1\tsentence2\tlabel\n0\tC.\tD.\tnot_entailment\n",
    "RTE/test.tsv": b"index\tsentence1\tsentence2\n0\tE.\tF.\n1\tG.\tH.\n",
}


Member = tuple[str, bytes, int]
"""Name, content, and the kind that Unix gives a file."""


def zip_as_named(members: list[Member], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Make a zip whose names and kinds are written as they are given, whatever zipfile thinks."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # a name twice
        for name, data, kind in members:
            entry = zipfile.ZipInfo("x")
            entry.filename = name  # as it is, a NUL and all
            entry.create_system = 3
            entry.compress_type = method
            entry.external_attr = (kind | 0o777) << 16
            archive.writestr(entry, data)
    return buffer.getvalue()


def whole() -> list[Member]:
    return [(name, data, stat.S_IFREG) for name, data in RTE.items()]


def without_dev(*more: Member) -> list[Member]:
    return [*(each for each in whole() if each[0] != "RTE/dev.tsv"), *more]


def fetch(place: Place, body: bytes) -> tuple[Path, ...]:
    """Fetch RTE's zip, whose hash is the one that is expected."""
    source = Source("zip", (Original("x/RTE.zip", len(body), hashlib.sha256(body).hexdigest()),))
    with FileServer() as server, served(server):
        server.files["/x/RTE.zip"] = body
        return download_glue(
            ["rte"],
            place.inside / "data",
            originals=place.inside / "originals",
            base_url=server.url,
            sources={"RTE": source},
            attempts=1,
        )


HOSTILE = {
    "a link to a file": without_dev(("RTE/dev.tsv", b"../../outside/secret", stat.S_IFLNK)),
    "a link to a folder": without_dev(
        ("RTE", b"../../outside", stat.S_IFLNK), ("RTE/dev.tsv", b"evil", stat.S_IFLNK)
    ),
    "a character device": without_dev(("RTE/dev.tsv", b"", stat.S_IFCHR)),
    "a block device": without_dev(("RTE/dev.tsv", b"", stat.S_IFBLK)),
    "a pipe": without_dev(("RTE/dev.tsv", b"", stat.S_IFIFO)),
    "a socket": without_dev(("RTE/dev.tsv", b"", stat.S_IFSOCK)),
    "a folder": without_dev(("RTE/dev.tsv", b"", stat.S_IFDIR)),
    "a folder by its name": without_dev(("RTE/dev.tsv/", b"", stat.S_IFDIR)),
    "twice": [*whole(), ("RTE/dev.tsv", b"evil", stat.S_IFREG)],
    "twice, once as a link": [*whole(), ("RTE/dev.tsv", b"/etc/passwd", stat.S_IFLNK)],
    "only one like it": without_dev(("RTE/../RTE/dev.tsv", b"evil", stat.S_IFREG)),
    "a bomb": without_dev(("RTE/dev.tsv", bytes((64 << 20) + 1), stat.S_IFREG)),
    "a NUL in one like it": [*whole(), ("RTE/dev.tsv\0/../new", b"evil", stat.S_IFREG)],
}


class TestZip:
    """Oracle: the three members' bytes arrive, or an error; and the tree around is the same."""

    @pytest.mark.parametrize("case", [case for case in CLIMBING if case != "NUL"])
    def test_beside_the_right_members(self, place: Place, promise: Promise, case: str) -> None:
        name = CLIMBING[case].format(root=place.root)
        with place.kept():
            fetch(place, zip_as_named([(name, b"evil", stat.S_IFREG), *whole()]))
        data = tree(place.inside / "data")
        assert sorted(data) == ["RTE", *sorted(RTE)]
        assert all(data[member][1] == content for member, content in RTE.items())
        promise(*PROMISE)

    @pytest.mark.parametrize("case", HOSTILE)
    def test_in_a_members_place(self, place: Place, promise: Promise, case: str) -> None:
        body = zip_as_named(HOSTILE[case])
        assert len(body) < 200_000
        with place.kept(), pytest.raises(DownloadError) as caught:
            fetch(place, body)
        assert str(caught.value).isprintable()
        assert "RTE/dev.tsv" in str(caught.value)
        assert sorted(tree(place.inside)) == ["data", "originals", "originals/RTE.zip"]
        promise(*PROMISE)

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_packed_by_other_means(self, place: Place, promise: Promise, method: int) -> None:
        """A bomb of these is smaller by far, and their errors are others."""
        with place.kept(), pytest.raises(DownloadError, match=f"packed by method {method}"):
            fetch(place, zip_as_named(whole(), method))
        promise(*PROMISE)

    def test_encrypted(self, place: Place, promise: Promise) -> None:
        body = bytearray(zip_as_named(whole()))
        for found in re.finditer(b"PK\x01\x02", bytes(body)):
            body[found.start() + 8] |= 1
        with place.kept(), pytest.raises(DownloadError, match="encrypted"):
            fetch(place, bytes(body))
        promise(*PROMISE)

    def test_a_bomb_that_lies(self, place: Place, promise: Promise) -> None:
        """Unpacked, it would be 256 MiB; no more than it says is written before it is refused."""
        size = 1 << 28
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in RTE.items():
                with archive.open(name, "w") as member:
                    for _ in range(size >> 20 if name == "RTE/dev.tsv" else 0):
                        member.write(bytes(1 << 20))
                    member.write(data if name != "RTE/dev.tsv" else b"")
        body = buffer.getvalue().replace(struct.pack("<L", size), struct.pack("<L", 3000))
        assert len(body) < 2_000_000
        with place.kept(), pytest.raises(DownloadError, match=r"cannot be unpacked: Bad CRC-32"):
            fetch(place, body)
        assert sum(len(content or b"") for _, content in tree(place.inside).values()) == len(body)
        promise(*PROMISE)

    def test_mutated_zips(self, place: Place, sized: Callable[[int, int], int]) -> None:
        """The hash would refuse each; even without it there is nothing but a refusal."""
        body = zip_as_named(whole())
        archive, target = place.inside / "RTE.zip", place.inside / "out"
        target.mkdir()
        structure = [found.start() for found in re.finditer(rb"PK\x01\x02|PK\x03\x04|PK", body)]
        with place.kept():
            for seed in range(sized(300, 20_000)):
                draw = random.Random(seed)
                mutated = bytearray(body)
                for _ in range(draw.choice((1, 1, 3))):
                    at = (draw.choice(structure) + draw.randrange(46)) % len(mutated)
                    mutated[at] = draw.choice((0, 1, 0x7F, 0xFF, draw.randrange(256)))
                archive.write_bytes(mutated)
                try:
                    download._unpack(archive, "RTE", target)
                except DownloadError as error:
                    assert str(error).isprintable(), f"seed {seed}: {error}"
                except Exception as error:
                    raise AssertionError(f"seed {seed}: {error!r}") from error
                assert {path.name for path in target.iterdir()} <= {
                    "train.tsv",
                    "dev.tsv",
                    "test.tsv",
                }, seed


class TestLinksInTheTarget:
    """Oracle: the tree around; the links lead there, and somebody put them where files go."""

    def test_the_tasks_folder(self, place: Place, promise: Promise) -> None:
        (place.inside / "data").mkdir()
        (place.inside / "data" / "RTE").symlink_to(place.outside / "empty")
        (place.outside / "empty").mkdir()
        with place.kept(), pytest.raises(DownloadError, match="RTE is a link to another place"):
            fetch(place, zip_as_named(whole()))
        promise(*PROMISE)

    def test_the_tasks_folder_where_all_is_there(self, place: Place) -> None:
        """Then nothing need be written, and the link is as good as a folder."""
        (place.inside / "data").mkdir()
        (place.inside / "data" / "RTE").symlink_to(place.outside / "RTE")
        (place.outside / "RTE").mkdir()
        for name, data in RTE.items():
            (place.outside / name).write_bytes(data)
        with place.kept():
            assert len(fetch(place, zip_as_named(whole()))) == 3

    @pytest.mark.parametrize("target", ["outside/dev.tsv", "outside/new"])
    def test_a_file(self, place: Place, promise: Promise, target: str) -> None:
        """One that differs is left; a link to nothing gives way to the file itself."""
        link = place.inside / "data" / "RTE" / "dev.tsv"
        link.parent.mkdir(parents=True)
        link.symlink_to(place.root / "a" / target)
        with place.kept():
            if target == "outside/new":
                fetch(place, zip_as_named(whole()))
                assert not link.is_symlink()
            else:
                with pytest.raises(DownloadError, match="exists and differs"):
                    fetch(place, zip_as_named(whole()))
                assert link.is_symlink()
        promise(*PROMISE)

    @pytest.mark.parametrize("name", ["RTE.zip", "RTE.zip.part"])
    @pytest.mark.parametrize("target", ["outside/secret", "outside/new"])
    def test_an_original(self, place: Place, promise: Promise, name: str, target: str) -> None:
        originals = place.inside / "originals"
        originals.mkdir()
        (originals / name).symlink_to(place.root / "a" / target)
        with place.kept():
            if name == "RTE.zip":
                fetch(place, zip_as_named(whole()))
                assert not (originals / name).is_symlink()
            else:
                with pytest.raises(DownloadError, match="a link, which is not followed; remove it"):
                    fetch(place, zip_as_named(whole()))
        promise(*PROMISE)

    def test_what_looks_like_a_killed_process_left_it(self, place: Place, promise: Promise) -> None:
        (place.inside / "data").mkdir()
        link = place.inside / "data" / ".unpacking-link"
        link.symlink_to(place.outside)
        left = place.inside / "data" / ".unpacking-left"
        left.mkdir()
        (left / "link").symlink_to(place.outside)
        with place.kept():
            fetch(place, zip_as_named(whole()))
        assert not left.exists()
        promise(*PROMISE)

    def test_tasks_are_names_of_a_table(self, place: Place, promise: Promise) -> None:
        for name in CLIMBING.values():
            with place.kept(), pytest.raises(DataError, match="unknown GLUE task"):
                download_glue([name], place.inside)
            promise(*PROMISE)


class TestFilesOfAModel:
    """Oracle: an error, or the model that is read without the name; and the tree around."""

    @pytest.mark.parametrize("case", CLIMBING)
    def test_index(self, place: Place, tiny: Path, promise: Promise, case: str) -> None:
        """Also where a good file of weights lies at the place that the name leads to."""
        name = CLIMBING[case].format(root=place.root) + ".safetensors"
        weights = (tiny / "model.safetensors").read_bytes()
        (place.outside / "new.safetensors").write_bytes(weights)
        index = {"weight_map": {"bert.pooler.dense.bias": name}}
        (place.inside / "model.safetensors.index.json").write_text(json.dumps(index))
        with place.kept(), pytest.raises(WeightsError) as caught:
            SafeFolder(place.inside)
        assert str(caught.value).isprintable()
        # A name without a separator cannot lead out; it is only not there.
        plain = not any(character in name for character in "/\\:\0")
        assert ("not the plain name" in str(caught.value)) is not plain
        promise(*PROMISE)

    def test_index_of_an_endless_name(self, place: Place, promise: Promise) -> None:
        index = {"weight_map": {"bert." + "x" * 90_000: "../" * 30_000}}
        (place.inside / "model.safetensors.index.json").write_text(json.dumps(index))
        with place.kept(), pytest.raises(WeightsError, match="not the plain name") as caught:
            SafeFolder(place.inside)
        assert len(str(caught.value)) < 900
        promise(*PROMISE)

    @pytest.mark.parametrize("case", CLIMBING)
    def test_names_in_a_tokenizers_config(
        self, place: Place, tiny: Path, promise: Promise, case: str
    ) -> None:
        name = CLIMBING[case].format(root=place.root)
        (place.inside / "vocab.txt").write_bytes((tiny / "vocab.txt").read_bytes())
        expected = load_tokenizer(place.inside).fingerprint
        config = {"vocab_file": name, "tokenizer_file": name, "name_or_path": name,
                  "special_tokens_map_file": name, "auto_map": {"AutoTokenizer": name}}  # fmt: skip
        (place.inside / "tokenizer_config.json").write_text(json.dumps(config))
        with place.kept():
            assert load_tokenizer(place.inside).fingerprint == expected
        promise(*PROMISE)


def test_the_tree_is_compared(place: Place) -> None:
    """The comparison itself: it sees a new file, another content, a removed file and a link."""

    def remove() -> None:
        (place.outside / "secret").unlink()

    for spoil in (
        lambda: (place.outside / "new").touch(),
        lambda: (place.outside / "dev.tsv").write_text("other"),
        remove,
        lambda: (place.root / "b").symlink_to("/"),
    ):
        with pytest.raises(AssertionError), place.kept():
            spoil()
    with place.kept():
        (place.inside / "x").touch()
    assert issubclass(DownloadError, SpafitError)

"""Downloading GLUE's original files, good and hostile ones, from a local server."""

import hashlib
import random
import re
import struct
import zipfile
from pathlib import Path

import pytest
from support.downloads import RTE, URL_PATH, Case, make_zip, source_of
from support.file_server import FileServer

from spafit.errors import DataError
from spafit.tasks import download
from spafit.tasks.download import (
    SOURCES,
    DownloadError,
    Original,
    Source,
    download_glue,
    glue_cache,
)
from spafit.tasks.glue import TASKS, load


class TestTransfer:
    """Oracle: the bytes that the server was given, and the requests that it saw."""

    def test_good(self, case: Case) -> None:
        body = make_zip(RTE)
        paths = case.fetch(body)
        assert [str(path.relative_to(case.root)) for path in paths] == list(case.UNPACKED)
        assert case.files() == [*case.UNPACKED, "originals/RTE.zip"]
        for name, data in RTE.items():
            assert (case.folder / name).read_bytes() == data
        assert (case.originals / "RTE.zip").read_bytes() == body
        assert load("rte", "train", case.folder).texts_a == ["A."]
        assert case.server.requests == [(URL_PATH, None)]
        assert case.seen[-1] == ("RTE.zip", len(body), len(body))
        # Again: nothing is asked for, nothing changes; a lost file comes back from the original.
        (case.folder / "RTE" / "dev.tsv").unlink()
        assert case.fetch(body) == paths
        assert len(case.server.requests) == 1
        assert case.files() == [*case.UNPACKED, "originals/RTE.zip"]

    def test_broken_off_and_resumed(self, case: Case) -> None:
        body = make_zip(RTE)
        case.server.faults = ["half", "half"]
        case.fetch(body)
        half = len(body) // 2
        asked = [wanted for _, wanted in case.server.requests]
        assert asked == [None, f"bytes={half}-", f"bytes={(half + len(body)) // 2}-"]
        assert (case.originals / "RTE.zip").read_bytes() == body
        assert [done for _, done, _ in case.seen] == sorted(done for _, done, _ in case.seen)

    def test_resumed_by_a_later_call(self, case: Case) -> None:
        body = make_zip(RTE)
        case.server.faults = ["half"]
        message = rf"ended after {len(body) // 2} of {len(body)} bytes, after 1 attempts.*run it ag"
        with pytest.raises(DownloadError, match=message):
            case.fetch(body, attempts=1)
        assert case.files() == ["originals/RTE.zip.part"]
        case.fetch(body)
        assert case.server.requests[-1] == (URL_PATH, f"bytes={len(body) // 2}-")
        assert case.files() == [*case.UNPACKED, "originals/RTE.zip"]

    def test_a_server_that_ignores_range(self, case: Case) -> None:
        body = make_zip(RTE)
        case.server.ignores_range = True
        case.server.faults = ["half"]
        case.fetch(body)
        assert len(case.server.requests) == 2
        assert (case.originals / "RTE.zip").read_bytes() == body

    @pytest.mark.parametrize("fault", ["503", "429", "416", "other part"])
    def test_faults_that_pass(self, case: Case, fault: str) -> None:
        body = make_zip(RTE)
        case.originals.mkdir()
        (case.originals / "RTE.zip.part").write_bytes(body[:100])
        case.server.faults = [fault]
        case.fetch(body)
        restarted = fault in ("416", "other part")
        assert case.server.requests[-1] == (URL_PATH, None if restarted else "bytes=100-")
        assert case.files() == [*case.UNPACKED, "originals/RTE.zip"]

    def test_a_silent_server(self, case: Case) -> None:
        case.server.faults = ["silent"]
        with pytest.raises(DownloadError, match=r"timed out, after 1 attempts"):
            case.fetch(make_zip(RTE), timeout_s=0.2, attempts=1)
        case.server.faults = ["silent"]
        case.fetch(make_zip(RTE), timeout_s=0.2)

    def test_no_server(self, case: Case, tmp_path: Path) -> None:
        body = make_zip(RTE)
        with pytest.raises(DownloadError, match=r"refused.*after 2 attempts.*put it at .*RTE.zip"):
            download_glue(["rte"], tmp_path / "d", originals=tmp_path / "o", attempts=2,
                          base_url="http://127.0.0.1:9", sources={"RTE": source_of(body)},
                          pause_s=0.01)  # fmt: skip

    def test_not_there(self, case: Case) -> None:
        case.server.faults = ["404"]
        with pytest.raises(DownloadError, match=r"answered 404 Not Found.*put it at .*RTE.zip"):
            case.fetch(make_zip(RTE))
        assert len(case.server.requests) == 1
        assert case.files() == []

    def test_a_web_page(self, case: Case) -> None:
        case.server.faults = ["html"]
        with pytest.raises(DownloadError, match=r"expected a file, found a web page"):
            case.fetch(make_zip(RTE))
        assert case.files() == []

    def test_a_flipped_byte(self, case: Case) -> None:
        body = make_zip(RTE)
        wrong = bytearray(body)
        wrong[len(body) // 2] ^= 1
        found = hashlib.sha256(wrong).hexdigest()
        message = rf"expected SHA-256 {hashlib.sha256(body).hexdigest()}, found {found}"
        with pytest.raises(DownloadError, match=message):
            case.fetch(body, sent=bytes(wrong))
        assert case.files() == []
        case.fetch(body)

    def test_a_wrong_beginning_is_not_resumed_for_ever(self, case: Case) -> None:
        body = make_zip(RTE)
        case.originals.mkdir()
        (case.originals / "RTE.zip.part").write_bytes(b"x" * 100)
        with pytest.raises(DownloadError, match=r"it was deleted. Run it again"):
            case.fetch(body)
        case.fetch(body)

    @pytest.mark.parametrize("sent", [b"short", b"x" * 20_000])
    def test_another_size(self, case: Case, sent: bytes) -> None:
        body = make_zip(RTE)
        message = rf"expected {len(body)} bytes, the server announces {len(sent)}; its file has ch"
        with pytest.raises(DownloadError, match=message):
            case.fetch(body, sent=sent)
        assert case.files() == []

    @pytest.mark.parametrize("size", [0, 1], ids=["as long", "longer"])
    def test_a_part_that_is_no_beginning(self, case: Case, size: int) -> None:
        body = make_zip(RTE)
        case.originals.mkdir()
        (case.originals / "RTE.zip.part").write_bytes(body + b"x" * size)
        case.fetch(body)
        assert case.server.requests == ([] if size == 0 else [(URL_PATH, None)])

    def test_an_original_put_there_by_hand(self, case: Case) -> None:
        body = make_zip(RTE)
        case.originals.mkdir()
        (case.originals / "RTE.zip").write_bytes(body)
        case.fetch(body)
        assert case.server.requests == []
        (case.originals / "RTE.zip").write_bytes(body[:-1])  # a wrong one is fetched again
        case.fetch(body)
        assert len(case.server.requests) == 1

    def test_only_http(self, tmp_path: Path) -> None:
        with pytest.raises(DownloadError, match=r"must begin with https://"):
            download_glue(["rte"], tmp_path, base_url="file:///etc")

    def test_a_disk_that_refuses(self, case: Case) -> None:
        case.originals.write_text("a file where the folder should be")
        with pytest.raises(DownloadError, match=r"cannot store RTE.*name other folders"):
            case.fetch(make_zip(RTE))


class TestArchives:
    """Oracle: the three files of RTE arrive, or an error; and nothing else is written anywhere."""

    def link(self, name: str) -> zipfile.ZipInfo:
        entry = zipfile.ZipInfo(name)
        entry.create_system = 3
        entry.external_attr = 0o120777 << 16
        return entry

    def test_hostile_names_are_not_even_looked_at(self, case: Case) -> None:
        outside = case.root / "absolute.tsv"
        hostile: list[tuple[zipfile.ZipInfo | str, bytes]] = [
            ("../escaped.tsv", b"1"),
            ("RTE/../../escaped.tsv", b"2"),
            (str(outside), b"3"),
            ("C:escaped.tsv", b"4"),
            ("C:\\escaped.tsv", b"5"),
            ("..\\escaped.tsv", b"6"),
            ("RTE\\train.tsv", b"7"),
            (self.link("RTE/link"), b"/etc/passwd"),
            (self.link("data"), b"/tmp"),
            ("RTE/.bashrc", b"8"),
            ("__MACOSX/RTE/._train.tsv", b"9"),
        ]
        case.fetch(make_zip([*hostile, *RTE.items()]))
        assert case.files() == [*case.UNPACKED, "originals/RTE.zip"]
        assert (case.folder / "RTE" / "train.tsv").read_bytes() == RTE["RTE/train.tsv"]

    @pytest.mark.parametrize(
        "name", ["../RTE/dev.tsv", "/RTE/dev.tsv", "C:RTE/dev.tsv", "RTE\\dev.tsv", "RTE//dev.tsv",
                 "./RTE/dev.tsv", "rte/dev.tsv", "RTE/dev.tsv/"]
    )  # fmt: skip
    def test_a_member_missing_but_for_one_like_it(self, case: Case, name: str) -> None:
        members = {k: v for k, v in RTE.items() if k != "RTE/dev.tsv"}
        with pytest.raises(DownloadError, match=r"one member 'RTE/dev.tsv', found 0"):
            case.fetch(make_zip({**members, name: b"x"}))
        assert case.files() == ["originals/RTE.zip"]

    def test_a_member_twice(self, case: Case) -> None:
        with pytest.warns(UserWarning, match="Duplicate name"):
            body = make_zip([*RTE.items(), ("RTE/dev.tsv", b"other")])
        with pytest.raises(DownloadError, match=r"one member 'RTE/dev.tsv', found 2"):
            case.fetch(body)
        assert case.files() == ["originals/RTE.zip"]

    def test_a_link_in_a_members_place(self, case: Case) -> None:
        members = {k: v for k, v in RTE.items() if k != "RTE/dev.tsv"}
        body = make_zip([*members.items(), (self.link("RTE/dev.tsv"), b"/etc/passwd")])
        with pytest.raises(DownloadError, match=r"'RTE/dev.tsv' is a link"):
            case.fetch(body)
        assert case.files() == ["originals/RTE.zip"]

    def test_a_bomb(self, case: Case) -> None:
        body = make_zip({**RTE, "RTE/dev.tsv": bytes((64 << 20) + 1)})
        assert len(body) < 100_000
        with pytest.raises(DownloadError, match=rf"would unpack to {(64 << 20) + 1} bytes"):
            case.fetch(body)
        assert case.files() == ["originals/RTE.zip"]

    def test_a_bomb_that_lies_about_its_size(self, case: Case) -> None:
        true_size = 70 << 20
        body = make_zip({**RTE, "RTE/dev.tsv": bytes(true_size)})
        lying = body.replace(struct.pack("<L", true_size), struct.pack("<L", 1_000))
        assert lying != body
        with pytest.raises(DownloadError, match=r"cannot be unpacked: Bad CRC-32.*dev.tsv"):
            case.fetch(lying)
        assert case.files() == ["originals/RTE.zip"]

    def test_no_archive_at_all(self, case: Case) -> None:
        with pytest.raises(DownloadError, match=r"cannot be unpacked: File is not a zip file"):
            case.fetch(b"not a zip, though its hash is right")

    def test_a_damaged_member(self, case: Case) -> None:
        body = bytearray(make_zip(RTE))
        body[body.index(b"RTE/test.tsv") + 2_000] ^= 255
        with pytest.raises(DownloadError, match=r"cannot be unpacked"):
            case.fetch(bytes(body))
        assert case.files() == ["originals/RTE.zip"]

    def test_an_encrypted_member(self, case: Case) -> None:
        body = bytearray(make_zip(RTE))
        for found in re.finditer(b"PK\x01\x02", bytes(body)):
            body[found.start() + 8] |= 1
        with pytest.raises(DownloadError, match=r"cannot be unpacked: .*encrypted"):
            case.fetch(bytes(body))

    def test_nothing_is_overwritten(self, case: Case) -> None:
        mine = case.folder / "RTE" / "test.tsv"
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        with pytest.raises(DownloadError, match=r"RTE/test.tsv exists and differs"):
            case.fetch(make_zip(RTE))
        assert case.files() == ["data/RTE/test.tsv", "originals/RTE.zip"]
        assert mine.read_text() == "mine"


class TestTable:
    """Oracle: the table of the tasks."""

    def test_each_task_has_a_source(self) -> None:
        assert set(SOURCES) == {task.folder for task in TASKS.values()}
        for source in SOURCES.values():
            for original in source.originals:
                assert re.fullmatch("[0-9a-f]{64}", original.sha256)
                assert "/" in original.path
        assert len({o.sha256 for s in SOURCES.values() for o in s.originals}) == 12

    def test_mnli_is_fetched_once_with_both_halves(
        self, server: FileServer, tmp_path: Path
    ) -> None:
        names = ["train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched"]
        body = make_zip({f"MNLI/{name}.tsv": name.encode() for name in names})
        server.files["/glue/data/MNLI.zip"] = body
        paths = download_glue(
            ["mnli", "MNLI-mm"], tmp_path, originals=tmp_path, base_url=server.url + "/",
            sources={"MNLI": source_of(body, name="MNLI.zip")},
        )  # fmt: skip
        assert len(server.requests) == 1
        assert sorted(path.stem for path in paths) == sorted(names)

    def test_ax_is_a_file_of_its_own(self, server: FileServer, tmp_path: Path) -> None:
        body = b"index\tsentence1\tsentence2\n0\tA.\tB.\n"
        server.files["/glue/data/AX.tsv"] = body
        download_glue(
            ["ax"], tmp_path, originals=tmp_path / "originals", base_url=server.url,
            sources={"AX": source_of(body, form="file", name="AX.tsv")},
        )  # fmt: skip
        assert load("ax", "test", tmp_path).texts_b == ["B."]

    def test_the_cache_folder(
        self, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("SPAFIT_CACHE", raising=False)
        assert glue_cache() == tmp_path / "home" / ".cache" / "spafit" / "glue"
        monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
        assert glue_cache() == tmp_path / "cache" / "glue"
        body = make_zip(RTE)
        server.files[URL_PATH] = body
        download_glue(["rte"], base_url=server.url, sources={"RTE": source_of(body)})
        assert (tmp_path / "cache" / "glue" / "RTE" / "dev.tsv").is_file()
        assert (tmp_path / "cache" / "glue" / "originals" / "RTE.zip").is_file()

    def test_unknown_task(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="unknown GLUE task 'boolq'"):
            download_glue(["boolq"], tmp_path)


class TestMrpc:
    """Oracle: real MRPC files, themselves checked against files that GLUE's own script made.

    The published corpus is put together again from them: the train and dev rows in one file (how
    the two were mixed is lost, each keeps its order), the test rows with labels made up. The sizes
    in bytes are those of the table, which shows the published form: line feeds, one mark.
    """

    def corpus(self, folder: Path) -> tuple[bytes, bytes, bytes]:
        header, *train = (folder / "train.tsv").read_bytes().splitlines(keepends=True)
        _, *dev = (folder / "dev.tsv").read_bytes().splitlines(keepends=True)
        choose = random.Random(3)
        sides = [0] * len(train) + [1] * len(dev)
        choose.shuffle(sides)
        rows = (iter(train), iter(dev))
        mixed = header + b"".join(next(rows[side]) for side in sides)
        _, *test = (folder / "test.tsv").read_bytes().splitlines(keepends=True)
        labelled = header + b"".join(
            choose.choice((b"0", b"1")) + row[row.index(b"\t") :] for row in test
        )
        return mixed, labelled, (folder / "dev_ids.tsv").read_bytes()

    @pytest.mark.parametrize("windows", [False, True])
    def test_byte_identical(
        self, server: FileServer, tmp_path: Path, shared_data: Path, windows: bool
    ) -> None:
        real = shared_data / "glue" / "MRPC"
        bodies = self.corpus(real)
        published = SOURCES["MRPC"].originals
        assert [len(body) for body in bodies] == [o.size_bytes for o in published]
        assert hashlib.sha256(bodies[2]).hexdigest() == published[2].sha256
        if windows:
            bodies = (bodies[0].replace(b"\n", b"\r\n"), bodies[1], bodies[2])
        originals = tuple(
            Original(o.path, len(body), hashlib.sha256(body).hexdigest())
            for o, body in zip(published, bodies, strict=True)
        )
        for original, body in zip(originals, bodies, strict=True):
            server.files[f"/{original.path}"] = body
        paths = download_glue(
            ["mrpc"], tmp_path, originals=tmp_path / "originals", base_url=server.url,
            sources={"MRPC": Source("mrpc", originals)},
        )  # fmt: skip
        assert [path.name for path in paths] == ["dev.tsv", "dev_ids.tsv", "test.tsv", "train.tsv"]
        for path in paths:
            assert path.read_bytes() == (real / path.name).read_bytes()
        assert len(load("mrpc", "dev", tmp_path)) == 408

    def test_a_dev_row_is_a_pair_of_ids(self, tmp_path: Path) -> None:
        corpus, ids = tmp_path / "corpus", tmp_path / "ids"
        corpus.write_text("Quality\n1\t2\t3\ta\tb\n0\t2\t4\tc\td\n0\t3\t2\te\tf\n")
        ids.write_text("2\t3\n")
        download._assemble_mrpc(corpus, corpus, ids, tmp_path)
        assert (tmp_path / "dev.tsv").read_text() == "Quality\n1\t2\t3\ta\tb\n"
        assert "c\td\n0\t3\t2" in (tmp_path / "train.tsv").read_text()

    def test_a_row_of_another_shape(self, tmp_path: Path) -> None:
        good, bad, ids = tmp_path / "a", tmp_path / "b", tmp_path / "ids"
        good.write_text("Quality\n1\t2\t3\ta\tb\n")
        bad.write_text("Quality\n1\t2\t3\ta\n")
        ids.write_text("2\t3\n")
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(DownloadError, match=r"b: expected 5 fields, found 4"):
                download._assemble_mrpc(*pair, ids, tmp_path)


@pytest.mark.network
def test_the_real_host(tmp_path: Path) -> None:
    """The smallest originals, from the live host: sizes, hashes and row counts are the table's."""
    download_glue(["wnli", "rte", "mrpc", "ax"], tmp_path, originals=tmp_path / "originals")
    for name in ("wnli", "rte", "mrpc"):
        for split in ("train", "dev", "test"):
            assert len(load(name, split, tmp_path)) == TASKS[name].split(split).rows
    assert len(load("ax", "test", tmp_path)) == 1104

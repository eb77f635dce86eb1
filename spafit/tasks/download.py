"""Download GLUE's original files, check their SHA-256, and unpack them.

A downloaded file is used only if its SHA-256 is the one in the table ``SOURCES``. Even then a zip
does not decide where a file goes: members are read by the names in ``table.py``, and every path
that is written is computed here.

The original files are kept in ``originals``, the TSV files in GLUE's layout in ``folder``. An
interrupted transfer leaves ``NAME.part``, which the next call resumes. Two processes that need the
same file download it once: the second waits for the first.
"""

import errno
import filecmp
import hashlib
import shutil
import stat
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from spafit.files.http_file import (
    DownloadError,
    InterruptedTransferError,
    Progress,
    append,
    in_one_line,
)
from spafit.files.replacing import cache_folder
from spafit.files.transfers import alone_in, part_of
from spafit.tasks.glue import sha256_of_file
from spafit.tasks.table import TASKS, get_task

BASE_URL = "https://dl.fbaipublicfiles.com"

_UNPACKING = ".unpacking-"


@dataclass(frozen=True)
class Original:
    """One file on the server."""

    path: str
    """Path below the base URL."""
    size_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The file name, the last part of the path."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """Where the files of one GLUE folder come from, and in what form."""

    form: Literal["zip", "file", "mrpc"]
    """A zip of the folder; the one file itself; or the three files from which MRPC is built."""
    originals: tuple[Original, ...]


def _zip(name: str, size_bytes: int, sha256: str) -> Source:
    return Source("zip", (Original(f"glue/data/{name}", size_bytes, sha256),))


# Sizes and hashes as recorded with the hub's copy of GLUE in 2022.
# fmt: off
SOURCES: Mapping[str, Source] = MappingProxyType({
    "CoLA": _zip("CoLA.zip", 376971,
                 "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "SST-2": _zip("SST-2.zip", 7439277,
                  "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "MRPC": Source("mrpc", (
        Original("senteval/senteval_data/msr_paraphrase_train.txt", 1047044,
                 "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
        Original("senteval/senteval_data/msr_paraphrase_test.txt", 441275,
                 "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
        Original("glue/data/mrpc_dev_ids.tsv", 6222,
                 "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
    )),
    "STS-B": _zip("STS-B.zip", 802872,
                  "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "QQP": _zip("QQP-clean.zip", 41696084,
                "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "MNLI": _zip("MNLI.zip", 312783507,
                 "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "QNLI": _zip("QNLIv2.zip", 10627589,
                 "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "RTE": _zip("RTE.zip", 697150,
                "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    "WNLI": _zip("WNLI.zip", 28999,
                 "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
    "AX": Source("file", (
        Original("glue/data/AX.tsv", 222257,
                 "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"),
    )),
})
# fmt: on
"""The originals, by GLUE folder."""


def glue_cache() -> Path:
    """Return the folder where GLUE is kept: ``${SPAFIT_CACHE:-~/.cache/spafit}/glue``."""
    return cache_folder() / "glue"


def download_glue(
    tasks: Iterable[str],
    folder: str | Path | None = None,
    *,
    originals: str | Path | None = None,
    base_url: str = BASE_URL,
    sources: Mapping[str, Source] = SOURCES,
    timeout_s: float = 30.0,
    attempts: int = 4,
    pause_s: float = 1.0,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Fetch GLUE's original files and unpack them to the layout that ``glue.load`` reads.

    Parameters
    ----------
    tasks : iterable of str
        Names of tasks. MNLI's two halves are in one download.
    folder : str or Path, optional
        Where ``RTE/train.tsv`` and so on are written; None means ``glue_cache()``. An existing file
        with the same bytes is kept, one with other bytes is an error: nothing is overwritten.
    originals : str or Path, optional
        Where the downloads are kept; None means ``glue_cache() / "originals"``. A file there with
        the right hash is not downloaded again, so one downloaded by hand may be put there.
    base_url : str
        The server or a mirror of it, http or https.
    sources : mapping of str to Source
        The table of originals, by GLUE folder.
    timeout_s : float
        How long to wait for a server that sends nothing, in seconds.
    attempts : int
        How often to try a transfer, the first time included.
    pause_s : float
        Pause before the second attempt, in seconds; it doubles each time. If the server asks for a
        longer one, that is used, up to a minute.
    progress : callable, optional
        Called after each piece that is received.

    Returns
    -------
    tuple of Path
        The files in ``folder``.

    Raises
    ------
    DownloadError
        If a file cannot be downloaded or unpacked, or is not the expected one.
    """
    if not base_url.startswith(("http://", "https://")):
        raise DownloadError(f"the base URL must begin with https:// or http://, found {base_url!r}")
    folder = glue_cache() if folder is None else Path(folder)
    originals = glue_cache() / "originals" if originals is None else Path(originals)
    files: list[Path] = []
    for name in dict.fromkeys(get_task(task).folder for task in tasks):
        source = sources[name]
        try:
            originals.mkdir(parents=True, exist_ok=True)
            for original in source.originals:
                url = f"{base_url.rstrip('/')}/{original.path}"
                _fetch(url, original, originals, timeout_s, attempts, pause_s, progress)
            files += _install(name, source, originals, folder)
        except OSError as error:  # of the disk: the network's are handled in append
            raise DownloadError(
                f"cannot store {name}: {error}; make room, or name other folders"
            ) from error
    return tuple(files)


def _fetch(
    url: str,
    original: Original,
    folder: Path,
    timeout_s: float,
    attempts: int,
    pause_s: float,
    progress: Progress | None,
) -> None:
    """Download one original into ``folder``; it appears there only with the right hash."""
    target = folder / original.name
    if _is_there(original, target):
        return
    with part_of(target, original.size_bytes) as part:
        if _is_there(original, target):  # another process has fetched it while we waited
            return
        for attempt in range(1, attempts + 1):
            try:
                append(url, part, target, timeout_s, progress)
                break
            except InterruptedTransferError as error:
                if attempt == attempts:
                    raise DownloadError(
                        f"{url}: {error}, after {attempts} attempts. What was received is kept; "
                        "run it again to resume, or fetch the file by other means and put it at "
                        f"{target}"
                    ) from error
                time.sleep(max(pause_s * 2 ** (attempt - 1), error.pause_s))
        part.seek(0)
        digest = hashlib.sha256()
        while chunk := part.read(1 << 20):
            digest.update(chunk)
        if digest.hexdigest() != original.sha256:
            part.restart()
            raise DownloadError(
                f"{url}: expected SHA-256 {original.sha256}, found {digest.hexdigest()}; it "
                "was deleted. Run it again; if that does not help, the server's file has changed "
                "or the network alters it"
            )
        part.move_to(target)


def _is_there(original: Original, target: Path) -> bool:
    return target.is_file() and sha256_of_file(target) == original.sha256


def _install(name: str, source: Source, originals: Path, folder: Path) -> list[Path]:
    """Unpack one source to ``folder / name``; move files there only after all were checked."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        for left in folder.glob(f"{_UNPACKING}*"):  # from a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_UNPACKING, dir=folder) as temporary:
            unpacked = Path(temporary)
            paths = [originals / original.name for original in source.originals]
            if source.form == "zip":
                _unpack(paths[0], name, unpacked)
            elif source.form == "mrpc":
                train_txt, test_txt, dev_ids = paths
                _assemble_mrpc(train_txt, test_txt, dev_ids, unpacked)
            else:
                shutil.copyfile(paths[0], unpacked / paths[0].name)
            return _move_in(sorted(unpacked.iterdir()), folder / name)


def _move_in(files: list[Path], target: Path) -> list[Path]:
    """Move files to a folder; existing files with the same bytes are kept."""
    new = []
    for file in files:
        there = target / file.name
        if not there.exists():
            new.append(file)
        elif not filecmp.cmp(file, there, shallow=False):
            raise DownloadError(
                f"{there} exists and differs from the original; nothing was overwritten. "
                "Move it away, or name another folder"
            )
    if new and target.is_symlink():
        raise DownloadError(
            f"{target} is a link to another place, which is not written to; remove it, or name "
            "the folder above that place (--folder)"
        )
    target.mkdir(exist_ok=True)
    for file in new:
        file.replace(target / file.name)
    return [target / file.name for file in files]


# What the zip library raises for a damaged zip.
_NO_GOOD_ZIP = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError,
    ValueError, OverflowError,
)  # fmt: skip


def _unpack(archive: Path, name: str, folder: Path) -> None:
    """Extract only the files of GLUE folder ``name`` from a zip into ``folder``."""
    # Text compresses about threefold: only a zip bomb is larger than this.
    limit = max(64 << 20, 8 * archive.stat().st_size)
    splits = [s for task in TASKS.values() if task.folder == name
              for s in (task.train, task.dev, task.test) if s]  # fmt: skip
    try:
        with zipfile.ZipFile(archive) as opened:
            for file in dict.fromkeys(split.file for split in splits):
                _extract(opened, f"{name}/{file}", folder / file, limit)
    except _NO_GOOD_ZIP as error:
        raise _no_good_zip(archive, error) from error
    except OSError as error:
        if (
            error.errno != errno.EINVAL
        ):  # an offset before the start of the file, from a damaged zip
            raise
        raise _no_good_zip(archive, error) from error


def _no_good_zip(archive: Path, error: Exception) -> DownloadError:
    return DownloadError(
        f"{archive} cannot be unpacked: {in_one_line(error)}; delete it and run it again"
    )


def _extract(archive: zipfile.ZipFile, member: str, target: Path, limit: int) -> None:
    """Extract one member by its exact name, to a path that does not depend on the archive."""
    entries = [entry for entry in archive.infolist() if entry.filename == member]
    if len(entries) != 1:
        raise DownloadError(
            f"{archive.filename}: expected one member {member!r}, found {len(entries)}; "
            "this is not GLUE's archive"
        )
    entry = entries[0]
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise DownloadError(
            f"{archive.filename}: {member!r} is a link or not a regular file; refused"
        )
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DownloadError(
            f"{archive.filename}: {member!r} is packed by method {entry.compress_type}, which "
            "GLUE's archives are not; refused"
        )
    if entry.file_size > limit:
        raise DownloadError(
            f"{archive.filename}: {member!r} would unpack to {entry.file_size} bytes, more than "
            f"the limit of {limit} for this archive; refused"
        )
    # zipfile reads at most the declared size, which was compared with the limit above.
    with archive.open(entry) as packed, target.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)


def _assemble_mrpc(train_txt: Path, test_txt: Path, dev_ids: Path, folder: Path) -> None:
    """Build MRPC's files from the published corpus, byte for byte as GLUE's own script does.

    The pairs of ids in ``dev_ids`` are the dev rows; the headers of train and dev keep their
    byte-order mark; in test an index replaces the labels.
    """
    ids = {tuple(line.strip().split("\t")) for line in _text_lines(dev_ids)}
    header, *rows = _text_lines(train_txt)
    train, dev = [header], [header]
    for row in rows:
        fields = _mrpc_fields(train_txt, row)
        (dev if tuple(fields[1:3]) in ids else train).append("\t".join(fields))
    _, *rows = _text_lines(test_txt)
    test = ["index\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    for index, row in enumerate(rows):
        test.append("\t".join([str(index), *_mrpc_fields(test_txt, row)[1:]]))
    for name, lines in (("train", train), ("dev", dev), ("test", test)):
        (folder / f"{name}.tsv").write_bytes(("\n".join(lines) + "\n").encode())
    shutil.copyfile(dev_ids, folder / "dev_ids.tsv")


def _text_lines(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DownloadError(f"{path} is not UTF-8 text: {error}; delete it") from None
    return [line.removesuffix("\r") for line in lines if line]


def _mrpc_fields(path: Path, row: str) -> list[str]:
    fields = row.strip().split("\t")  # GLUE's script strips the row too
    if len(fields) != 5:
        raise DownloadError(f"{path}: expected 5 fields, found {len(fields)}: {row[:80]!r}")
    return fields

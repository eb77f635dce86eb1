"""Download one file over HTTP with the standard library, resuming an interrupted transfer.

Every fault of a server raises one of two errors with a one-line message:
``InterruptedTransferError`` if another attempt may succeed, ``DownloadError`` if it cannot. The
caller knows the file's hash and checks it.
"""

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPMessage
from pathlib import Path
from typing import IO

from spafit.errors import DataError, one_line
from spafit.files.transfers import PartFile
from spafit.version import __version__

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes received so far, and the bytes of the whole file."""


class DownloadError(DataError):
    """A file that could not be fetched, or that is not the one expected."""


LONGEST_PAUSE_S = 60.0
"""The longest pause that is granted to a server that asks for one (``Retry-After``)."""


class InterruptedTransferError(Exception):
    """A transfer that broke off; what was received is kept, and another attempt may resume it."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s
        """The pause that the server asks for before the next request, in seconds."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only; to any host, because the hash is checked."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str,
        headers: HTTPMessage, newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        scheme = newurl.partition(":")[0].lower()
        if scheme not in ("http", "https") or (scheme, req.type) == ("http", "https"):
            fp.close()
            raise DownloadError(
                f"{req.full_url}: the server redirects to {newurl!r:.200}, which is not followed; "
                "name a mirror (base_url)"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def append(
    url: str, part: PartFile, target: Path, timeout_s: float, progress: Progress | None
) -> None:
    """Fetch the rest of ``part``; from the start if the server ignores Range.

    Parameters
    ----------
    url : str
        The file's address.
    part : PartFile
        What was received of it so far, perhaps nothing.
    target : Path
        Where the file will be, for the messages.
    timeout_s : float
        How long to wait for a server that sends nothing, in seconds.
    progress : callable, optional
        Called after each piece that is received.

    Raises
    ------
    InterruptedTransferError
        If the transfer broke off, or may succeed when tried again.
    DownloadError
        If trying again cannot help.
    """
    size = part.size
    here = part.seek(0, os.SEEK_END)
    if here == size:
        return  # the caller checks its hash
    headers = {"User-Agent": f"spafit/{__version__}"}
    if 0 < here < size:
        headers["Range"] = f"bytes={here}-"
    try:
        opener = urllib.request.build_opener(_Redirects)
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answered {error.code} {in_one_line(error.reason)}"
        if error.code == 416:  # the server has less than is here
            part.restart()
        if error.code in (408, 416, 429) or error.code >= 500:
            raise InterruptedTransferError(answer, _asked_pause_s(error.headers)) from None
        raise DownloadError(
            f"{url}: {answer}. Fetch the file by other means and put it at {target}, or name a "
            "mirror (base_url)"
        ) from None
    # A ValueError comes from an invalid address in a redirect.
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        raise InterruptedTransferError(in_one_line(error)) from error

    with response:
        content_type = response.headers.get_content_type()
        if content_type in ("text/html", "application/xhtml+xml"):
            raise DownloadError(
                f"{url}: expected a file, found a web page ({content_type}), as a proxy or a "
                "login page of the network sends it; open the address in a browser to see it"
            )
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise DownloadError(
                f"{url}: expected the file as it is, found it encoded as {encoding!r:.60}, which "
                f"was not asked for. Fetch it by other means and put it at {target}"
            )
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {here}-"):
            part.restart()
            raise InterruptedTransferError(
                "the server sent another part of the file than was asked for"
            )
        here = here if resumed else 0
        announced = response.length  # of the rest; None where the server does not say
        if announced is not None and here + announced != size:
            part.restart()
            raise DownloadError(
                f"{url}: expected {size} bytes, the server announces {here + announced}; "
                f"its file has changed. Fetch the right one by other means and put it at {target}"
            )
        if not resumed:
            part.restart()
        while here < size:
            try:
                # Not read(): it waits for all the bytes, and loses those it has if it fails.
                chunk = response.read1(min(1 << 16, size - here))
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise InterruptedTransferError(in_one_line(error)) from error
            if not chunk:
                raise InterruptedTransferError(f"the transfer ended after {here} of {size} bytes")
            part.write(chunk)
            here += len(chunk)
            if progress is not None:
                progress(target.name, here, size)


def in_one_line(found: object) -> str:
    """Return a server's or a library's message as one printable line of limited length."""
    return one_line(" ".join(str(found).split())) or type(found).__name__


def _asked_pause_s(headers: Message) -> float:
    """Return the seconds that Retry-After asks for, as a number or a date; 0 if it is neither."""
    value = headers.get("Retry-After", "").strip()
    try:
        # A number too large for a float becomes infinity, not an error.
        asked = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp()
        asked -= 0 if value.isdecimal() else time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(asked, 0.0), LONGEST_PAUSE_S)

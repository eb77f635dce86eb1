"""A local web server that serves files, and misbehaves when told to."""

import gzip
import http.server
import socket
import struct
import threading
from contextlib import suppress


class Faults(http.server.BaseHTTPRequestHandler):
    """The ways in which a file may arrive otherwise than it should."""

    disable_nagle_algorithm = True  # else each short answer after its header waits 40 ms

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def misbehave(self, fault: str, body: bytes, wanted: str | None) -> None:
        """Answer with a fault.

        ``half``: the transfer breaks off; ``half as whole``, ``half without length``; ``without
        length`` is whole; ``longer``, ``longer without length``, ``endless``; ``flipped``: one bit;
        ``silent``, ``silent half``: until the server ends; ``slow``: the second half comes when the
        server is told; ``reset``, ``reset half``: of the connection; ``loop`` and ``to ADDRESS``:
        redirects; ``html``: a login page, and ``html as a file``; ``gzip``, and ``gzip by name``
        of bytes that are not; ``other part``, ``less``: a 206 of another range; ``garbage``: no
        HTTP; ``STATUS`` and ``STATUS after SECONDS``: with Retry-After.
        """
        self.close_connection = True
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        rest, half = body[start:], body[start : (start + len(body)) // 2]
        status, whole = 200 if start == 0 else 206, len(rest)
        ranged = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        kind, _, detail = fault.partition(" after ")
        if kind.isdigit():
            self.answer(int(kind), b"busy", length=4, **({"Retry-After": detail} if detail else {}))
        elif fault == "half":
            self.answer(status, half, length=whole, **ranged)
        elif fault == "half as whole":
            self.answer(status, half, length=len(half), **ranged)
        elif fault == "half without length":
            self.answer(status, half, **ranged)
        elif fault == "without length":
            self.answer(status, rest, **ranged)
        elif fault == "longer":
            self.answer(status, rest + b"and more", length=whole + 8, **ranged)
        elif fault == "longer without length":
            self.answer(status, rest + b"and more", **ranged)
        elif fault == "endless":
            self.answer(status, b"", **ranged)
            with suppress(OSError):
                for _ in range(1 << 10):
                    self.wfile.write(bytes(1 << 16))
        elif fault == "flipped":
            middle = len(rest) // 2
            changed = rest[:middle] + bytes([rest[middle] ^ 16]) + rest[middle + 1 :]
            self.answer(status, changed, length=whole, **ranged)
        elif fault == "silent":
            self.server.silence.wait(20)
        elif fault in ("silent half", "slow"):
            self.answer(status, half, length=whole, **ranged)
            self.wfile.flush()
            (self.server.silence if fault == "silent half" else self.server.release).wait(20)
            if fault == "slow":
                self.wfile.write(rest[len(half) :])
        elif fault in ("reset", "reset half"):
            if fault == "reset half":
                self.answer(status, half, length=whole, **ranged)
                self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "loop":
            self.answer(302, b"", length=0, Location=self.path)
        elif fault.startswith("to "):
            self.answer(302, b"", length=0, Location=fault.removeprefix("to "))
        elif fault in ("html", "html as a file"):
            page = b"<html>Please log in</html>"
            page = page if fault == "html" else page.ljust(whole)
            kind = "text/html; charset=utf-8" if fault == "html" else "application/zip"
            self.answer(200, page, length=len(page), content_type=kind)
        elif fault == "gzip":
            packed = gzip.compress(rest)
            self.answer(
                status, packed, length=len(packed), **ranged, **{"Content-Encoding": "gzip"}
            )
        elif fault == "gzip by name":
            self.answer(status, rest, length=whole, **ranged, **{"Content-Encoding": "gzip"})
        elif fault == "other part":
            part = body[start + 1 :]
            shown = f"bytes {start + 1}-{len(body) - 1}/{len(body)}"
            self.answer(206, part, length=len(part), **{"Content-Range": shown})
        elif fault == "less":
            shown = f"bytes {start}-{start + len(half) - 1}/{len(body)}"
            self.answer(206, half, length=len(half), **{"Content-Range": shown})
        elif fault == "garbage":
            self.wfile.write(b"\x1b[31mno HTTP\x00 at all\r\n" * 100)
        else:
            raise AssertionError(f"no such fault: {fault}")

    def answer(
        self,
        status: int,
        body: bytes,
        *,
        length: int | None = None,
        content_type: str = "application/zip",
        **headers: str,
    ) -> None:
        """Send a status line, headers and a body; without a length, the end is where it stops."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Connection", "close")
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)


class FileServer(http.server.ThreadingHTTPServer):
    """Serves ``files``; each fault in ``faults`` is done once, in order, then it behaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.requests: list[tuple[str, str | None]] = []
        self.ignores_range = False
        self.silence = threading.Event()
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing when a client hangs up, which tests provoke."""


class Handler(Faults):
    server: FileServer

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        if self.server.ignores_range:
            wanted = None
        fault = self.server.faults.pop(0) if self.server.faults else ""
        body = self.server.files.get(self.path)
        if fault:
            self.misbehave(fault, body or b"", wanted)
        elif body is None:
            self.send_error(404)
        else:
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            shown = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            rest = body[start:]
            self.answer(206 if start else 200, rest, length=len(rest), **(shown if start else {}))

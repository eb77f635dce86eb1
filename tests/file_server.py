"""A web server on this machine that serves files, and misbehaves when told to."""

import http.server
import threading


class FileServer(http.server.ThreadingHTTPServer):
    """Serves ``files``; each fault in ``faults`` is done once, in order, then it behaves."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.requests: list[tuple[str, str | None]] = []
        self.ignores_range = False
        self.silence = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if fault == "html":
            self.answer(200, b"<html>Please log in</html>", content_type="text/html; charset=utf-8")
            return
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        if fault == "silent":
            self.close_connection = True
            self.server.silence.wait(20)
            return
        start = 0
        if wanted and not self.server.ignores_range:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if fault == "other part":
            start += 1
        shown = f"bytes {start}-{len(body) - 1}/{len(body)}" if start else None
        end = len(body)
        if fault == "truncated":
            end = (start + len(body)) // 2
        self.answer(206 if start else 200, body[start:], shown=shown, send=end - start)

    def answer(
        self,
        status: int,
        body: bytes,
        *,
        content_type: str = "application/zip",
        shown: str | None = None,
        send: int | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if shown:
            self.send_header("Content-Range", shown)
        self.end_headers()
        self.wfile.write(body[:send])

"""Local HTTP server of a folder, which serves ranges and can be told to fail."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """Faults of the answers to GET, and what was asked for.

    Attributes:
        folder: files that are served.
        url: address of the folder.
        drops: number of answers that are truncated.
        status: status of all answers; 0 if the files are served.
        missing: bytes that the answers leave out at the end of each file.
        version: part of the ETag.
        etags: answers have an ETag.
        requests: paths and ranges asked for.
    """

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url
        self.drops = self.status = self.missing = self.version = 0
        self.etags = True
        self.requests: list[tuple[str, str]] = []


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self._answer(head=True)

        def do_GET(self):
            server.requests.append((self.path, self.headers.get("Range", "")))
            self._answer(head=False)

        def _answer(self, head):
            path = folder / self.path.partition("?")[0].lstrip("/")
            if server.status or not path.is_file():
                self.send_response(server.status or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop = 0, len(content)
            if found:
                start, stop = int(found[1]), min(int(found[2] or stop) + 1, stop)
            self.send_response(206 if found else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(stop - start))
            if found:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            if server.etags:
                digest = hashlib.md5(content).hexdigest()
                self.send_header("ETag", f'"{digest}{server.version}"')
            self.end_headers()
            part = content[start : min(stop, len(content) - server.missing)]
            if not head and server.drops:
                server.drops -= 1
                part = part[: len(part) // 2]
            if not head:
                self.wfile.write(part)

    with running(Handler) as address:
        server = Server(folder, address)
        yield server


@contextmanager
def served_in_order(folder: Path) -> Iterator[str]:
    """Yield the address of Python's own file server, which lists folders and has no ranges."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with running(Handler) as address:
        yield address


@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *args):
            pass  # clients that have read enough hang up

    with Quiet(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()

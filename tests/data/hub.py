"""Local stand-in for Hugging Face's hub, with one commit of one data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from served import running

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def served_hub(name: str, folder: Path) -> Iterator[str]:
    """The address of a hub with the data set `name`, whose files are those of a folder."""

    def entry(path: Path) -> dict:
        place = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": place, "oid": "0" * 40, "size": 0}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": place, "oid": oid, "size": path.stat().st_size}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET(head=True)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            paths = json.loads(body)["paths"]
            known = [folder / path for path in paths if (folder / path).exists()]
            if not self.path.startswith(f"/api/datasets/{name}/paths-info/"):
                known = []
            self._send(200, json.dumps([entry(path) for path in known]).encode())

        def do_GET(self, head=False):
            path = unquote(urlsplit(self.path).path)
            api, files = f"/api/datasets/{name}", f"/datasets/{name}/resolve/"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": entry(f)["path"]} for f in folder.rglob("*")]
                about = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False}
                self._send(200, json.dumps(about | {"tags": [], "downloads": 0}).encode(), head)
            elif path.startswith(f"{api}/tree/"):
                place = folder / "/".join(path.removeprefix(f"{api}/tree/").split("/")[1:])
                deep = "recursive=true" in self.path.lower()
                found = sorted(place.rglob("*") if deep else place.glob("*"))
                self._send(200, json.dumps([entry(f) for f in found]).encode(), head)
            elif path.startswith(files):
                file = folder / "/".join(path.removeprefix(files).split("/")[1:])
                self._file(file, head) if file.is_file() else self._send(404, b"", head)
            else:
                self._send(404, b"{}", head)

        def _file(self, file: Path, head: bool) -> None:
            content, given = file.read_bytes(), self.headers.get("Range", "")
            status, part = 200, content
            if given.startswith("bytes="):
                start, _, stop = given.removeprefix("bytes=").partition("-")
                status, part = 206, content[int(start) : int(stop or len(content)) + 1]
            more = {"ETag": f'"{entry(file)["oid"]}"', "X-Repo-Commit": COMMIT}
            if status == 206:
                last = int(start) + len(part) - 1
                more["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
            self._send(status, part, head, more)

        def _send(self, status: int, content: bytes, head=False, more=()) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            for key, value in dict(more).items():
                self.send_header(key, value)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if not head:
                self.wfile.write(content)

    with running(Handler) as address:
        yield address

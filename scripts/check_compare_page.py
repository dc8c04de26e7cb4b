"""Choose on a page of `lm compare` in Chromium by keyboard, and read the downloaded answers.

    python scripts/check_compare_page.py

A second script presses the keys; the page's Content-Security-Policy allows it by its digest.
Not part of the suite: it needs a browser.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from lm.tools.reports.compare_page import win_rate, write_compare_page

PRESSES = """
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
URL.createObjectURL = blob => {
  blob.text().then(text => {
    const kept = localStorage.getItem(Object.keys(localStorage)[0]);
    const wide = document.documentElement.scrollWidth > innerWidth;
    document.title = JSON.stringify({ text, kept, wide });
  });
  return "#";
};
["1", "x", "2", "0", "ArrowLeft", "1"].forEach(press);
document.getElementById("download").click();
"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Print nothing."""


def main() -> int:
    """Run the check; return 1 if something is wrong."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium here")
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = ["one", "<b>two", "three " * 300], ["eins", "zwei", ""]
        page = write_compare_page(folder, ["a", "b"], ["p", "q", "r"], texts, 0)
        digest = base64.b64encode(hashlib.sha256(PRESSES.encode()).digest()).decode()
        text = page.read_text().replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
        page.write_text(text.replace("</body>", f"<script>{PRESSES}</script></body>"))
        handler = partial(_Quiet, directory=name)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
            words += [f"--user-data-dir={name}/profile", "--virtual-time-budget=4000", "--dump-dom"]
            address = f"http://127.0.0.1:{server.server_port}/index.html"
            shown = subprocess.run(
                [browser, *words, address], capture_output=True, text=True, timeout=120, check=True
            ).stdout
            server.shutdown()
        found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", shown, re.DOTALL)[1]))
        (folder / "answers.json").write_text(found["text"])
        choices = json.loads(found["text"])["choices"]
        rate = win_rate(folder, [folder / "answers.json"])
    right = choices == json.loads(found["kept"]) == [1, 1, 0] and not found["wide"]
    print(f"choices {choices}, kept {found['kept']}, {rate}: {'right' if right else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

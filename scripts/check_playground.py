"""Use the playground of `lm serve` in Chromium like a user, and look for errors.

    python scripts/check_playground.py SCREENSHOTS

Trains a tiny run for two steps, serves it under two names, and at 400 and 1280 pixels completes,
chats, compares, shows a token's alternatives and stops a reply. Not part of the suite: it needs
chromium and chromedriver.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CONFIG = """
from lm.config import default

def get_config():
    config = default()
    config.model.n_layers, config.model.d_model, config.model.n_heads = 1, 16, 2
    config.data.source, config.data.validation_fraction = "text:{text}", 0.1
    config.data.sequence_length, config.data.batch_size = 1024, 4
    config.train.steps, config.log.tensorboard = 2, False
    return config
"""
FILL = """
for (const [id, value] of Object.entries(arguments[0])) document.getElementById(id).value = value;
"""
STOP_SOON = """
const timer = setInterval(() => {
  const stop = document.getElementById("stop");
  if (!stop.disabled && document.querySelectorAll(".token").length > 3) {
    clearInterval(timer);
    stop.click();
  }
}, 1);
"""
TEXT = "The <b>big</b> <script>document.title = 'broken'</script> dog é"


class Browser:
    """Chromium behind chromedriver."""

    def __init__(self, driver: str, width: int):
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options = {"args": words, "mobileEmulation": {"deviceMetrics": {"width": width}}}
        options["mobileEmulation"]["deviceMetrics"] |= {"height": 900, "pixelRatio": 1}
        options["mobileEmulation"]["deviceMetrics"] |= {"touch": False, "mobile": width < 600}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        body = {"capabilities": {"alwaysMatch": wanted}}
        found = httpx.post(f"{driver}/session", json=body, timeout=60).json()["value"]
        self._url = f"{driver}/session/{found['sessionId']}"

    def ask(self, path: str, **body: Any) -> Any:
        """Send a command of WebDriver, and return its value."""
        answer = httpx.post(f"{self._url}/{path}", json=body, timeout=60).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{path}: {answer['message']}")
        return answer

    def run(self, script: str, *values: Any) -> Any:
        """Run a script in the page."""
        return self.ask("execute/sync", script=script, args=list(values))

    def click(self, selector: str) -> None:
        """Click on the first element."""
        found = self.ask("element", using="css selector", value=selector)
        self.ask(f"element/{next(iter(found.values()))}/click")

    def wait(self, condition: str) -> None:
        """Wait until a condition holds in the page."""
        wait_until(lambda: self.run(f"return {condition}"), condition)

    def save(self, file: Path) -> None:
        """Save a screenshot."""
        shot = httpx.get(f"{self._url}/screenshot", timeout=60).json()["value"]
        file.write_bytes(base64.b64decode(shot))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Return the entries of a log."""
        return self.ask("se/log", type=kind)

    def close(self) -> None:
        """Close the browser."""
        httpx.delete(self._url, timeout=60)


def wait_until(holds: Callable[[], Any], what: str) -> None:
    """Wait at most four minutes: a busy machine compiles slowly."""
    until = time.monotonic() + 240
    while not holds():
        if time.monotonic() > until:
            raise RuntimeError(f"not within four minutes: {what}")
        time.sleep(0.05)


@contextmanager
def started(command: list[str], log: Path, pattern: str) -> Iterator[str]:
    """Run a process; yield what the pattern finds in its output."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_until(lambda: re.search(pattern, log.read_text()), pattern)
        found = re.search(pattern, log.read_text())
        assert found
        yield found[1]
    finally:
        process.terminate()
        process.wait(timeout=60)


def use(browser: Browser, url: str, folder: Path, width: int) -> list[str]:
    """Use the page; return what is wrong."""
    wrong = []

    def check(condition: str, what: str) -> None:
        if not browser.run(f"return {condition}"):
            wrong.append(f"{width} px, {what}: not {condition}")

    def send(mode: str, **fields: Any) -> None:
        browser.click(f"[data-mode={mode}]")
        browser.run(FILL, {"prompt": TEXT, "seed": 7, **fields})
        browser.click("#send")

    browser.ask("url", url=url)
    browser.wait("document.querySelector('#model').options.length == 2")
    for mode, n_turns in (("complete", 1), ("chat", 2), ("compare", 2)):
        send(mode, max_tokens=60)
        browser.wait("!stopping && document.querySelector('#status').textContent.includes(' in ')")
        check(f"document.querySelectorAll('.turn').length == {n_turns}", mode)
        check("document.querySelectorAll('.token').length > 5", mode)
        browser.run("document.querySelector('.token').focus()")
        check("document.querySelectorAll('#about div').length >= 2", f"{mode}, alternatives")
        check("document.documentElement.scrollWidth <= innerWidth", f"{mode}, width")
        check("!document.querySelector('.turn b, .turn script')", f"{mode}, text is no HTML")
        check("document.querySelector('#error').hidden", mode)
        browser.save(folder / f"{mode}-{width}.png")
    browser.run(STOP_SOON)
    send("complete", max_tokens=900)
    browser.wait("document.querySelector('#status').textContent.includes('stopped by you')")
    browser.save(folder / f"stopped-{width}.png")
    if problems := [entry["message"] for entry in browser.log("browser")]:
        wrong.append(f"{width} px, console: {problems}")
    for entry in browser.log("performance"):
        event = json.loads(entry["message"])["message"]
        asked = event["params"].get("request", {}).get("url", "")
        is_ours = asked.startswith((url, "data:", "chrome"))
        if event["method"] == "Network.requestWillBeSent" and not is_ours:
            wrong.append(f"{width} px, a request to {asked}")
    send("complete", max_tokens=10**9)
    browser.wait("!document.querySelector('#error').hidden")
    check("document.querySelector('#error').textContent.includes('max_tokens')", "error")
    browser.save(folder / f"error-{width}.png")
    return wrong


def main() -> int:
    """Run the check; return 1 if something is wrong."""
    screenshots = Path(sys.argv[1])
    screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("The big dog runs to the small cat.\n" * 2000)
        (folder / "config.py").write_text(CONFIG.format(text=folder / "text.txt"))
        lm, run = [sys.executable, "-m", "lm"], str(folder / "run")
        train = [*lm, "train", "--config", str(folder / "config.py"), "--workdir", run]
        subprocess.run(train, check=True, capture_output=True)
        serve = [*lm, "serve", "--port", "0", "--workdir", f"one={run}", "--workdir", f"two={run}"]
        driver = ["chromedriver", "--port=0"]
        wrong = []
        with (
            started(serve, folder / "log", r"serving .* on (\S+)") as url,
            started(driver, folder / "driver", r"started successfully on port (\d+)") as port,
        ):
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, "ready")
            for width in (400, 1280):
                browser = Browser(f"http://127.0.0.1:{port}", width)
                try:
                    wrong += use(browser, url, screenshots, width)
                finally:
                    browser.close()
    print("\n".join(wrong) or "right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

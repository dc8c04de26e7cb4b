"""`lm serve` in a separate process, started as by users."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx


class ServerProcess:
    """`lm serve` in a process: its address, its log, and its end."""

    def __init__(self, log: Path, *arguments: str):
        self.log = log
        command = [sys.executable, "-m", "lm", "serve", "--port", "0", *arguments]
        with log.open("w") as file:
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
            self.process = subprocess.Popen(command, stderr=file, env=environment)
        found = self.wait_for(r"serving .* on (\S+)")
        self.url = found[1]
        self.wait(
            lambda: httpx.get(f"{self.url}/readyz", verify=False, timeout=60).status_code == 200
        )

    def text(self) -> str:
        return self.log.read_text()

    def wait(self, holds, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, self.text()
            time.sleep(0.05)

    def wait_for(self, pattern: str) -> re.Match:
        self.wait(lambda: re.search(pattern, self.text()))
        found = re.search(pattern, self.text())
        assert found
        return found

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=180)

"""A real server in a process of its own, for tests that ask it from outside."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx

# Seconds between two questions of who waits: asking without a rest takes the processor from what is waited for.
REST = 0.05


class Running:
    """A server's process, and its address."""

    def __init__(self, *arguments: str, runs: Path):
        command = [sys.executable, "-m", "luthier", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "LUTHIER_RUNS": str(runs), "LANG": "C"}
        )
        self.said = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            found = re.search(r"listening at (http\S+)", line)
            if found:
                self.url = found[1]
                return
        raise AssertionError(self.said)

    def engines(self) -> list[int]:
        """Its children."""
        pid = self.process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def alive_until(self, check) -> None:
        """Wait for that; it answers all the while."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not check():
                assert client.get("/health/live").status_code == 200
                time.sleep(REST)

    def ready(self) -> None:
        """Wait until its models are."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while client.get("/health/ready").status_code != 200:
                time.sleep(REST)

    def stop(self) -> int:
        """Ask it to end, and wait."""
        self.process.terminate()
        self.process.communicate(timeout=60)
        return self.process.returncode

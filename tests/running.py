"""A real server in a process of its own, for tests that ask it from outside."""

import os
import re
import subprocess
import sys
from pathlib import Path


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

    def stop(self) -> int:
        """Ask it to end, and wait."""
        self.process.terminate()
        self.process.communicate(timeout=60)
        return self.process.returncode

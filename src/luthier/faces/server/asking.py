"""Whether Tune takes the settings of a job: asked in a process of its own, since Tune brings torch along.

`python -m luthier.faces.server.asking` reads them as JSON and ends with 2 and the sentence where they are wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from luthier.core.config import flatten
from luthier.core.errors import LuthierError
from luthier.faces.server.mistakes import shown
from luthier.faces.server.refusals import Refusal

# bool is an int to Python.
WORDS = ((bool, "true or false"), (int | float, "a number"))


async def check_settings(settings: dict[str, Any]) -> None:
    """Raises Refusal with what Tune says of `settings`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "luthier.faces.server.asking",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LUTHIER_LANG": "en"},
    )  # fmt: skip
    said, trouble = await process.communicate(json.dumps(settings).encode())
    if process.returncode == 2:
        raise Refusal(400, f"luthier: {said.decode().strip()}", param="luthier")
    if process.returncode:
        last = trouble.decode(errors="replace").strip().rpartition("\n")[2]
        raise Refusal(500, f"this is a bug in Luthier: the settings could not be checked: {last}", code="bug")


def main() -> int:
    """Check what comes on standard input."""
    from luthier.core.config import resolve
    from luthier.verbs.settings import check
    from luthier.verbs.tune import Tune

    settings = json.load(sys.stdin)
    try:
        config = resolve(Tune, values=settings).config
        check(config)
    except LuthierError as err:
        print(str(err).removeprefix("tune:").strip())
        return 2
    wrong = find_taken(settings, config.model_dump(mode="json"))
    if wrong is not None:
        print(wrong)
        return 2
    return 0


def find_taken(sent: dict[str, Any], made: dict[str, Any]) -> str | None:
    """A sentence about what was taken for something else: a command line holds texts, and files of settings are forgiving, but
    JSON says of each value what it is."""
    found = dict(flatten(made))
    for path, value in flatten(sent):
        want = next((word for kind, word in WORDS if isinstance(found.get(path), kind)), None)
        have = next((word for kind, word in WORDS if isinstance(value, kind)), None)
        if want is not None and want != have and (have is not None or isinstance(value, str)):
            return f"{path}: is {shown(value)}, expected {want}"
    return None


if __name__ == "__main__":
    raise SystemExit(main())

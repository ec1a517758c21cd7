"""Whether Tune takes the settings of a job: asked in a process of its own, since Tune brings torch along.

`python -m luthier.faces.server.asking` reads them as JSON and ends with 2 and the sentence where they are wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from luthier.core.errors import LuthierError
from luthier.faces.server.refusals import Refusal


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

    try:
        check(resolve(Tune, values=json.load(sys.stdin)).config)
    except LuthierError as err:
        print(str(err).removeprefix("tune:").strip())
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

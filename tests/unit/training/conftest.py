"""What several tests of training start from."""

import pytest

DIGITS = "def digits(output):\n    return sum(one in '0123456789' for one in output) / max(1, len(output))\n"


@pytest.fixture
def digits(tmp_path):
    """A reward: the share of digits in an answer."""
    path = tmp_path / "rewards.py"
    path.write_text(DIGITS, encoding="utf-8")
    return {"kind": "python", "function": f"{path}:digits"}

"""Keys of a server: who may do what. The file holds their hashes; a key itself is shown once, when it is made."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from pydantic import ValidationError

from luthier.core.config import Config, explain_mistake, join_mistakes
from luthier.core.errors import ConfigError
from luthier.core.run import write_atomically
from luthier.faces.server.settings import Limits

Scope: TypeAlias = Literal["infer", "tune", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "lk-"


class Key(Config):
    """One key: its owner's name, the SHA-256 of the key (which is 256 random bits), and what it may do."""

    name: str
    sha256: str
    scopes: tuple[Scope, ...] = ("infer",)
    limits: Limits | None = None
    """What it may take; None: as the server's settings say."""


class _File(Config):
    keys: tuple[Key, ...] = ()


# Whoever asks a server that has no keys, which listens to this machine alone.
ANYONE = Key(name="anyone", sha256="", scopes=SCOPES)


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as err:
        raise ConfigError(
            f"{path}: cannot be read ({err.strerror}); make it with: luthier serve --keys {path} --new-key NAME"
        ) from None
    try:
        return list(_File.model_validate(json.loads(text)).keys)
    except json.JSONDecodeError as err:
        raise ConfigError(f"{path}: line {err.lineno}: not valid JSON ({err.msg})") from None
    except ValidationError as err:
        raise ConfigError(join_mistakes(str(path), [explain_mistake(_File, one) for one in err.errors()])) from None


def add_key(path: Path, name: str, scopes: Sequence[str]) -> str:
    """A new key, whose hash is put into the file. Raises ConfigError for a name that is taken, and scopes that are none."""
    found = read_keys(path) if path.exists() else []
    if any(one.name == name for one in found):
        raise ConfigError(f"{path}: there is a key named {name!r} already; take it out first, or choose another name")
    key = PREFIX + secrets.token_urlsafe(32)
    made = Key.make({"name": name, "sha256": digest(key), "scopes": tuple(scopes)}, where="key")
    content = _File(keys=(*found, made)).model_dump(mode="json", exclude_none=True)
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    path.chmod(0o600)
    return key


def digest(key: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def find_key(keys: Sequence[Key], given: str) -> Key | None:
    """Whose key it is. Takes as long for a wrong one as for a right one."""
    hashed, found = digest(given), None
    for one in keys:
        if hmac.compare_digest(one.sha256, hashed):
            found = one
    return found

"""Rows of a data set on the hub, through the extra `hub-data`."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.core.errors import DataError, MissingExtra
from luthier.data.sources.row import Row


def read_hub(source: str, *, stream_from: int | None = None) -> Iterator[Row]:
    """Rows of hub:owner/name[:config][:split] (split: train); with `stream_from` as they come, after so many.

    Raises DataError when it cannot be had, MissingExtra.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "hub-data", f"{source}: reading from the hub") from None
    name, *rest = source.removeprefix("hub:").split(":")
    if len(rest) > 2 or not name:
        raise DataError(f"{source}: write it as hub:owner/name, hub:owner/name:split or hub:owner/name:config:split")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    try:
        if stream_from is None:
            table = datasets.load_dataset(name, config, split=split)
        else:
            table = datasets.load_dataset(name, config, split=split, streaming=True).skip(stream_from)
    except Exception as err:  # the hub, the cache and the builder each raise their own
        why = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise DataError(f"{source}: the data set cannot be had ({why}); HF_ENDPOINT names a mirror") from None
    for number, values in enumerate(table, (stream_from or 0) + 1):
        yield Row(dict(values), f"{source}:{number}")

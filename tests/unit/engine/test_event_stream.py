"""Server-sent events by the standard, wherever the stream is cut."""

import pytest

from luthier.engine.event_stream import read_data
from serving import as_events, completion

# With a character of several bytes, which a cut may part.
STREAM = as_events([completion({"text": "房é", "finish_reason": None}), completion()]).replace(
    b"\\u623f\\u00e9", "房é".encode()
)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_way_of_cutting_a_stream_gives_the_same_events(end):
    whole = STREAM.replace(b"\n", end)
    right = list(read_data([STREAM]))
    assert len(right) == 3 and "房é" in right[0] and right[-1] == "[DONE]"
    for at in range(len(whole) + 1):
        assert list(read_data([whole[:at], whole[at:]])) == right
        assert list(read_data([whole[:at], b"", whole[at:]])) == right
    assert list(read_data(whole[at : at + 1] for at in range(len(whole)))) == right


@pytest.mark.parametrize(
    ("stream", "right"),
    [
        (b"data: a\ndata: b\n\n", ["a\nb"]),
        (b"data:a\n\ndata:  b\n\n", ["a", " b"]),
        (b": a comment\n\nevent: x\nid: 7\nretry: 9\ndata: a\n\n", ["a"]),
        (b"event: x\n\n", []),
        (b"data\n\n", [""]),
        (b"data: a: b\n\n", ["a: b"]),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", ["a"]),
        (b"data: a\n\ndata: b\n", ["a"]),
        (b"data: a\n\ndata: b", ["a"]),
        (b"datum: a\n\n", []),
        (b"", []),
    ],
    ids=repr,
)
def test_events_are_those_of_the_standard(stream, right):
    assert list(read_data([stream])) == right
    assert list(read_data(stream[at : at + 1] for at in range(len(stream)))) == right

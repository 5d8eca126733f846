"""Lines of an event stream, for any cut into chunks and any Unicode line ends within texts."""

import json

from hypothesis import given
from hypothesis import strategies as st

from serve.cli.sse_client import SSELineReader

UNICODE_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


@given(texts=st.lists(st.text(st.sampled_from("aé中" + UNICODE_ENDS))), end=st.sampled_from([b"\n", b"\r\n"]), data=st.data())
def test_only_line_feeds_end_lines(texts, end, data):
    lines = [f"data: {json.dumps(text, ensure_ascii=False)}" for text in texts]
    stream = b"".join(line.encode() + end + end for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    reader, found = SSELineReader(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:stop])
    assert [line for line in found if line] == lines

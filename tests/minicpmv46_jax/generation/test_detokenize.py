"""Streaming detokenization: equal to the tokenizer's decoding, whole characters, no start of a stop text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpmv46_jax.generation.detokenize import Detokenizer
from minicpmv46_jax.generation.stop_texts import StopTexts


@pytest.fixture(scope="module")
def detokenizer(demo):
    return Detokenizer(demo.processor.tokenizer)


def ids_of(detokenizer, text):
    return detokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_decode_equals_tokenizer(detokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(detokenizer.tokenizer) - 1), max_size=30))
    assert detokenizer.decode(ids) == detokenizer.tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_streams_never_split_a_character(detokenizer, text):
    stream = detokenizer.stream()
    ids = ids_of(detokenizer, text)
    pieces = [stream.push(i) for i in ids]
    assert not any("�" in piece for piece in pieces if "�" not in text)
    assert "".join(pieces) + stream.finish() == detokenizer.tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(text=st.text("abé", max_size=20), stops=st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_text_ends_output_at_any_token_boundary(detokenizer, text, stops):
    stream = detokenizer.stream(tuple(stops))
    out = ""
    for i in ids_of(detokenizer, text):
        out += stream.push(i)
        if stream.stopped:
            break
    out += stream.finish()
    found = [text.find(stop) for stop in stops if stop in text]
    if not found:
        assert out == text and not stream.stopped
    else:
        # The stop text that is complete first ends the output. No part of a stop text is released.
        end = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        first = min(text[:end].find(stop) for stop in stops if stop in text[:end])
        assert out == text[:first] and stream.stopped


class Pieces(Detokenizer):
    """A detokenizer whose tokens are whole pieces of a text."""

    def __init__(self, pieces):
        self.special, self._pieces = frozenset(), pieces

    def token_bytes(self, token_id):
        return self._pieces[token_id].encode()


def naive_release(held, piece, stops):
    """Returns (released text, text still held; None after a stop text), by searching for each stop text."""
    text = held + piece
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return text[: min(found)], None
    keep = max(n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - keep], text[len(text) - keep :]


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(st.text("abcé", max_size=6), max_size=12),
    stops=st.lists(st.text("abcé", min_size=1, max_size=7), min_size=1, max_size=12),
)
def test_stop_texts_are_found_as_by_naive_search(pieces, stops):
    """Overlapping and nested stop texts, and tokens that complete several at once."""
    stream, held = Pieces(pieces).stream(stops), ""
    for i, piece in enumerate(pieces):
        released, held = naive_release(held, piece, stops)
        assert stream.push(i) == released and stream.stopped == (held is None)
        if held is None:
            return
    assert stream.finish() == held


def test_steps_of_a_character_do_not_grow_with_the_number_of_stop_texts():
    text = "ab" * 500

    def work(number):
        """Returns how often the automaton looks up a character."""
        lookups, stops = 0, StopTexts("ab" * i + "#" for i in range(1, number + 1))

        class Counted(dict):
            def __contains__(self, character):
                nonlocal lookups
                lookups += 1
                return super().__contains__(character)

        stops._children = [Counted(children) for children in stops._children]
        state = 0
        for character in text:
            state = stops.step(state, character)
        return lookups

    assert work(60) <= 2 * len(text)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), skipped=st.booleans())
def test_stream_equals_decode(detokenizer, data, skipped):
    ids = data.draw(st.lists(st.integers(0, len(detokenizer.tokenizer) + 5), max_size=30))
    stream = detokenizer.stream(skip_special_tokens=skipped)
    assert "".join(map(stream.push, ids)) + stream.finish() == detokenizer.decode(ids, skip_special_tokens=skipped)


def test_added_tokens_that_are_not_special_stay(detokenizer):
    ids = ids_of(detokenizer, "<think>\nHm.</think><|im_end|>")
    assert detokenizer.decode(ids) == "<think>\nHm.</think>"
    assert detokenizer.decode(ids, skip_special_tokens=False).endswith("<|im_end|>")


def test_id_beyond_vocabulary_has_no_text(detokenizer):
    assert detokenizer.token_bytes(10**7) == b""

"""Data files: supported row formats, messages for bad rows, order of rows, and resuming."""

import json
from pathlib import Path

import numpy as np
import pytest

from minicpmv46_jax.train import AnswerMarkers, BatchShape
from minicpmv46_jax.train.chat_formats import read_row
from minicpmv46_jax.train.data import LineSource, RowProcessor, batches

SHAPE = BatchShape(rows=2, tokens=128)
QUESTION, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}


def parsed_row(fields, root=Path()):
    return read_row(json.dumps(fields), root)


@pytest.fixture
def root(tmp_path, photos):
    photos[0].resize((40, 30)).save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture(scope="module")
def row_processor(demo):
    return RowProcessor(demo.processor, AnswerMarkers.from_processor(demo.processor), SHAPE)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [QUESTION, ANSWER]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"conversation": [{"human": "2 + 2?", "assistant": "4"}]},
        {"query": "2 + 2?", "response": "4"},
    ],
)
def test_all_formats_give_the_same_messages(fields):
    assert parsed_row(fields).messages == [QUESTION, ANSWER]
    assert parsed_row({**fields, "system": "Be brief."}).messages[0] == {"role": "system", "content": "Be brief."}


def test_media_marks_are_replaced_in_order(root):
    texts = ["<image>\nWhat, after <image>?", "<image>And this?"]
    messages = [{"role": "user", "content": texts[0]}, ANSWER, {"role": "user", "content": texts[1]}, ANSWER]
    found = parsed_row({"messages": messages, "images": ["a.png", "http://b/c.png", {"path": "a.png"}]}, root).messages
    image = {"type": "image", "image": str(root / "a.png")}
    other = {"type": "image", "image": "http://b/c.png"}
    assert found[0]["content"] == [image, {"type": "text", "text": "What, after "}, other, {"type": "text", "text": "?"}]
    assert found[2]["content"] == [image, {"type": "text", "text": "And this?"}]


def test_tool_calls_and_results_become_messages(demo, row_processor):
    turns = [("human", "2 + 2?"), ("function_call", json.dumps(CALL)), ("observation", "4"), ("gpt", "Four.")]
    schema = {"type": "function", "function": {"name": "add", "parameters": {}}}
    fields = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": json.dumps([schema])}
    assert parsed_row(fields).tools == [schema]
    whole = BatchShape(rows=1, tokens=1024)
    one = RowProcessor(row_processor.processor, row_processor.markers, whole).parse("a:1", json.dumps(fields).encode())
    said = demo.processor.tokenizer.decode(one.inputs.token_ids[one.loss_mask])
    assert said.count("<|im_end|>") == 2 and "<function=add>" in said and said.endswith("Four.<|im_end|>")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": ', "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("{}", "expected one of messages, conversations, conversation and query, found none"),
        ('{"messages": [{"role": "judge", "content": ""}]}', "role 'judge' is unknown"),
        (json.dumps({"messages": [QUESTION]}), "there is no answer to learn"),
        (json.dumps({"messages": [QUESTION, ANSWER], "images": ["a.png"]}), "1 images, but 0 <image> marks"),
        (json.dumps({"messages": [QUESTION, ANSWER], "images": ["no.png"]}), "no.png does not exist"),
        (
            json.dumps({"query": "<image><image>?", "response": "!", "images": ["a.png"]}),
            "more <image> marks in the texts than images: 1",
        ),
        (json.dumps({"query": "?" * 200, "response": "!"}), "tokens, a row holds 128"),
        (json.dumps({"query": "<image>?", "response": "!", "images": ["a.png"]}), "1 pictures and slices of"),
        (json.dumps({"query": "<image>?", "response": "!", "images": ["broken.png"]}), "broken.png"),
        ("\xff", "utf-8"),
    ],
)
def test_bad_rows_are_named_and_counted(line, message, root, row_processor, demo, caplog):
    (root / "broken.png").write_bytes(b"no picture")
    file = root / "data.jsonl"
    file.write_bytes(b"\n" + json.dumps({"messages": [QUESTION, ANSWER]}).encode() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError) as error:
        list(batches([file], row_processor, demo.config.vision, epochs=1, seed=None))
    assert str(error.value).startswith(f"{file}:3: ") and message in str(error.value)
    skipping = iter(batches([file], row_processor, demo.config.vision, epochs=1, seed=None, errors="skip"))
    (batch,) = skipping
    assert batch.segments.max() == 1 and skipping.conversations == 1
    assert skipping.bad_rows == {f"{file}:3": 1} and message in caplog.text


@pytest.fixture(scope="module")
def numbered_files(tmp_path_factory):
    """Returns two files with forty conversations of different lengths, each answered by its number."""
    folder = tmp_path_factory.mktemp("numbered_files")
    lines = [json.dumps({"query": "?" * (i % 17), "response": f"{i:02d}"}) + "\n" for i in range(40)]
    (folder / "a.jsonl").write_text("".join(lines[:25]))
    (folder / "b.jsonl").write_text("".join(lines[25:]))
    return [folder / "a.jsonl", folder / "b.jsonl"]


def packed_numbers(found):
    """Returns the answers of a batch in order, as text."""
    labels = found.labels[found.weights > 0]
    return "".join(map(chr, labels[labels < 256]))


def test_every_epoch_has_each_conversation_once_in_another_order(numbered_files, row_processor, demo):
    assert len(LineSource(numbered_files)) == 40
    epochs = [packed_numbers(batch) for batch in batches(numbered_files, row_processor, demo.config.vision, epochs=2)]
    said = "".join(epochs)
    pairs = [said[i : i + 2] for i in range(0, len(said), 2)]
    assert sorted(pairs) == sorted(2 * [f"{i:02d}" for i in range(40)])
    assert pairs[:40] != pairs[40:] and pairs[:40] != sorted(pairs[:40])
    shards = [
        {packed_numbers(batch) for batch in batches(numbered_files, row_processor, demo.config.vision, epochs=1, shard=(i, 2))}
        for i in range(2)
    ]
    assert not shards[0] & shards[1]


def test_restored_iterator_continues_with_the_next_batch(numbered_files, row_processor, demo):
    data = batches(numbered_files, row_processor, demo.config.vision, accumulation=2, epochs=3)
    whole = list(data)
    assert whole[0].ids.shape == (2, 1, 2, 128)
    first = iter(data)
    for _ in range(4):
        next(first)
    second = iter(data)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for found, expected in zip(second, whole[4:], strict=True):
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.weights, expected.weights)

"""Parsers of reasoning, tool calls and line breaks, with text in pieces of any size."""

import itertools
import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.parsers import Content, OutputParser, Reasoning, ToolCall
from serve.parsers.newlines import MAX_SHORT_SPAN, NewlineParser
from serve.parsers.typed import convert_argument

TOOLS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "places": {"type": "array", "items": {"type": "string"}},
            "filter": {"$ref": "#/$defs/Filter"},
        },
        "$defs": {"Filter": {"type": "object"}},
    },
    "now": {},
}
PARAMETERS = "<parameter=city>\nBonn\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
XML = f"<tool_call>\n<function=weather>\n{PARAMETERS}</function>\n</tool_call>"
JSON = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "days": 3}}\n</tool_call>'
CALL = ToolCall("weather", '{"city": "Bonn", "days": 3}')
NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"


def joined(parts):
    """Joins neighbouring parts of one kind."""
    out = []
    for part in parts:
        if out and not isinstance(part, ToolCall) and type(out[-1]) is type(part):
            out[-1] = type(part)(out[-1].text + part.text)
        else:
            out.append(part)
    return out


def parsed(pieces, **options):
    parser = OutputParser(**options)
    parts = [part for piece in pieces for part in parser.push(piece)]
    return joined([*parts, *parser.finish()])


def content(text):
    return [Content(text)] if text else []


@pytest.mark.parametrize(
    "text, thinking, parts",
    [
        ("Hi.", False, [Content("Hi.")]),
        ("", False, []),
        (" <thin", False, [Content(" <thin")]),
        ("Let me see.\n</think>\n\nHi.", True, [Reasoning("Let me see."), Content("Hi.")]),
        ("<think>\nLet me see.\n</think>\n\nHi.", True, [Reasoning("Let me see."), Content("Hi.")]),
        ("\n<think>\nLet me see.\n</think>\n\nHi.", False, [Reasoning("Let me see."), Content("Hi.")]),
        ("\n\n</think>\n\nHi.", True, [Content("Hi.")]),
        ("cut off in thou", True, [Reasoning("cut off in thou")]),
        ("a </thin b", True, [Reasoning("a </thin b")]),
        ("a </think> b <think> c </think>", True, [Reasoning("a"), Content(" b <think> c </think>")]),
        ("Say <think> aloud.", False, [Content("Say <think> aloud.")]),
    ],
)
def test_reasoning(text, thinking, parts):
    assert parsed([text], thinking=thinking) == parts
    assert parsed(text, thinking=thinking) == parts  # one character per piece


@pytest.mark.parametrize("call", [XML, JSON])
@pytest.mark.parametrize(
    "text, parts",
    [
        ("{}", [CALL]),
        ("{}\n", [CALL]),
        ("\n\n{}", [CALL]),
        ("I will look.\n\n{}", [Content("I will look."), CALL]),
        ("{}\n{}", [CALL, CALL]),
        ("{}\nDone.", [CALL, Content("\nDone.")]),
        ("Say <tool_call> first.\n{}", [Content("Say <tool_call> first."), CALL]),
        ("<tool_call>{{broken</tool_call> then\n{}", [Content("<tool_call>{broken</tool_call> then"), CALL]),
        ("<tool_call>\n{}", [Content("<tool_call>"), CALL]),
    ],
)
def test_tool_calls(text, parts, call):
    text = text.replace("{{", "{{{{").replace("{}", "\0").replace("{{{{", "{").replace("\0", call)
    assert parsed([text], tools=TOOLS) == parts
    assert parsed(text, tools=TOOLS) == parts


def test_call_after_reasoning():
    assert parsed(f"Hm.\n</think>\n\nI look.\n\n{XML}", thinking=True, tools=TOOLS) == [
        Reasoning("Hm."),
        Content("I look."),
        CALL,
    ]
    assert parsed(f"Hm. {XML}", thinking=True, tools=TOOLS) == [Reasoning(f"Hm. {XML}")]  # a call inside reasoning is text


def test_call_without_closing_tag_at_the_end():
    assert parsed([XML.removesuffix("</tool_call>")], tools=TOOLS) == [CALL]
    assert parsed([JSON.removesuffix("\n</tool_call>")], tools=TOOLS) == [CALL]


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "hello",
        "{",
        '{"name": "weather"',
        '{"name": "weather", "arguments": [1]}',
        '{"name": "weather", "arguments": {"days": NaN}}',
        '{"name": 5, "arguments": {}}',
        '{"name": "weather", "arguments": {}, "more": 1}',
        '{"name": "unknown", "arguments": {}}',
        "[1]",
        "<function=unknown>\n</function>",
        "<function=weather>",
        "<function=weather>\n<parameter=city>\nBonn\n</function>",
        "<function=weather>\n<parameter=city>\nBonn\n</parameter>",
        "<function=weather>\nwords\n</function>",
        "<function=weather>\n<parameter=city>\na\n</parameter>\n<parameter=city>\nb\n</parameter>\n</function>",
        "<function=weather>\n</function>\nwords",
    ],
)
@pytest.mark.parametrize("after", ["</tool_call>", "</tool_call> and more", "", "\n"])
def test_invalid_call_stays_in_the_content(inner, after):
    text = f"Before. <tool_call>{inner}{after}"
    assert parsed([text], tools=TOOLS) == parsed(text, tools=TOOLS) == [Content(text)]


def test_calls_stay_text_without_tools():
    assert parsed([f" {XML}\n"]) == [Content(f" {XML}\n")]


def test_answer_ends_after_one_call_if_not_parallel():
    parser = OutputParser(tools=TOOLS, parallel=False)
    assert joined(parser.push(f"a {XML}{XML} b") + parser.finish()) == [Content("a"), CALL]
    assert parser.ended


def test_tags_inside_arguments():
    value = "a </parameter> b </tool_call> c"
    xml = f"<tool_call>\n<function=weather>\n<parameter=city>\n{value}\n</parameter>\n</function>\n</tool_call>"
    text = json.dumps({"name": "weather", "arguments": {"city": 'say "</tool_call>" \\'}})
    expected = [
        ToolCall("weather", json.dumps({"city": value})),
        ToolCall("weather", json.dumps({"city": 'say "</tool_call>" \\'})),
    ]
    whole = xml + f"<tool_call>{text}</tool_call>"
    assert parsed([whole], tools=TOOLS) == parsed(whole, tools=TOOLS) == expected


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("city", "12", "12"),
        ("city", "null", "null"),
        ("days", " 12 ", 12),
        ("days", "1.5", "1.5"),
        ("days", "9" * 5000, "9" * 5000),
        ("days", "true", "true"),
        ("exact", "True", True),
        ("exact", "false", False),
        ("exact", "maybe", "maybe"),
        ("limit", "1.5", 1.5),
        ("limit", "None", None),
        ("limit", "NaN", "NaN"),
        ("places", '["a"]', ["a"]),
        ("places", "a, b", "a, b"),
        ("filter", '{"a": 1}', {"a": 1}),
        ("filter", "[" * 100_000, "[" * 100_000),
        ("unheard of", "5", "5"),
    ],
)
def test_arguments_are_converted_to_the_schemas_types(key, text, value):
    schema = TOOLS["weather"]
    got = convert_argument(text, schema["properties"].get(key), schema)
    assert got == value and type(got) is type(value)


def test_recursive_schema_terminates():
    root = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    assert convert_argument("5", {"$ref": "#/$defs/a"}, root) == "5"


@pytest.mark.parametrize(
    "schema, text, value",
    [
        ({"type": ["string", "null"]}, "none", "none"),
        ({"type": ["string", "null"]}, "null", None),
        ({"enum": [1, 2]}, "2", 2),
        ({"const": "2"}, "2", "2"),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "2", 2),
        (True, "2", "2"),
        ({"type": 5, "anyOf": 7, "enum": 3, "$ref": 4}, "2", "2"),
    ],
)
def test_unusual_schemas(schema, text, value):
    assert convert_argument(text, schema, {}) == value


@pytest.mark.parametrize(
    "text, restored",
    [
        (r"one\ntwo", "one\ntwo"),
        (r"\n\n", "\n\n"),
        (r"C:\\new", r"C:\\new"),
        (r"a\tb\\\n", "a\\tb\\\\\n"),
        (r"`a\nb` c\nd", "`a\\nb` c\nd"),
        ("```py\nprint('\\n')\n```\\nok", "```py\nprint('\\n')\n```\nok"),
        (r"$\nabla f$ is\nit", "$\\nabla f$ is\nit"),
        (r"$$a\ne$$\n", "$$a\\ne$$\n"),
        (r"\(\nu\)\n\[\nu\]\n", "\\(\\nu\\)\n\\[\\nu\\]\n"),
        (r"It costs $5\nor $6.\n", "It costs $5\nor $6.\n"),
        (r"It costs $5,\n10 or$6\n", "It costs $5,\n10 or$6\n"),
        ("a ` b\n\\n ` c", "a ` b\n\n ` c"),
        ("` " + "x" * MAX_SHORT_SPAN + r"\n`", "` " + "x" * MAX_SHORT_SPAN + "\n`"),
        ("end\\", "end\\"),
        ("```open\\n", "```open\\n"),
    ],
)
def test_restore_newlines(text, restored):
    for pieces in ([text], text):
        parser = NewlineParser()
        assert "".join(map(parser.push, pieces)) + parser.finish() == restored


def test_newlines_in_reasoning_and_arguments_are_not_restored():
    call = XML.replace("Bonn", r"a\nb")
    parts = parsed(rf"a\nb</think>c\nd {call}", thinking=True, tools=TOOLS, restore_newlines=True)
    assert parts == [Reasoning(r"a\nb"), Content("c\nd"), ToolCall("weather", json.dumps({"city": r"a\nb", "days": 3}))]


MARKS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=now>",
    "</function>",
    "<parameter=city>",
    "</parameter>",
]
SIGNS = ["</parameter>", "`", "```", "$", "$$", "\\(", "\\)", "\\", "\\n", "n", "\n", " ", "a", "5", "<", "ü", '{"name": "now"']
TEXTS = st.lists(st.sampled_from([XML, JSON, NOW, *MARKS, *SIGNS]) | st.text(max_size=3), max_size=14).map("".join)
SWITCH = st.booleans()
OPTIONS = st.fixed_dictionaries(
    {"thinking": SWITCH, "tools": st.sampled_from([None, TOOLS]), "parallel": SWITCH, "restore_newlines": SWITCH}
)


def cut(text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=600, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=8), OPTIONS)
@example(r"\\", [1], {"thinking": False, "tools": None, "parallel": True, "restore_newlines": True})
def test_output_does_not_depend_on_piece_sizes(text, places, options):
    whole = parsed([text], **options)
    assert parsed(cut(text, places), **options) == whole
    assert parsed(text, **options) == whole  # one character per piece
    for part in whole:
        if isinstance(part, ToolCall):
            assert isinstance(json.loads(part.arguments), dict) and part.name in TOOLS


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=8))
def test_plain_text_is_unchanged(text, places):
    parts = parsed(cut(text, places), tools=TOOLS)
    if not any(isinstance(part, (ToolCall, Reasoning)) for part in parts) and not text.lstrip().startswith("<think>"):
        assert parts == content(text)


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_json_arguments_round_trip(value):
    text = json.dumps({"name": "now", "arguments": {"x": value}})
    (call,) = parsed([f"<tool_call>{text}</tool_call>"], tools=TOOLS)
    assert json.loads(call.arguments) == {"x": value}


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.text(st.characters(codec="utf-8", exclude_characters="\r")))
)
def test_xml_arguments_round_trip(arguments):
    marks = ("<tool_call>", "</tool_call>", "<parameter=", "</parameter>", "</function>")
    if any(mark in value for value in arguments.values() for mark in marks):
        return
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    (call,) = parsed([f"<tool_call>\n<function=now>\n{body}</function>\n</tool_call>"], tools=TOOLS)
    assert json.loads(call.arguments) == arguments


@pytest.mark.parametrize(
    "value, written",
    [(r'"\ud800x"', {"x": "\ufffdx"}), (r'"\ud83d\ude00"', {"x": "\U0001f600"}), (r'{"\udfff": 1}', {"x": {"\ufffd": 1}})],
)
def test_surrogates_in_arguments_are_replaced(value, written):
    (call,) = parsed([f'<tool_call>{{"name": "now", "arguments": {{"x": {value}}}}}</tool_call>'], tools=TOOLS)
    assert json.loads(call.arguments.encode()) == written


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "9" * 5000, "[" * 300 + "]" * 300, "[" * 100_000])
def test_arguments_without_json_stay_text(value):
    text = f'<tool_call>{{"name": "now", "arguments": {{"x": {value}}}}}</tool_call>'
    assert parsed([text], tools=TOOLS) == content(text)
    assert convert_argument(value, {"type": ["number", "integer", "array"]}, {}) == value


@pytest.mark.parametrize("type_", [[], {}, [[]], [{}], 1, [None], True])
def test_odd_types_of_a_schema_match_nothing(type_):
    assert convert_argument("1", {"type": type_}, {}) == "1"
    assert convert_argument("1", {"type": type_, "anyOf": [{"type": "integer"}]}, {}) == 1


def test_references_to_many_references_are_followed_once():
    root = {"properties": {"x": {"anyOf": [{"$ref": "#/properties/x"}] * 50 + [{"type": "integer"}]}}}
    chain = {"$defs": {f"r{i}": {"$ref": f"#/$defs/r{i + 1}"} for i in range(3000)} | {"r3000": {"type": "integer"}}}
    begun = time.process_time()
    assert convert_argument("7", root["properties"]["x"], root) == 7
    assert convert_argument("7", {"$ref": "#/$defs/r0"}, chain) == 7
    assert time.process_time() - begun < 2  # all paths of the first are 50 to the fourth

"""Structured outputs: random JSON schemas, regular expressions, choices, grammars and tools, up to bombs."""

import functools
import random
from typing import Any

from tests.fuzz.run import Case, is_directed, json_case

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
WORDS = ("a", "name", "été", "x y", "", "😀", "a\nb", '"', "\\", "<box>", "<|im_end|>", "\0", "type")
LITERALS = (
    "a",
    "b",
    "é",
    "😀",
    r"\d",
    r"\w",
    r"\s",
    ".",
    r"\.",
    "[a-c]",
    "[^a]",
    r"[\x00-\uffff]",
    r"\p{L}",
    r"\b",
    "^",
    "$",
    "",
)
ODD_NUMBERS = (0, -1, 1, 2.5, 1e308, -1e308, 1e-300, 10**18, 10**30, 2**63 - 1, -(2**63), -(2**63) + 1, 2**64, "x", None, [])
SIZES = (10, 300, 3000, 30_000)


def make(rng: random.Random, index: int, model: str) -> Case:
    """Returns a bomb of some size, or a random form."""
    if is_directed(rng, index, len(SIZES) * len(BOMBS)):
        bomb, size = rng.choice(BOMBS), rng.choice(SIZES)
        return as_chat(model, bomb(size), f"{bomb.__name__} of {size}", 0.7)
    label, outputs = rng.choice(FORMS)(rng)
    temperature = rng.choice([0, 0.7, 1.5, 1e-30, 3.4e38])
    if "json" in outputs and rng.random() < 0.6:
        return schema_case(rng, model, outputs["json"], label, temperature)
    return as_chat(model, outputs, label, temperature)


def as_chat(model: str, outputs: dict[str, Any], label: str, temperature: float, **fields: Any) -> Case:
    """Returns a chat request with `structured_outputs`."""
    fields = {"structured_outputs": outputs, "temperature": temperature, **fields}
    return json_case(CHAT, chat(model, **fields), label)


def chat(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, **fields}


def schema_case(rng: random.Random, model: str, schema: Any, label: str, temperature: float) -> Case:
    """Returns a request that carries a schema in another way than `structured_outputs`."""
    function = {"name": rng.choice(["f", "a" * 64, "é"]), "parameters": schema}
    tools = [{"type": "function", "function": function}]
    chosen = rng.choice(["required", "auto", {"type": "function", "function": {"name": function["name"]}}])
    format_ = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": rng.random() < 0.5}}
    ways: list[tuple[str, dict[str, Any]]] = [
        (CHAT, chat(model, response_format=format_, temperature=temperature, stream=rng.random() < 0.5)),
        (CHAT, chat(model, guided_json=schema, n=2)),
        (CHAT, chat(model, tools=tools, tool_choice=chosen, stream=rng.random() < 0.5)),
        (CHAT, chat(model, response_format=format_, chat_template_kwargs={"enable_thinking": True}, thinking_token_budget=2)),
    ]
    answer = {"model": model, "input": "Hello", "max_output_tokens": 6}
    ways += [
        (RESPONSES, {**answer, "text": {"format": {"type": "json_schema", "name": "s", "schema": schema}}}),
        (RESPONSES, {**answer, "tools": [{"type": "function", **function}], "tool_choice": "required", "stream": True}),
        (MESSAGES, chat(model, tools=[{"name": "f", "input_schema": schema}], tool_choice={"type": "any"})),
    ]
    path, body = rng.choice(ways)
    return json_case(path, body, f"{label} on {path}")


def random_schema(rng: random.Random, depth: int, names: tuple[str, ...] = ()) -> Any:
    """Returns a schema, mostly valid, whose references name `names`."""
    if names and rng.random() < 0.2:
        return {"$ref": f"#/$defs/{rng.choice(names)}"}
    if rng.random() < 0.04:
        return rng.choice(
            [True, False, {}, {"type": "nothing"}, {"type": []}, 5, None, {"$ref": "#"}, {"$ref": "http://a.b/c"}, []]
        )
    return rng.choice(LEAVES if depth == 0 else LEAVES[:2] + BRANCHES)(rng, depth - 1, names)


def text(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    more = [{}, {"minLength": 1, "maxLength": rng.choice([2, 10**6, 2**64])}, {"pattern": random_regex(rng, 2)}]
    more += [{"format": rng.choice(["date", "email", "uuid", "date-time", "odd"])}, {"minLength": 5, "maxLength": 2}]
    return {"type": "string", **rng.choice(more)}


def number(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    keys = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
    bounds = {key: rng.choice(ODD_NUMBERS) for key in rng.sample(keys, rng.choice([0, 1, 2]))}
    return {"type": rng.choice(["integer", "number"]), **bounds}


def enumeration(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    values = [rng.choice([*WORDS, *ODD_NUMBERS, 1.5, True, {"a": 1}]) for _ in range(rng.choice([0, 1, 3, 50]))]
    return rng.choice([{"enum": values}, {"const": values[:1]}, {"type": ["string", "null"], "enum": values}])


def array(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    bounds = rng.choice([{}, {"minItems": 1, "maxItems": 3}, {"minItems": 10**6}, {"maxItems": 10**9}, {"uniqueItems": True}])
    prefix = {"prefixItems": [random_schema(rng, depth, names) for _ in range(3)]} if rng.random() < 0.2 else {}
    return {"type": "array", "items": random_schema(rng, depth, names), **bounds, **prefix}


def record(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    keys = [rng.choice(WORDS) + rng.choice(["", "1"]) for _ in range(rng.choice([0, 1, 3, 6]))]
    properties = {key: random_schema(rng, depth, names) for key in keys}
    required = rng.choice([{}, {"required": list(properties)}, {"required": ["missing"]}])
    more = rng.choice([{}, {"additionalProperties": False}, {"additionalProperties": random_schema(rng, 0)}])
    patterns = {"patternProperties": {random_regex(rng, 1): {"type": "integer"}}} if rng.random() < 0.1 else {}
    return {"type": "object", "properties": properties, **required, **more, **patterns}


def union(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    return {rng.choice(["anyOf", "oneOf", "allOf"]): [random_schema(rng, depth, names) for _ in range(rng.choice([0, 1, 2, 5]))]}


LEAVES = (text, number, enumeration)
BRANCHES = (array, record, record, union)


def random_regex(rng: random.Random, depth: int) -> str:
    """Returns a regular expression, mostly valid."""
    if depth == 0:
        return rng.choice(LITERALS)
    inner = [random_regex(rng, depth - 1) for _ in range(rng.choice([1, 2, 4]))]
    counts = ["", "*", "+", "?", "{2}", "{0,3}", "{1,100}", "{1000}", "{,}", "{3,1}", "*?", "++"]
    group = rng.choice(["(%s)", "(?:%s)", "(?=%s)", "(?!%s)", "(?i:%s)", "[%s]", "%s", "(%s"]) % rng.choice(["", "|"]).join(inner)
    return group + rng.choice(counts)


def json_form(rng: random.Random) -> tuple[str, dict[str, Any]]:
    names = tuple(f"r{i}" for i in range(rng.choice([0, 0, 1, 3])))
    depth = rng.choice([0, 1, 2, 3, 5])
    schema = random_schema(rng, depth, names)
    if names and isinstance(schema, dict):
        schema = {**schema, "$defs": {name: random_schema(rng, 1, names) for name in names}}
    return "schema", {"json": schema}


def regex_form(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "regex", {"regex": random_regex(rng, rng.choice([0, 1, 2, 3]))}


def choice_form(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "choice", {"choice": [rng.choice(WORDS) * rng.choice([1, 1, 50]) for _ in range(rng.choice([0, 1, 3, 100]))]}


def lark_form(rng: random.Random) -> tuple[str, dict[str, Any]]:
    rules = [f"r{i}" for i in range(rng.choice([1, 3, 10]))]
    lines = [f"{name}: {body(rng, rules, '|')}" for name in rules]
    return "Lark", {
        "grammar": "\n".join([f"start: {body(rng, rules, '|')}", *lines, "WORD: /[a-z]+/", rng.choice(["", "%ignore / /", "x"])])
    }


def gbnf_form(rng: random.Random) -> tuple[str, dict[str, Any]]:
    rules = [f"r{i}" for i in range(rng.choice([1, 3, 10]))]
    return "GBNF", {
        "grammar": "\n".join([f"root ::= {body(rng, rules, '|')}", *(f"{name} ::= {body(rng, rules, '|')}" for name in rules)])
    }


def body(rng: random.Random, rules: list[str], bar: str) -> str:
    """Returns the right side of a rule."""
    items = [
        *rules,
        '"a"',
        '"é"',
        "[a-z]",
        "/b+/",
        "WORD",
        '"<box>"',
        "(",
        ")",
        '"a"*',
        f"({rng.choice(rules)})?",
        '"x"+',
        "missing",
        "",
    ]
    return f" {bar} ".join(
        " ".join(rng.choice(items) for _ in range(rng.choice([1, 2, 3]))) for _ in range(rng.choice([1, 2, 3]))
    )


FORMS = (json_form, json_form, json_form, regex_form, choice_form, lark_form, gbnf_form)

# Bombs of a size.


def chain_of_references(size: int) -> dict[str, Any]:
    links = {f"r{i}": {"anyOf": [{"$ref": f"#/$defs/r{i + 1}"}, {"type": "null"}]} for i in range(size)}
    return {"json": {"$defs": {**links, f"r{size}": {"type": "null"}}, "$ref": "#/$defs/r0"}}


def nested_arrays(size: int) -> dict[str, Any]:
    deep = min(size, 400)  # `json.dumps` goes no deeper than Python's stack
    return {"json": functools.reduce(lambda inner, _: {"type": "array", "items": inner}, range(deep), {"type": "null"})}


def many_properties(size: int) -> dict[str, Any]:
    return {"json": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(size)}}}


def long_enumeration(size: int) -> dict[str, Any]:
    return {"json": {"enum": [f"value {i}" for i in range(size)]}}


def extreme_constant(size: int) -> dict[str, Any]:
    return {"json": {"enum": ["x", -(2**63) + size]}}


def extreme_range(size: int) -> dict[str, Any]:
    return {"json": {"type": "integer", "minimum": -(2**63) + size, "maximum": -(2**63) + 2 * size}}


def self_reference(size: int) -> dict[str, Any]:
    return {"json": {"$ref": "#"}}


def alternatives(size: int) -> dict[str, Any]:
    return {"json": {"anyOf": [{"type": "string", "pattern": f"^a{{{i}}}b*$"} for i in range(min(size, 1000))]}}


def optional_letters(size: int) -> dict[str, Any]:
    return {"regex": "a?" * size}


def starred_letters(size: int) -> dict[str, Any]:
    return {"regex": "a*b*" * size}


def nested_counts(size: int) -> dict[str, Any]:
    return {"regex": "(" * 4 + "a" + "{1,100})" * min(4, len(str(size))) + ")" * max(0, 4 - len(str(size)))}


def nested_groups(size: int) -> dict[str, Any]:
    return {"regex": "(" * size + "a" + ")" * size}


def ambiguous_regex(size: int) -> dict[str, Any]:
    return {"regex": f"(a|aa)*.{{{size}}}b"}


def long_choice(size: int) -> dict[str, Any]:
    return {"choice": [f"choice {i}" for i in range(size)]}


def long_text(size: int) -> dict[str, Any]:
    return {"choice": ["a" * size * 10, "b"]}


def lark_chain(size: int) -> dict[str, Any]:
    return {"grammar": "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(size)), f'r{size}: "a"'])}


def lark_terminals(size: int) -> dict[str, Any]:
    return {"grammar": "\n".join(["start: T0", *(f"T{i}: T{i + 1}" for i in range(size)), f'T{size}: "a"'])}


def gbnf_chain(size: int) -> dict[str, Any]:
    return {"grammar": "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(size)), f'r{size} ::= "a"'])}


def left_recursion(size: int) -> dict[str, Any]:
    return {"grammar": 'root ::= root "a" | root'}


def doubled_rules(size: int) -> dict[str, Any]:
    depth = min(size, 40)
    return {"grammar": "\n".join(["start: r0", *(f"r{i}: r{i + 1} r{i + 1}" for i in range(depth)), f'r{depth}: "a"?'])}


def nested_brackets(size: int) -> dict[str, Any]:
    return {"grammar": "start: " + "(" * size + '"a"' + ")" * size}


BOMBS = (
    *(chain_of_references, nested_arrays, many_properties, long_enumeration, self_reference, alternatives),
    *(extreme_constant, extreme_range),
    *(optional_letters, starred_letters, nested_counts, nested_groups, ambiguous_regex, long_choice, long_text),
    *(lark_chain, lark_terminals, gbnf_chain, left_recursion, doubled_rules, nested_brackets),
)

"""The OpenAPI document, at /openapi.json, and a page to read it on, at /docs (which loads Swagger UI from its public address).

The routes read their bodies themselves, to refuse them in the words of their APIs; so what a body looks like is said here.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve.api.common.schema import ChatRequest
from serve.api.openai.completions import CompletionRequest
from serve.api.routes.tokens import DetokenizeRequest, TokenizeRequest

_TEXT, _NUMBER, _FLAG = {"type": "string"}, {"type": "number"}, {"type": "boolean"}
_COUNT, _OBJECT = {"type": "integer", "minimum": 1}, {"type": "object"}
_OBJECTS = {"type": "array", "items": _OBJECT}
_SAMPLING = {"temperature": _NUMBER, "top_p": _NUMBER, "top_k": {"type": "integer"}, "stream": _FLAG, "tools": _OBJECTS}

# Requests that become chat requests: their own fields. Those of vLLM's extra body go with them as well.
_RESPONSES = {
    "type": "object",
    "required": ["model", "input"],
    "properties": {
        "model": _TEXT,
        "input": {"anyOf": [_TEXT, _OBJECTS]},
        "instructions": _TEXT,
        "max_output_tokens": _COUNT,
        "reasoning": {"type": "object", "properties": {"effort": _TEXT}},
        "text": {"type": "object", "properties": {"format": _OBJECT}},
        "tool_choice": {},
        "parallel_tool_calls": _FLAG,
        **_SAMPLING,
    },
}
_CONVERSATION = {
    "model": _TEXT,
    "messages": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"enum": ["user", "assistant"]}, "content": {"anyOf": [_TEXT, _OBJECTS]}},
        },
    },
    "system": {"anyOf": [_TEXT, _OBJECTS]},
    "thinking": {"type": "object", "properties": {"type": _TEXT, "budget_tokens": _COUNT}},
    "tool_choice": {"type": "object", "properties": {"type": _TEXT, "name": _TEXT}},
    **_SAMPLING,
}
_MESSAGES = {
    "type": "object",
    "required": ["model", "messages", "max_tokens"],
    "properties": {**_CONVERSATION, "max_tokens": _COUNT, "stop_sequences": {"type": "array", "items": _TEXT}},
}
_COUNT_TOKENS = {"type": "object", "required": ["model", "messages"], "properties": _CONVERSATION}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type"], "properties": {"message": _TEXT, "type": _TEXT}}},
}

_BODIES: dict[str, type[BaseModel] | dict[str, Any]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": _RESPONSES,
    "/v1/messages": _MESSAGES,
    "/v1/messages/count_tokens": _COUNT_TOKENS,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_REFUSALS = {"400": "a mistake in the request", "401": "no valid key", "404": "no such model", "429": "too many requests"}


def install(app: FastAPI) -> None:
    """Has the app describe itself."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(document: dict[str, Any]) -> dict[str, Any]:
    """The document with bodies, keys and refusals."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["Error"] = _ERROR
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            _refusals(operation)
            if path in _BODIES:
                schema = _schema(_BODIES[path], schemas)
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return document


def _refusals(operation: dict[str, Any]) -> None:
    operation["security"] = [{"key": []}, {}]
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, description in _REFUSALS.items():
        operation["responses"][status] = {"description": description, "content": content}
    operation["responses"].pop("422", None)  # FastAPI's own refusals have status 400 here


def _schema(body: type[BaseModel] | dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    if isinstance(body, dict):
        return body
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[body.__name__] = schema
    return {"$ref": f"#/components/schemas/{body.__name__}"}

"""The OpenAPI document at /openapi.json, and its page at /docs (which loads Swagger UI from its public
address).

The routes parse bodies themselves, so that errors have the format of their API. This module adds the bodies'
schemas.
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

# Own fields of requests that become chat requests. vLLM's additional chat fields are accepted too.
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
_MESSAGE_FIELDS = {
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
    "properties": {**_MESSAGE_FIELDS, "max_tokens": _COUNT, "stop_sequences": {"type": "array", "items": _TEXT}},
}
_COUNT_TOKENS = {"type": "object", "required": ["model", "messages"], "properties": _MESSAGE_FIELDS}
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
_ERRORS = {"400": "invalid request", "401": "no valid API key", "404": "unknown model", "429": "too many requests"}


def install(app: FastAPI) -> None:
    """Installs the document as the app's OpenAPI schema."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the document with request bodies, API keys and error responses."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["Error"] = _ERROR
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            _add_errors(operation)
            if path in _BODIES:
                schema = _schema(_BODIES[path], schemas)
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return document


def _add_errors(operation: dict[str, Any]) -> None:
    operation["security"] = [{"key": []}, {}]
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, description in _ERRORS.items():
        operation["responses"][status] = {"description": description, "content": content}
    operation["responses"].pop("422", None)  # FastAPI's own validation errors have status 400 here


def _schema(body: type[BaseModel] | dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    if isinstance(body, dict):
        return body
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[body.__name__] = schema
    return {"$ref": f"#/components/schemas/{body.__name__}"}

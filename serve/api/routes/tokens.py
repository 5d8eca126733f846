"""POST /tokenize and /detokenize, as vLLM has them."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from serve.api.common.errors import ApiError
from serve.api.common.media_limits import media_costs
from serve.api.common.middleware import read_body
from serve.api.common.request_pipeline import check_model, make_prompt
from serve.api.common.schema import Strict, TokenId, checked, json_object, validated
from serve.api.common.service import Service

router = APIRouter()


class TokenizeRequest(Strict):
    """A text; a conversation is a chat request instead."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """Tokens of the vocabulary."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


@router.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    """A text's tokens, or those of a conversation's whole prompt, pictures included."""
    service = request.app.state.service
    return await service.in_thread(_tokenize, service, await read_body(request, service.max_body_bytes))


def _tokenize(service: Service, body: bytes) -> dict[str, Any]:
    raw = json_object(body)
    if "messages" in raw:
        with_strings = raw.pop("return_token_strs", False)
        raw.pop("add_special_tokens", None)
        chat = checked({"model": service.name, **raw})
        check_model(service, chat.model)
        inputs = make_prompt(service, chat)
        ids, media = inputs.token_ids.tolist(), media_costs(chat.messages, inputs)
    else:
        asked = validated(TokenizeRequest, raw)
        check_model(service, asked.model or service.name)
        with_strings = asked.return_token_strs
        tokenizer = service.model.processor.tokenizer
        ids, media = tokenizer(asked.prompt, add_special_tokens=asked.add_special_tokens)["input_ids"], []
    strings = [service.model.detokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids] if with_strings else None
    return {"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": strings, "media": media}


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, str]:
    """The text of tokens."""
    service = request.app.state.service
    return await service.in_thread(_detokenize, service, await read_body(request, service.max_body_bytes))


def _detokenize(service: Service, body: bytes) -> dict[str, str]:
    asked = validated(DetokenizeRequest, json_object(body))
    check_model(service, asked.model or service.name)
    vocabulary = service.vocabulary
    for i, token in enumerate(asked.tokens):
        if token >= vocabulary:
            raise ApiError(400, f"tokens[{i}] is {token}, but the vocabulary has {vocabulary} tokens", f"tokens[{i}]")
    return {"prompt": service.model.detokenizer.decode(asked.tokens, skip_special_tokens=False)}

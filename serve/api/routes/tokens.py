"""POST /tokenize and /detokenize, as in vLLM."""

from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from minicpmv46_jax.processing import PromptTooLong
from minicpmv46_jax.processing.chat import check_characters
from serve.api.common.errors import ApiError
from serve.api.common.media_limits import check_media, media_costs
from serve.api.common.request_pipeline import (
    ParsedRequest,
    build_inputs,
    check_model,
    client_errors,
    plan_prompt,
    prepare_body,
)
from serve.api.common.schema import ChatRequest, Strict, TokenId, checked, json_object, validated
from serve.api.common.service import Service
from serve.runtime.budget import RequestMemory

router = APIRouter()


class TokenizeRequest(Strict):
    """POST /tokenize with a text. A conversation is sent as the fields of a chat request instead."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


@router.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    """Returns the tokens of a text, or of a conversation's whole prompt, images included."""
    async with AsyncExitStack() as cleanup:
        result, _ = await prepare_body(request, cleanup, _tokenize)
        return result


async def _tokenize(service: Service, body: bytes, memory: RequestMemory) -> dict[str, Any]:
    request, with_strings = await service.run_check(_check, service, body, size=len(body))
    if isinstance(request, ChatRequest):
        with client_errors(ParsedRequest(request)):
            plan = await service.run_in_thread(plan_prompt, service, request, size=len(body))
            inputs = await build_inputs(service, plan, memory)
        ids, media = inputs.token_ids.tolist(), media_costs(request.messages, inputs)
    else:
        ids, media = await service.run_in_thread(_text_ids, service, request, size=len(body)), []
    strings = await service.run_in_thread(_token_texts, service, ids, size=4 * len(ids)) if with_strings else None
    return {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": strings, "media": media}


def _check(service: Service, body: bytes) -> tuple[TokenizeRequest | ChatRequest, bool]:
    """Returns the checked fields of a text or a conversation, and whether the tokens' texts are wanted."""
    raw = json_object(body)
    if "messages" not in raw:
        text = validated(TokenizeRequest, raw)
        check_model(service, text.model or service.name)
        return text, text.return_token_strs
    with_strings = raw.pop("return_token_strs", False)
    raw.pop("add_special_tokens", None)
    chat = checked({"model": service.name, **raw}, ChatRequest)
    check_model(service, chat.model)
    check_media(chat.messages, service.media_limits)
    return chat, with_strings


def _text_ids(service: Service, request: TokenizeRequest) -> list[int]:
    try:
        check_characters(request.prompt, service.max_model_len)
    except PromptTooLong as error:
        raise ApiError(400, str(error), "prompt", "context_length_exceeded") from None
    return service.model.processor.tokenizer(request.prompt, add_special_tokens=request.add_special_tokens)["input_ids"]


def _token_texts(service: Service, ids: list[int]) -> list[str]:
    return [service.model.detokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, str]:
    """Returns the text of tokens."""
    async with AsyncExitStack() as cleanup:
        result, _ = await prepare_body(request, cleanup, _prepare_detokenize)
        return result


async def _prepare_detokenize(service: Service, body: bytes, memory: RequestMemory) -> dict[str, str]:
    return await service.run_check(_detokenize, service, body, size=len(body))


def _detokenize(service: Service, body: bytes) -> dict[str, str]:
    parsed = validated(DetokenizeRequest, json_object(body))
    check_model(service, parsed.model or service.name)
    for i, token in enumerate(parsed.tokens):
        if token >= service.vocab_size:
            message = f"tokens[{i}] is {token}, but the vocabulary has {service.vocab_size} tokens"
            raise ApiError(400, message, f"tokens[{i}]")
    return {"prompt": service.model.detokenizer.decode(parsed.tokens, skip_special_tokens=False)}

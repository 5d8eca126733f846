"""POST /tokenize and /detokenize, as in vLLM."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from serve.api.common.errors import ApiError
from serve.api.common.media_limits import media_costs
from serve.api.common.middleware import read_body
from serve.api.common.request_pipeline import check_model, make_prompt
from serve.api.common.schema import ChatRequest, Strict, TokenId, checked, json_object, validated
from serve.api.common.service import Service

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
    service = request.app.state.service
    return await service.run_in_thread(_tokenize, service, await read_body(request, service.max_body_bytes))


def _tokenize(service: Service, body: bytes) -> dict[str, Any]:
    raw = json_object(body)
    if "messages" in raw:
        with_strings = raw.pop("return_token_strs", False)
        raw.pop("add_special_tokens", None)
        chat = checked({"model": service.name, **raw}, ChatRequest)
        check_model(service, chat.model)
        inputs = make_prompt(service, chat)
        ids, media = inputs.token_ids.tolist(), media_costs(chat.messages, inputs)
    else:
        text = validated(TokenizeRequest, raw)
        check_model(service, text.model or service.name)
        with_strings = text.return_token_strs
        tokenizer = service.model.processor.tokenizer
        ids, media = tokenizer(text.prompt, add_special_tokens=text.add_special_tokens)["input_ids"], []
    strings = [service.model.detokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids] if with_strings else None
    return {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": strings, "media": media}


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, str]:
    """Returns the text of tokens."""
    service = request.app.state.service
    return await service.run_in_thread(_detokenize, service, await read_body(request, service.max_body_bytes))


def _detokenize(service: Service, body: bytes) -> dict[str, str]:
    parsed = validated(DetokenizeRequest, json_object(body))
    check_model(service, parsed.model or service.name)
    for i, token in enumerate(parsed.tokens):
        if token >= service.vocab_size:
            message = f"tokens[{i}] is {token}, but the vocabulary has {service.vocab_size} tokens"
            raise ApiError(400, message, f"tokens[{i}]")
    return {"prompt": service.model.detokenizer.decode(parsed.tokens, skip_special_tokens=False)}

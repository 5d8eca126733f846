"""GET /v1/models."""

from typing import Any

from fastapi import APIRouter, Request

router = APIRouter()


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model served; `max_model_len` as vLLM adds it."""
    service = request.app.state.service
    model = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "minicpmv46-jax",
        "max_model_len": service.context,
    }
    return {"object": "list", "data": [model]}

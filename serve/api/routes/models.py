"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from fastapi import APIRouter, Request

from serve.api.common.request_pipeline import check_model
from serve.api.common.service import Service

router = APIRouter()


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """Lists the served model under each of its names."""
    service = request.app.state.service
    return {"object": "list", "data": [_model(service, name) for name in service.names]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """Returns the model of that name, which may contain slashes."""
    service = request.app.state.service
    check_model(service, name)
    return _model(service, name)


def _model(service: Service, name: str) -> dict[str, Any]:
    """Returns OpenAI's model object with vLLM's fields `root` and `max_model_len`."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "minicpmv46-jax",
        "root": service.name,
        "max_model_len": service.max_model_len,
    }

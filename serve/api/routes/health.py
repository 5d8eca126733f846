"""GET /health, /ready and /version, without an API key."""

from fastapi import APIRouter, Request

import minicpmv46_jax
from serve.api.common.json_encoding import JsonResponse

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JsonResponse:
    """Returns 200 while the engine runs, 503 once it has stopped or failed."""
    engine = request.app.state.service.engine
    status = "ok" if engine.alive else "stopped" if engine.failed is None else "failed"
    return JsonResponse({"status": status}, 200 if engine.alive else 503)


@router.get("/ready")
async def ready(request: Request) -> JsonResponse:
    """Returns 200 if a new request would be accepted, 503 if the queue is full or the engine has stopped."""
    engine = request.app.state.service.engine
    state = "stopped" if not engine.alive else "full" if engine.full else "ready"
    return JsonResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    """Returns the server's version."""
    return {"version": minicpmv46_jax.__version__}

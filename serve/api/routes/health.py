"""GET /health, /ready, /version: open to all."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

import minicpmv46_jax

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engine works, 503 once it does not."""
    alive = request.app.state.service.engine.alive
    return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 while a request would be taken on; 503 while the queue is full or the engine stops."""
    engine = request.app.state.service.engine
    state = "stopped" if not engine.alive else "full" if engine.full else "ready"
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    """This server's."""
    return {"version": minicpmv46_jax.__version__}

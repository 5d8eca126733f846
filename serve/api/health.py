"""GET /health, open to all."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engine works, 503 once it does not."""
    alive = request.app.state.service.engine.alive
    return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

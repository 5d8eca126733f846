"""GET /metrics, without an API key, because metrics contain no prompts."""

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Returns the engine's metrics in Prometheus' text format."""
    return Response(request.app.state.service.engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

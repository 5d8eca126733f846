"""GET /metrics, open to all as /health is: numbers, no prompts."""

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """In Prometheus' format."""
    return Response(request.app.state.service.engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

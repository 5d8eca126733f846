"""The application."""

from fastapi import Depends, FastAPI

from serve.api import chat, completions, errors, health, metrics, models
from serve.api.auth import require_key
from serve.api.exchange import ExchangeMiddleware
from serve.api.service import Service


def create_app(service: Service) -> FastAPI:
    """OpenAI's API over `service`. Closing the service is the caller's."""
    # No generated documents: they would describe bodies that the routes read themselves.
    app = FastAPI(title="MiniCPM-V 4.6 in JAX", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(ExchangeMiddleware)
    errors.install(app)
    app.include_router(health.router)
    app.include_router(metrics.router)
    for router in (models.router, chat.router, completions.router):
        app.include_router(router, prefix="/v1", dependencies=[Depends(require_key)])
    return app

"""The ASGI application."""

import dataclasses

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware

import minicpmv46_jax
from serve.api.anthropic import messages
from serve.api.common import errors
from serve.api.common.auth import require_key
from serve.api.common.json_encoding import JsonResponse
from serve.api.common.middleware import HostMiddleware, RequestMiddleware
from serve.api.common.service import Service
from serve.api.openai import chat, completions, responses
from serve.api.routes import docs, health, home, metrics, models, scene, tokens


def create_app(service: Service) -> FastAPI:
    """Returns the application of all routes over a service. The caller closes the service."""
    app = FastAPI(
        title="MiniCPM-V 4.6 in JAX", version=minicpmv46_jax.__version__, redoc_url=None, default_response_class=JsonResponse
    )
    app.state.service = service
    app.add_middleware(RequestMiddleware)
    if service.cors is not None:  # outermost, so that pages can read errors too
        app.add_middleware(CORSMiddleware, **dataclasses.asdict(service.cors), expose_headers=["X-Request-Id"])
    if service.allowed_hosts:
        app.add_middleware(HostMiddleware, allowed_hosts=service.allowed_hosts)
    errors.install(app)
    app.include_router(home.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    for router in (tokens.router, scene.router):
        app.include_router(router, dependencies=[Depends(require_key)])
    for router in (models.router, chat.router, completions.router, responses.router, messages.router):
        app.include_router(router, prefix="/v1", dependencies=[Depends(require_key)])
    docs.install(app)
    return app

"""OpenAI's HTTP API over an engine.

- app.py: the application; service.py: what its routes share.
- exchange.py: request ids, the log, the body's limit, errors nobody expected. auth.py: keys. errors.py: OpenAI's error object.
- schema.py: what a chat request may say. chat.py: its route; answers.py: OpenAI's answer objects; sse.py: server-sent events.
- completions.py: the older text completions, for load clients.
- models.py, health.py, metrics.py: the small routes.
"""

from serve.api.app import create_app
from serve.api.service import Service

__all__ = ["Service", "create_app"]

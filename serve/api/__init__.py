"""The HTTP APIs over an engine: OpenAI's, Anthropic's, and vLLM's small routes.

- app.py: the application; service.py: what its routes share; docs.py: the OpenAPI document.
- exchange.py: request ids, the log, the body's limit, errors nobody expected. auth.py: keys. errors.py: error objects.
- asking.py: from a chat request to the steps of its answers, which all routes go through; schema.py: what one may say;
  choices.py: one answer; prompt.py, thinking.py: what its prompt says, and a budget for thinking; forms.py: JSON, calls and
  the like; pictures.py: how many, and what they cost.
- chat.py, answers.py: /v1/chat/completions. responses*.py: /v1/responses. messages*.py: /v1/messages. foreign.py: what these two
  share. sse.py: server-sent events. completions.py: the older text completions.
- tokens.py, models.py, health.py, metrics.py, home.py: the small routes, and the page.
"""

from serve.api.app import create_app
from serve.api.common.service import Service

__all__ = ["Service", "create_app"]

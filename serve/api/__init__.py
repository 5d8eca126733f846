"""HTTP APIs over an engine: OpenAI's, Anthropic's, and vLLM's utility routes.

- app.py: the application.
- common/: request_pipeline.py, from a body to the output of a submitted request; schema.py, the fields of
  requests; respond.py and sse.py, responses; output_stream.py, the output of one choice; prompt.py and
  thinking.py, the prompt's end and the thinking budget; media_limits.py, limits on images and videos;
  service.py, the state that routes share; middleware.py, request ids and the log; auth.py, API keys;
  errors.py, error objects.
- common/conversation.py, field_names.py and typed_events.py: the base of /v1/messages and /v1/responses,
  whose requests become chat requests and whose streams are typed events.
- openai/: /v1/chat/completions, /v1/completions and /v1/responses. anthropic/: /v1/messages.
- routes/: the utility routes, the OpenAPI document and the chat page.
"""

from serve.api.app import create_app
from serve.api.common.service import Service

__all__ = ["Service", "create_app"]

"""An inference server for MiniCPM-V 4.6 with the APIs of OpenAI and Anthropic.

Commands: `python -m serve` (the server), `serve.chat` (a chat on the terminal), `serve.batch` (files of
requests), `serve.bench` (a load client), `serve.table` (a suite of loads), `serve.autotuned` (bundles XLA's
autotuning results). `serve.offline` runs many conversations at once from Python.

- cli/: the commands, their options, and the service that they build from them.
- runtime/: start of jax and of the engine, compiled programs and their caches, the log, the running server.
- api/: the HTTP APIs, without jax of its own. common/ is shared, openai/ and anthropic/ have each API's
  objects, routes/ has the rest: models, tokens, health, metrics, documentation and the page.
- engine/: the thread that batches requests. Scheduler, pages, prefix cache and memory plan are free of jax;
  the engine, the model runner and its helpers use it.
- structured_output/: grammars of responses. parsers/: reasoning and tool calls in generated text.
- multimodal/: fetching images and videos, rules for addresses, image worker processes.
- web/: the chat page.
"""

"""The HTTP server: `python -m serve`; a chat on the terminal: `python -m serve.chat`; files of requests: `python -m serve.batch`;
many conversations at once from Python: `serve.offline`.

- __main__.py, flags.py: the command line. startup.py: platform, caches, checkpoint, first compilation. server.py: signals.
- engine.py: the thread that batches; jobs.py: requests on their way to it and back; answer.py, work.py: one request.
- scheduler.py, pages.py, prefix.py, features.py, sizes.py: what runs when and where; no jax. device.py, programs.py: all jax.
- metrics.py: what it tells of itself. bench.py: a load client. constraints.py: answers that keep to a form.
- media.py, addresses.py: what a request's URLs and paths may open. cutters.py: processes that open pictures. logs.py: the log.
- parsers/: reasoning and tool calls out of a model's text. api/: the HTTP APIs; knows no jax. page/: the chat page.
"""

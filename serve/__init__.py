"""The HTTP server: `python -m serve`.

- __main__.py: the command line. startup.py: platform, caches, checkpoint, first compilation. server.py: signals, the log.
- engine.py: the thread that batches; jobs.py: requests on their way to it and back; answer.py, work.py: one request.
- scheduler.py, pages.py, prefix.py, features.py, sizes.py: what runs when and where; no jax. device.py, programs.py: all jax.
- metrics.py: what it tells of itself. bench.py: a load client.
- media.py: what a request's URLs and paths may open.
- api/: OpenAI's routes over an engine; knows no jax.
"""

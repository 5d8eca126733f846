"""The HTTP server: `python -m serve`.

- __main__.py: the command line. startup.py: platform, caches, checkpoint, first compilation. server.py: signals, the log.
- engine.py: requests through the model, in order; knows no HTTP.
- media.py: what a request's URLs and paths may open.
- api/: OpenAI's routes over an engine; knows no jax.
"""

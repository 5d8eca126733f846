"""Builds a `Service` from command-line arguments, for `python -m serve` and `python -m serve.batch`.

Modules that import jax or transformers take seconds, so functions import them; `--help` and argument errors
need none of them.
"""

import argparse
import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.api import Service
    from serve.api.common.service import Cors
    from serve.multimodal.media_fetcher import MediaFetcher


def check_model_args(args: argparse.Namespace) -> None:
    """Raises ValueError if the arguments of the model or its media contradict each other."""
    if args.model is None and args.revision is not None:
        raise ValueError("--revision needs a --model from the hub, and there is no --model")
    folder = args.allowed_local_media_path
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--allowed-local-media-path is {folder}, which is not a folder")


def build_service(args: argparse.Namespace, **fields: Any) -> "Service":
    """Loads the model, compiles the engine's programs and returns a service that is ready to answer.

    Args:
      args: parsed arguments of `add_model_flags` and `add_engine_flags`.
      **fields: further fields of `Service`.

    Raises:
      ValueError: an argument, the device or the checkpoint does not fit.
      OSError: a file cannot be read or written.
    """
    from minicpmv46_jax import demo
    from minicpmv46_jax.library import ModelLoader
    from minicpmv46_jax.processing.video import VideoLimits
    from serve.api import Service
    from serve.api.common.service import MEDIA_LIMITS
    from serve.engine.engine import QueuePolicy
    from serve.engine.memory_plan import EngineConfig
    from serve.multimodal.image_workers import ImageThreads, ImageWorkerPool, default_workers
    from serve.runtime import startup
    from serve.runtime.cache_dir import cache_folder
    from serve.structured_output.trial import start_trial_workers
    from serve.structured_output.vocabulary import Vocabulary

    platform = startup.choose_platform(args.platform, args.memory_fraction)
    startup.check_backend(args.backend)
    device_config = startup.DeviceConfig(platform, args.memory_fraction, cache_folder(), args.backend)
    startup.enable_compilation_cache(device_config)
    source = demo.FOLDER if args.model is None else args.model
    # XLA's bfloat16 products are slow on a CPU: 1.2 to 2.8 s a token of the full model, in float32 0.2 s.
    dtype = args.dtype or ("float32" if platform == "cpu" else "bfloat16")
    engine_config = EngineConfig(args.max_running, args.max_model_len, not args.no_prefix_cache)
    policy = QueuePolicy(args.max_waiting, args.max_wait, int(args.prefix_host_gib * 2**30))
    num_workers = default_workers() if args.picture_processes is None else args.picture_processes
    media_workers = ImageWorkerPool(num_workers, args.max_image_seconds) if num_workers else ImageThreads()
    fetcher = build_media_fetcher(args)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(media_workers.close)
        with ModelLoader(source, dtype, args.revision, fetcher, True, not args.skip_checksums) as loader:
            model, engine = startup.load_engine(loader, device_config, engine_config, policy)
        on_failure.pop_all()
    model.processor.max_pixels = args.max_pixels
    model.processor.video_limits = VideoLimits(args.max_video_frames, args.max_video_seconds, args.max_video_pictures)
    name, *aliases = args.served_model_name or [default_model_name(args.model, startup.DEMO_NAME)]
    fields |= {
        "media_limits": {**MEDIA_LIMITS, **args.limit_mm_per_prompt},
        "restore_newlines": args.restore_newlines,
        "fetcher": fetcher,
        "media_workers": media_workers,
        "memory_bytes": int(args.request_memory_gib * 2**30),
        "demo": args.model is None,
    }
    vocabulary = Vocabulary.of(model.detokenizer, model.config.text.vocab_size, model.generation_config.stop_token_ids)
    service = Service(model, engine, name, tuple(aliases), trial_workers=start_trial_workers(vocabulary), **fields)
    threading.Thread(target=service.grammar_compiler.warm_up, name="warm-up", daemon=True).start()  # takes seconds
    return service


def build_cors(args: argparse.Namespace) -> "Cors | None":
    """Returns the rules for cross-origin requests, or None if the flags allow no other origin."""
    from serve.api.common.service import Cors

    if not args.allowed_origins:
        return None
    origins, methods, headers = map(tuple, (args.allowed_origins, args.allowed_methods, args.allowed_headers))
    return Cors(origins, methods, headers, args.allow_credentials)


def build_media_fetcher(args: argparse.Namespace) -> "MediaFetcher":
    """Returns a fetcher with the flags' rules for images and videos that requests name."""
    from serve.multimodal.media_fetcher import DownloadLimits, MediaFetcher, NetworkPolicy

    domains = frozenset(domain.lower().rstrip(".") for domain in args.allowed_media_domains)
    network_policy = NetworkPolicy(tuple(args.allowed_media_networks), domains)
    return MediaFetcher(args.allowed_local_media_path, DownloadLimits(max_bytes=args.max_media_bytes), network_policy)


def default_model_name(source: str | None, demo_name: str) -> str:
    """Returns a folder's name, or the hub id, or the demo model's name if there is no source."""
    if source is None:
        return demo_name
    return Path(source).resolve().name if Path(source).is_dir() else source

"""Command line of the server; see `python -m serve --help`."""

import argparse
import contextlib
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.cli import args as flags

if TYPE_CHECKING:
    from serve.api import Service
    from serve.api.common.service import Cors
    from serve.multimodal.media_fetcher import MediaFetcher

INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM.

    Returns:
      The exit status: 0, 1 for a user's mistake (one line on stderr), 130 if stopped before it served.
    """
    args = _parser().parse_args(argv)
    try:
        check(args)
        keys = api_keys(args.api_key, args.api_key_file)
        listening = bind(args.host, args.port)
        service = start(args, api_keys=keys, cors=cors(args), log_prompts=args.log_requests)
        listen(listening)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    from serve.runtime.server import Tls, run

    tls = None if args.ssl_certfile is None else Tls(args.ssl_certfile, args.ssl_keyfile, args.ssl_keyfile_password)
    run(service, listening, tls, args.log_format)
    return 0


def check(args: argparse.Namespace) -> None:
    """Finds what is wrong with the flags before anything slow starts. Raises ValueError."""
    check_model(args)
    if args.ssl_certfile is None and args.ssl_keyfile is not None:
        raise ValueError("--ssl-keyfile goes with an --ssl-certfile, and there is none")
    if args.ssl_certfile is not None:
        check_tls(args)


def check_model(args: argparse.Namespace) -> None:
    """The same for the flags about the model and its pictures."""
    if args.model is None and args.revision is not None:
        raise ValueError("--revision goes with a --model from the hub, and there is no --model")
    folder = args.allowed_local_media_path
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--allowed-local-media-path is {folder}, which is not a folder")


def check_tls(args: argparse.Namespace) -> None:
    """Raises ValueError for a certificate and key that do not work."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            args.ssl_certfile, args.ssl_keyfile, args.ssl_keyfile_password or (lambda: "")
        )
    except OSError as error:
        files = " and ".join(filter(None, (args.ssl_certfile, args.ssl_keyfile)))
        raise ValueError(f"--ssl-certfile, --ssl-keyfile: {files} cannot be used: {error}") from None


def api_keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """All keys that let clients in: the flag's, and the file's, one a line. Raises ValueError."""
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if file is not None and not keys:
        raise ValueError(f"--api-key-file is {file}, which has no key in it")
    if not all(key.strip() for key in given):
        raise ValueError("--api-key is empty: leave it out to let everyone in")
    return (*given, *keys)


def bind(host: str, port: int) -> socket.socket:
    """Takes the address, so that a taken one is known before minutes of loading; nobody can connect until the server listens."""
    with contextlib.ExitStack() as cleanup:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            listening = cleanup.enter_context(socket.socket(family))
            if sys.platform != "win32":  # where this option would let two servers share a port
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except socket.gaierror as error:
            raise ValueError(f"--host {host!r} is no address of this machine: {error.strerror}") from None
        except (OSError, UnicodeError) as error:
            raise ValueError(f"cannot serve on host {host!r}, port {port}: {getattr(error, 'strerror', None) or error}") from None
        cleanup.pop_all()
    return listening


def listen(listening: socket.socket) -> None:
    """Lets clients connect. Raises ValueError if a server that loaded at the same time was faster with the same port."""
    try:
        listening.listen()
    except OSError as error:
        raise ValueError(f"cannot serve on port {listening.getsockname()[1]}: {error.strerror}") from None


def start(args: argparse.Namespace, **fields: Any) -> "Service":
    """Everything up to a `Service` that answers; `fields` are its own. Raises ValueError, or OSError of a disk."""
    from minicpmv46_jax import demo
    from minicpmv46_jax.library import ModelLoader
    from minicpmv46_jax.processing.media_job import process_media
    from minicpmv46_jax.processing.video import VideoLimits
    from serve.api import Service
    from serve.api.common.service import MEDIA_LIMITS
    from serve.engine.engine import QueuePolicy
    from serve.engine.memory_plan import EngineConfig
    from serve.multimodal.image_workers import ImageWorkerPool, processes_for
    from serve.runtime import startup  # jax, transformers and all: seconds, and none of it for --help
    from serve.runtime.cache_dir import cache_folder

    platform = startup.choose_platform(args.platform, args.memory_fraction)
    place = startup.Place(platform, args.memory_fraction, cache_folder())
    startup.keep_compilations(place)
    source = demo.FOLDER if args.model is None else args.model
    # On a CPU XLA multiplies slowly in bfloat16: 1.2 to 2.8 s a token of the full model on 2 cores, in float32 0.2 s.
    dtype = args.dtype or ("float32" if platform == "cpu" else "bfloat16")
    wishes = EngineConfig(args.max_running, args.max_model_len, not args.no_prefix_cache)
    policy = QueuePolicy(args.max_waiting, args.max_wait, int(args.prefix_host_gib * 2**30))
    processes = processes_for(platform != "cpu") if args.picture_processes is None else args.picture_processes
    image_workers = ImageWorkerPool(processes) if processes else None
    with contextlib.ExitStack() as on_failure:
        if image_workers is not None:
            on_failure.callback(image_workers.close)
        with ModelLoader(source, dtype, args.revision, media_fetcher(args), progress=True) as loading:
            model, engine = startup.start(loading, place, wishes, policy)
        on_failure.pop_all()
    model.processor.media_worker = image_workers or process_media
    model.processor.max_pixels = args.max_pixels
    model.processor.video_limits = VideoLimits(args.max_video_frames, args.max_video_seconds, args.max_video_pictures)
    name, *aliases = args.served_model_name or [served_name(args.model, startup.DEMO_NAME)]
    media_limits = {**MEDIA_LIMITS, **args.limit_mm_per_prompt}
    fields |= {
        "media_limits": media_limits,
        "restore_newlines": args.restore_newlines,
        "image_workers": image_workers,
        "demo": args.model is None,
    }
    return Service(model, engine, name, tuple(aliases), **fields)


def cors(args: argparse.Namespace) -> "Cors | None":
    """Which web pages of other origins may ask."""
    from serve.api.common.service import Cors

    if not args.allowed_origins:
        return None
    lists = (args.allowed_origins, args.allowed_methods, args.allowed_headers)
    return Cors(*map(tuple, lists), args.allow_credentials)


def media_fetcher(args: argparse.Namespace) -> "MediaFetcher":
    """The rules for pictures and videos that requests name."""
    from serve.multimodal.media_fetcher import Limits, MediaFetcher, Reach

    domains = frozenset(domain.lower().rstrip(".") for domain in args.allowed_media_domains)
    reach = Reach(tuple(args.allowed_media_networks), domains)
    return MediaFetcher(args.allowed_local_media_path, Limits(max_bytes=args.max_media_bytes), reach)


def served_name(source: str | None, demo: str) -> str:
    """A folder's name, or the hub id, or the demo's."""
    if source is None:
        return demo
    return Path(source).resolve().name if Path(source).is_dir() else source


def _parser() -> flags.Parser:
    parser = flags.Parser(
        prog="python -m serve", allow_abbrev=False, description="Serve MiniCPM-V 4.6 over OpenAI's chat completions API."
    )
    flags.add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument(
        "--port", type=flags.port, default=8000, help="port to serve on; 0 for any free one (default: %(default)s)"
    )
    flags.add_engine_flags(parser.add_argument_group("engine"))
    flags.add_client_flags(parser.add_argument_group("who may ask"))
    flags.add_log_flags(parser.add_argument_group("the log"))
    return parser


if __name__ == "__main__":
    # SIGTERM as Ctrl-C, also while loading. Here and not in main(): signals belong to the program, not to who calls a function.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

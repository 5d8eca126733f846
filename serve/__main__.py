"""Command line of the server; see `python -m serve --help`."""

import argparse
import contextlib
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serve import flags

if TYPE_CHECKING:
    from serve.api import Service
    from serve.media import MediaFetcher

INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM.

    Returns:
      The exit status: 0, 1 for a user's mistake (one line on stderr), 130 if stopped before it served.
    """
    args = _parser().parse_args(argv)
    try:
        check(args)
        listening = bind(args.host, args.port)
        service = start(args)
        listen(listening)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    from serve.server import run

    run(service, listening)
    return 0


def check(args: argparse.Namespace) -> None:
    """Finds what is wrong with the flags before anything slow starts. Raises ValueError."""
    if args.model is None and args.revision is not None:
        raise ValueError("--revision goes with a --model from the hub, and there is no --model")
    if args.api_key is not None and not args.api_key.strip():
        raise ValueError("--api-key is empty: leave it out to let everyone in")
    folder = args.allowed_local_media_path
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--allowed-local-media-path is {folder}, which is not a folder")


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


def start(args: argparse.Namespace) -> "Service":
    """Everything up to a `Service` that answers. Raises ValueError, or OSError of a disk."""
    from minicpmv46_jax.processing.video import Bounds
    from serve import startup  # jax, transformers and all: seconds, and none of it for --help
    from serve.api import Service
    from serve.api.service import MEDIA_LIMITS
    from serve.engine import Engine

    platform = startup.choose_platform(args.platform)
    cache = startup.cache_folder()
    startup.keep_compilations(cache)
    source = startup.demo_checkpoint(cache) if args.model is None else args.model
    # On a CPU XLA multiplies slowly in bfloat16: 1.2 to 2.8 s a token of the full model on 2 cores, in float32 0.2 s.
    dtype = args.dtype or ("float32" if platform == "cpu" else "bfloat16")
    model = startup.load(source, args.revision, dtype, media_fetcher(args))
    model.processor.max_pixels = args.max_pixels
    model.processor.video_bounds = Bounds(args.max_video_frames, args.max_video_seconds, args.max_video_pictures)
    startup.warm_up(model)
    name = args.served_model_name or served_name(args.model, startup.DEMO_NAME)
    return Service(model, Engine(model), name, args.api_key, media_limits={**MEDIA_LIMITS, **args.limit_mm_per_prompt})


def media_fetcher(args: argparse.Namespace) -> "MediaFetcher":
    """The rules for pictures and videos that requests name."""
    from serve.media import Limits, MediaFetcher, Reach

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
    parser.add_argument(
        "--model", "--model-path", metavar="FOLDER_OR_ID", help="released or converted folder, or hub id (default: a small demo)"
    )
    parser.add_argument("--revision", metavar="R", help="hub branch, tag or commit")
    platform = parser.add_mutually_exclusive_group()
    for name in ("cpu", "gpu", "tpu"):
        platform.add_argument(f"--{name}", dest="platform", action="store_const", const=name, help=f"run on the {name.upper()}")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument(
        "--port", type=flags.port, default=8000, help="port to serve on; 0 for any free one (default: %(default)s)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="what clients must send as `Authorization: Bearer KEY`")
    _add_media_flags(parser.add_argument_group("pictures and videos in requests"))
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the hub id, or the folder's name")
    return parser


def _add_media_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--allowed-local-media-path", metavar="DIR", type=Path, help="folder whose files requests may name (default: none)")
    add(
        "--allowed-media-domains",
        metavar="HOST",
        nargs="+",
        default=[],
        help="the only hosts that may be asked (default: all on the internet)",
    )
    add(
        "--allowed-media-networks",
        metavar="NET",
        nargs="+",
        type=flags.network,
        default=[],
        help="addresses that may be asked although they are not on the internet, such as 10.0.0.0/8 (default: none)",
    )
    add(
        "--limit-mm-per-prompt",
        "--limit-mm-data-per-request",
        metavar="JSON",
        type=flags.media_limits,
        default={},
        help='most images and videos of a request, such as \'{"image": 5, "video": 2}\' (default: 128 and 16)',
    )
    add("--max-media-bytes", metavar="N", type=flags.positive, default=256 * 2**20, help="of a download (default: %(default)s)")
    add("--max-pixels", metavar="N", type=flags.positive, default=89_478_485, help="of an image or frame (default: %(default)s)")
    add(
        "--max-video-frames", metavar="N", type=flags.positive, default=36_000, help="to decode of a video (default: %(default)s)"
    )
    add("--max-video-pictures", metavar="N", type=flags.positive, default=1024, help="to show of a video (default: %(default)s)")
    add("--max-video-seconds", metavar="S", type=flags.positive, default=60, help="to decode a video for (default: %(default)s)")


if __name__ == "__main__":
    # SIGTERM as Ctrl-C, also while loading. Here and not in main(): signals belong to the program, not to who calls a function.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

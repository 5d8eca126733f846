"""Command line of the server; see `python -m serve --help`."""

import argparse
import contextlib
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.api import Service

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
    from serve import startup  # jax, transformers and all: seconds, and none of it for --help
    from serve.api import Service
    from serve.engine import Policy
    from serve.media import MediaFetcher
    from serve.sizes import Wishes

    platform = startup.choose_platform(args.platform, args.memory_fraction)
    cache = startup.cache_folder()
    startup.keep_compilations(cache)
    source = startup.demo_checkpoint(cache) if args.model is None else args.model
    # On a CPU XLA multiplies slowly in bfloat16: 1.2 to 2.8 s a token of the full model on 2 cores, in float32 0.2 s.
    dtype = args.dtype or ("float32" if platform == "cpu" else "bfloat16")
    model = startup.load(source, args.revision, dtype, MediaFetcher(args.allowed_local_media_path))
    wishes = Wishes(args.max_running, args.max_model_len, not args.no_prefix_cache)
    policy = Policy(args.max_waiting, args.max_wait, int(args.prefix_host_gib * 2**30))
    engine = startup.make_engine(model, platform, args.memory_fraction, wishes, policy)
    name = args.served_model_name or served_name(args.model, startup.DEMO_NAME)
    return Service(model, engine, name, args.api_key)


def served_name(source: str | None, demo: str) -> str:
    """A folder's name, or the hub id, or the demo's."""
    if source is None:
        return demo
    return Path(source).resolve().name if Path(source).is_dir() else source


def _fraction(text: str) -> float:
    fraction = float(text)
    if not 0.0 < fraction < 1.0:
        raise argparse.ArgumentTypeError(f"{fraction} is not between 0 and 1")
    return fraction


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _size(text: str) -> float:
    size = float(text)
    if not 0.0 <= size < float("inf"):
        raise argparse.ArgumentTypeError(f"{size} is not 0 or more")
    return size


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0.0:
        raise argparse.ArgumentTypeError(f"{seconds} is not more than 0")
    return seconds


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not a port: 0 (any free one) to 65535")
    return port


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve",
        allow_abbrev=False,
        description="Serve MiniCPM-V 4.6 over OpenAI's chat completions API.",
        epilog="http(s) URLs in requests are fetched from wherever this machine can reach: do not serve strangers on a network "
        "that trusts it.",
    )
    parser.add_argument("--model", metavar="FOLDER_OR_ID", help="released or converted folder, or hub id (default: a small demo)")
    parser.add_argument("--revision", metavar="R", help="hub branch, tag or commit")
    platform = parser.add_mutually_exclusive_group()
    for name in ("cpu", "gpu", "tpu"):
        platform.add_argument(f"--{name}", dest="platform", action="store_const", const=name, help=f"run on the {name.upper()}")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port to serve on; 0 for any free one (default: %(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help="what clients must send as `Authorization: Bearer KEY`")
    parser.add_argument(
        "--allowed-local-media-path", metavar="DIR", type=Path, help="folder whose files requests may name (default: none)"
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the hub id, or the folder's name")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--memory-fraction", metavar="F", type=_fraction, default=0.9, help="of the device (default: 0.9)")
    engine.add_argument("--max-running", metavar="N", type=_positive, help="answers at once (default: 128; on a CPU 16)")
    engine.add_argument("--max-model-len", metavar="N", type=_positive, help="tokens of a prompt and answer (default: what fits)")
    engine.add_argument("--max-waiting", metavar="N", type=_count, default=512, help="requests that may wait (default: 512)")
    engine.add_argument("--max-wait", metavar="S", type=_seconds, help="seconds after which a waiting request gets a 429")
    engine.add_argument(
        "--prefix-host-gib",
        metavar="G",
        type=_size,
        default=8.0,
        help="host memory for beginnings of prompts that had to leave the device (default: 8)",
    )
    engine.add_argument("--no-prefix-cache", action="store_true", help="keep no beginnings of prompts for later ones")
    return parser


if __name__ == "__main__":
    # SIGTERM as Ctrl-C, also while loading. Here and not in main(): signals belong to the program, not to who calls a function.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

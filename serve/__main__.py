"""The server's command line; see `python -m serve --help`."""

import argparse
import contextlib
import signal
import socket
import sys
from pathlib import Path

from serve.cli.args import FlexibleArgumentParser, add_client_flags, add_engine_flags, add_log_flags, add_model_flags, port
from serve.cli.build_service import build_cors, build_service, check_model_args
from serve.runtime.exit_watchdog import GRACE_S, exit_after

EXIT_INTERRUPTED = 130  # a shell's status for a process that Ctrl-C ended


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM.

    Returns:
      The exit status: 0, 1 for a user's mistake (one line on stderr) or a failed engine, 130 if stopped
      before it served.
    """
    args = _parser().parse_args(argv)
    try:
        check_args(args)
        api_keys = read_api_keys(args.api_key, args.api_key_file)
        listener = bind(args.host, args.port)
        fields = {"api_keys": api_keys, "cors": build_cors(args), "allowed_hosts": tuple(args.allowed_hosts)}
        service = build_service(args, log_prompts=args.log_requests, **fields)
        listen(listener)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    from serve.runtime.server import TlsConfig, run  # imports jax: seconds, which --help and argument errors do not need

    tls = None if args.ssl_certfile is None else TlsConfig(args.ssl_certfile, args.ssl_keyfile, args.ssl_keyfile_password)
    return run(service, listener, tls, args.log_format)


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for mistakes that can be found before anything slow starts."""
    check_model_args(args)
    if "*" in (args.allowed_origins or ()) and args.allow_credentials:
        raise ValueError(
            "--allow-credentials with --allowed-origins '*' would let every page use a visitor's cookies: name the origins"
        )
    if args.ssl_certfile is None and args.ssl_keyfile is not None:
        raise ValueError("--ssl-keyfile needs an --ssl-certfile, and there is none")
    if args.ssl_certfile is not None:
        check_tls(args)


def check_tls(args: argparse.Namespace) -> None:
    """Raises ValueError if the certificate and key cannot be loaded."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            args.ssl_certfile, args.ssl_keyfile, args.ssl_keyfile_password or (lambda: "")
        )
    except OSError as error:
        files = " and ".join(filter(None, (args.ssl_certfile, args.ssl_keyfile)))
        raise ValueError(f"--ssl-certfile, --ssl-keyfile: {files} cannot be used: {error}") from None


def read_api_keys(flag_keys: list[str], file: Path | None) -> tuple[str, ...]:
    """Returns the keys of the flag and of the file's lines. Raises ValueError."""
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    file_keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if file is not None and not file_keys:
        raise ValueError(f"--api-key-file is {file}, which has no key in it")
    if not all(key.strip() for key in flag_keys):
        raise ValueError("--api-key is empty: leave it out to disable authentication")
    return (*flag_keys, *file_keys)


def bind(host: str, port: int) -> socket.socket:
    """Binds the address without accepting connections, so that a port in use fails before the model loads."""
    with contextlib.ExitStack() as cleanup:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            listener = cleanup.enter_context(socket.socket(family))
            if sys.platform != "win32":  # there this option would let two servers share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except socket.gaierror as error:
            raise ValueError(f"--host {host!r} is not an address of this machine: {error.strerror}") from None
        except (OSError, UnicodeError) as error:
            raise ValueError(f"cannot serve on host {host!r}, port {port}: {getattr(error, 'strerror', None) or error}") from None
        cleanup.pop_all()
    return listener


def listen(listener: socket.socket) -> None:
    """Accepts connections. Raises ValueError if a server that loaded at the same time took the port first."""
    try:
        listener.listen()
    except OSError as error:
        raise ValueError(f"cannot serve on port {listener.getsockname()[1]}: {error.strerror}") from None


def _parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(
        prog="python -m serve", allow_abbrev=False, description="Serve MiniCPM-V 4.6 over the APIs of OpenAI and Anthropic."
    )
    add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="port to serve on; 0 for any free one (default: %(default)s)")
    add_engine_flags(parser.add_argument_group("engine"))
    add_client_flags(parser.add_argument_group("clients"))
    add_log_flags(parser.add_argument_group("log"))
    return parser


if __name__ == "__main__":
    # SIGTERM works as Ctrl-C, also while loading. Not set in main(), because tests and programs call it too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = main()
    exit_after(GRACE_S, status)
    sys.exit(status)

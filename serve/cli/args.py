"""Command-line options that several commands share, and parsers of their values.

argparse reports a mistake in one line and exits with status 2.
"""

import argparse
import difflib
import ipaddress
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.multimodal.ip_rules import Network

MODALITIES = ("image", "video")
BACKENDS = ("reference", "hopper", "tpu")  # as in kernels_pallas.backends, whose import takes seconds
BACKEND_ALIASES = {"gpu": "hopper"}

# Flags of vLLM and SGLang for settings that have only one value here, and the reason.
UNNEEDED_FLAGS = {
    "--enable-auto-tool-choice": "tool calls need no flag here",
    "--tool-call-parser": "both formats of tool calls are recognised in the model's output",
    "--reasoning-parser": "reasoning needs no flag here",
    "--enable-prefix-caching": "prefixes are always cached; --no-prefix-cache turns that off",
    "--trust-remote-code": "a checkpoint's code is never run",
    "--tokenizer": "the tokenizer is the checkpoint's",
    "--chat-template": "the chat template is the checkpoint's",
}


class FlexibleArgumentParser(argparse.ArgumentParser):
    """A parser that accepts `--some_flag` for `--some-flag`, as vLLM does.

    Its error for an unknown flag suggests the nearest one.
    """

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Returns the parsed arguments, as argparse does."""
        arguments = [_with_dashes(arg) for arg in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            self.error(self._unknown_flag(unknown[0].partition("=")[0]))
        return parsed

    def _unknown_flag(self, flag: str) -> str:
        if flag in UNNEEDED_FLAGS:
            return f"{flag} is not a flag of this server, and not needed: {UNNEEDED_FLAGS[flag]}"
        flags = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.5)
        return f"{flag} is not a flag of this server" + (f"; did you mean {near[0]}?" if near else "")


def _with_dashes(argument: str) -> str:
    return re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), argument)


def backend(text: str) -> str:
    """Parses a kernel backend's name or alias."""
    name = BACKEND_ALIASES.get(text, text)
    if name not in BACKENDS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(BACKENDS)}")
    return name


def port(text: str) -> int:
    """Parses a port number."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is not a port: 0 (any free one) to 65535")
    return number


def media_limits(text: str) -> dict[str, int]:
    """Parses the maximum numbers of images and videos: '{"image": 5, "video": 2}', or image=5,video=2."""
    expected = f'{text!r} is not like \'{{"image": 5, "video": 2}}\' or image=5,video=2'
    try:
        pairs = json.loads(text) if text.lstrip().startswith("{") else dict(pair.split("=") for pair in text.split(","))
        limits = {modality: value if isinstance(value, int) else int(value) for modality, value in pairs.items()}
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(expected) from None
    for modality, value in limits.items():
        if modality not in MODALITIES:
            raise argparse.ArgumentTypeError(f"{modality!r} is none of {', '.join(MODALITIES)}")
        if isinstance(value, bool) or value < 0:
            raise argparse.ArgumentTypeError(f"{modality} is {value}, expected 0 or more")
    return limits


def network(text: str) -> Network:
    """Parses a network such as 10.0.0.0/8 or fd00::/8; a single address is a network of one address."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive_int(text: str) -> int:
    """Parses a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def non_negative_int(text: str) -> int:
    """Parses a whole number of 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def fraction(text: str) -> float:
    """Parses a number between 0 and 1, both excluded."""
    number = float(text)
    if not 0.0 < number < 1.0:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 1")
    return number


def non_negative_float(text: str) -> float:
    """Parses a finite number of 0 or more."""
    number = float(text)
    if not 0.0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{number} is not 0 or more")
    return number


def positive_float(text: str) -> float:
    """Parses a number above 0."""
    number = float(text)
    if not number > 0.0:
        raise argparse.ArgumentTypeError(f"{number} is not more than 0")
    return number


def json_list(text: str) -> list[str]:
    """Parses a JSON list of strings, as vLLM takes it: '["https://a.example"]'. Other text is one string."""
    try:
        items = json.loads(text) if text.lstrip().startswith("[") else [text]
    except ValueError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list of strings")
    return items


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the model, its device, and the media that requests may contain."""
    parser.add_argument(
        "--model",
        "--model-path",
        metavar="FOLDER_OR_ID",
        help="released or converted folder, or hub id (default: this package's small demo model)",
    )
    parser.add_argument("--revision", metavar="R", help="hub branch, tag or commit")
    parser.add_argument(
        "--skip-checksums",
        action="store_true",
        help="load a converted folder without comparing it with its checksums (a released folder has none)",
    )
    platform = parser.add_mutually_exclusive_group()
    for name in ("cpu", "gpu", "tpu"):
        platform.add_argument(f"--{name}", dest="platform", action="store_const", const=name, help=f"run on the {name.upper()}")
    parser.add_argument(
        "--backend",
        metavar="{" + ",".join(BACKENDS) + "}",
        type=backend,
        help="kernels: the reference on any device, or those for one family of chips (default: the fastest that serves)",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        nargs="+",
        help="model names in requests; the first is also in responses (default: the hub id, or the folder's name)",
    )
    parser.add_argument(
        "--restore-newlines",
        action="store_true",
        help=r"turn a written \n in answers into a line break; requests can override it",
    )
    _add_media_flags(parser.add_argument_group("images and videos in requests"))


def add_engine_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags for the engine's memory, batch size and queue."""
    add = group.add_argument
    add("--memory-fraction", metavar="F", type=fraction, default=0.9, help="share of device memory to use (default: %(default)s)")
    add("--max-running", metavar="N", type=positive_int, help="requests in a batch (default: 128; on a CPU 16)")
    add("--max-model-len", metavar="N", type=positive_int, help="tokens of a prompt and its answer (default: all that fit)")
    add("--max-waiting", metavar="N", type=non_negative_int, default=512, help="requests in the queue (default: %(default)s)")
    add("--max-wait", metavar="S", type=positive_float, help="seconds in the queue after which a request gets a 429")
    add(
        "--prefix-host-gib",
        metavar="G",
        type=non_negative_float,
        default=8.0,
        help="host memory for long cached prefixes that were evicted from the device (default: %(default)s)",
    )
    add("--no-prefix-cache", action="store_true", help="do not cache prefixes of prompts")


def add_client_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags for API keys, cross-origin requests and TLS."""
    add = group.add_argument
    add(
        "--api-key",
        metavar="KEY",
        nargs="+",
        default=[],
        help="accepted API keys (`Authorization: Bearer KEY`); none disables authentication",
    )
    add("--api-key-file", metavar="FILE", type=Path, help="more keys, one a line; lines that begin with # are comments")
    add(
        "--allowed-hosts",
        metavar="NAME",
        nargs="+",
        default=[],
        help="host names that requests may be sent to, such as localhost 127.0.0.1 *.example.com (default: all)",
    )
    add(
        "--allowed-origins",
        metavar="JSON",
        type=json_list,
        help="origins of web pages that may send requests, such as '[\"https://a.example\"]'",
    )
    add("--allowed-methods", metavar="JSON", type=json_list, default=["*"], help="HTTP methods for those pages (default: all)")
    add("--allowed-headers", metavar="JSON", type=json_list, default=["*"], help="HTTP headers for those pages (default: all)")
    add("--allow-credentials", action="store_true", help="let those pages send cookies")
    add("--ssl-certfile", metavar="FILE", help="serve https with this certificate")
    add("--ssl-keyfile", metavar="FILE", help="the certificate's key, if it is not in the same file")
    add("--ssl-keyfile-password", metavar="TEXT", help="the key's password, if it has one")


def add_log_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags for the log's format and content."""
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="default: %(default)s")
    group.add_argument(
        "--log-requests",
        "--enable-log-requests",
        action="store_true",
        help="log the text of prompts (default: only their length)",
    )


def _add_media_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--allowed-local-media-path", metavar="DIR", type=Path, help="folder whose files requests may name (default: none)")
    add(
        "--allowed-media-domains",
        metavar="HOST",
        nargs="+",
        default=[],
        help="the only hosts that media are fetched from (default: all on the internet)",
    )
    add(
        "--allowed-media-networks",
        metavar="NET",
        nargs="+",
        type=network,
        default=[],
        help="networks outside the internet that media are fetched from, such as 10.0.0.0/8 (default: none)",
    )
    add(
        "--limit-mm-per-prompt",
        "--limit-mm-data-per-request",
        metavar="JSON",
        type=media_limits,
        default={},
        help='maximum images and videos per request, such as \'{"image": 5, "video": 2}\' (default: 128 and 16)',
    )
    add("--max-media-bytes", metavar="N", type=positive_int, default=256 * 2**20, help="per download (default: %(default)s)")
    add("--max-pixels", metavar="N", type=positive_int, default=89_478_485, help="per image or frame (default: %(default)s)")
    add(
        "--picture-processes",
        metavar="N",
        type=non_negative_int,
        help="image worker processes, 0 for the server's own threads, unbounded (default: half the cores, at most 8)",
    )
    add(
        "--max-image-seconds",
        metavar="S",
        type=positive_float,
        default=20.0,
        help="processor time to decode an image (default: %(default)s)",
    )
    add(
        "--request-memory-gib",
        metavar="G",
        type=positive_float,
        default=8.0,
        help="host memory for bodies, downloads and decoded images of all requests (default: %(default)s)",
    )
    add("--max-video-frames", metavar="N", type=positive_int, default=36_000, help="decoded per video (default: %(default)s)")
    add(
        "--max-video-pictures",
        metavar="N",
        type=positive_int,
        default=1024,
        help="images per video in the prompt (default: %(default)s)",
    )
    add("--max-video-seconds", metavar="S", type=positive_int, default=60, help="decoding time per video (default: %(default)s)")

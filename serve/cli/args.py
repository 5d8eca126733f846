"""What the command line's words mean. Mistakes are argparse's to report: one line, status 2."""

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

MEDIA = ("image", "video")

# Flags of vLLM's and SGLang's that ask for what is always so here, or never.
FOREIGN = {
    "--enable-auto-tool-choice": "tool calls need no flag here",
    "--tool-call-parser": "both formats of tool calls are told apart by what the model writes",
    "--reasoning-parser": "reasoning needs no flag here",
    "--trust-remote-code": "no code of a checkpoint is ever run",
    "--tokenizer": "the tokenizer is the checkpoint's",
    "--chat-template": "the chat template is the checkpoint's",
}


class Parser(argparse.ArgumentParser):
    """Takes `--some_flag` for `--some-flag`, as vLLM does, and names the nearest flag to one it does not know."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's."""
        known, unknown = self.parse_known_args([_dashed(arg) for arg in (sys.argv[1:] if args is None else args)], namespace)
        if unknown:
            self.error(self._unknown(unknown[0].partition("=")[0]))
        return known

    def _unknown(self, flag: str) -> str:
        if flag in FOREIGN:
            return f"{flag} is no flag of this server, and not needed: {FOREIGN[flag]}"
        flags = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.5)
        return f"{flag} is no flag of this server" + (f"; did you mean {near[0]}?" if near else "")


def _dashed(argument: str) -> str:
    return re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), argument)


def port(text: str) -> int:
    """A port's number."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is not a port: 0 (any free one) to 65535")
    return number


def media_limits(text: str) -> dict[str, int]:
    """How many images and videos: '{"image": 5, "video": 2}', or image=5,video=2."""
    wanted = f'{text!r} is not like \'{{"image": 5, "video": 2}}\' or image=5,video=2'
    try:
        pairs = json.loads(text) if text.lstrip().startswith("{") else dict(pair.split("=") for pair in text.split(","))
        limits = {kind: value if isinstance(value, int) else int(value) for kind, value in pairs.items()}
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(wanted) from None
    for kind, value in limits.items():
        if kind not in MEDIA:
            raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(MEDIA)}")
        if isinstance(value, bool) or value < 0:
            raise argparse.ArgumentTypeError(f"{kind} is {value}, expected 0 or more")
    return limits


def network(text: str) -> Network:
    """Such as 10.0.0.0/8 or fd00::/8; an address alone is a network of one."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def count(text: str) -> int:
    """A whole number, 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def fraction(text: str) -> float:
    """Between 0 and 1, and neither."""
    number = float(text)
    if not 0.0 < number < 1.0:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 1")
    return number


def size(text: str) -> float:
    """0 or more, and not infinite."""
    number = float(text)
    if not 0.0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{number} is not 0 or more")
    return number


def seconds(text: str) -> float:
    """More than 0."""
    number = float(text)
    if not number > 0.0:
        raise argparse.ArgumentTypeError(f"{number} is not more than 0")
    return number


def json_list(text: str) -> list[str]:
    """Texts, as vLLM takes them: '["https://a.example"]'. One text alone is a list of one."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [text]
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(item, str) and item for item in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list of texts")
    return found


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What runs, and on what; what requests may name."""
    parser.add_argument(
        "--model",
        "--model-path",
        metavar="FOLDER_OR_ID",
        help="released or converted folder, or hub id (default: the small model that comes along)",
    )
    parser.add_argument("--revision", metavar="R", help="hub branch, tag or commit")
    platform = parser.add_mutually_exclusive_group()
    for name in ("cpu", "gpu", "tpu"):
        platform.add_argument(f"--{name}", dest="platform", action="store_const", const=name, help=f"run on the {name.upper()}")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument(
        "--served-model-name", metavar="NAME", nargs="+", help="one or more (default: the hub id, or the folder's name)"
    )
    parser.add_argument(
        "--restore-newlines", action="store_true", help=r"read a written \n as a line break where a request does not say"
    )
    _add_media_flags(parser.add_argument_group("pictures and videos in requests"))


def add_engine_flags(group: argparse._ArgumentGroup) -> None:
    """How much at once."""
    add = group.add_argument
    add("--memory-fraction", metavar="F", type=fraction, default=0.9, help="of the device (default: %(default)s)")
    add("--max-running", metavar="N", type=positive, help="answers at once (default: 128; on a CPU 16)")
    add("--max-model-len", metavar="N", type=positive, help="tokens of a prompt and answer (default: what fits)")
    add("--max-waiting", metavar="N", type=count, default=512, help="requests that may wait (default: %(default)s)")
    add("--max-wait", metavar="S", type=seconds, help="seconds after which a waiting request gets a 429")
    add(
        "--prefix-host-gib",
        metavar="G",
        type=size,
        default=8.0,
        help="host memory for long beginnings of prompts that had to leave the device (default: %(default)s)",
    )
    add("--no-prefix-cache", action="store_true", help="keep no beginnings of prompts for later ones")


def add_client_flags(group: argparse._ArgumentGroup) -> None:
    """Who may ask, and over what connection."""
    add = group.add_argument
    add("--api-key", metavar="KEY", nargs="+", default=[], help="of which clients must send one, as `Authorization: Bearer KEY`")
    add("--api-key-file", metavar="FILE", type=Path, help="more keys, one a line; lines that begin with # are notes")
    add(
        "--allowed-origins",
        metavar="JSON",
        type=json_list,
        help="web pages that may ask, such as '[\"https://a.example\"]'",
    )
    add("--allowed-methods", metavar="JSON", type=json_list, default=["*"], help="that they may use (default: all)")
    add("--allowed-headers", metavar="JSON", type=json_list, default=["*"], help="that they may send (default: all)")
    add("--allow-credentials", action="store_true", help="let them send cookies")
    add("--ssl-certfile", metavar="FILE", help="serve https with this certificate")
    add("--ssl-keyfile", metavar="FILE", help="the certificate's key, if it is not in the same file")
    add("--ssl-keyfile-password", metavar="TEXT", help="the key's password, if it has one")


def add_log_flags(group: argparse._ArgumentGroup) -> None:
    """What is written of requests."""
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="default: %(default)s")
    group.add_argument(
        "--log-requests",
        "--enable-log-requests",
        action="store_true",
        help="log the text of prompts (default: how long they are)",
    )


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
        type=network,
        default=[],
        help="addresses that may be asked although they are not on the internet, such as 10.0.0.0/8 (default: none)",
    )
    add(
        "--limit-mm-per-prompt",
        "--limit-mm-data-per-request",
        metavar="JSON",
        type=media_limits,
        default={},
        help='most images and videos of a request, such as \'{"image": 5, "video": 2}\' (default: 128 and 16)',
    )
    add("--max-media-bytes", metavar="N", type=positive, default=256 * 2**20, help="of a download (default: %(default)s)")
    add("--max-pixels", metavar="N", type=positive, default=89_478_485, help="of an image or frame (default: %(default)s)")
    add(
        "--picture-processes",
        metavar="N",
        type=count,
        help="that open and resize pictures, 0 for the server's own threads (default: half the cores, at most 8; on a CPU 0)",
    )
    add("--max-video-frames", metavar="N", type=positive, default=36_000, help="to decode of a video (default: %(default)s)")
    add("--max-video-pictures", metavar="N", type=positive, default=1024, help="to show of a video (default: %(default)s)")
    add("--max-video-seconds", metavar="S", type=positive, default=60, help="to decode a video for (default: %(default)s)")

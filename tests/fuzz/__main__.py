"""The fuzzers' command line: `python -m tests.fuzz {http,media,schemas} --url URL`."""

import argparse
import random
import sys
from pathlib import Path

from tests.fuzz import http, media, schemas
from tests.fuzz.run import CONCURRENCY, PATIENCE_S, Fuzzer

MAKERS = {"http": http.make, "media": media.make, "schemas": schemas.make}


def main() -> int:
    """Sends the cases, and returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz a running server.")
    parser.add_argument("name", choices=tuple(MAKERS))
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--number", type=int, default=1000, help="cases to send (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="index of the first case (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="default: a new one")
    parser.add_argument("--pid", type=int, help="the server's process, whose memory, threads and descriptors are compared")
    parser.add_argument("--folder", type=Path, default=Path("fuzz-findings"), help="for requests (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, metavar="S", help="for an answer (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    print("seed", args.seed, flush=True)
    fuzzer = Fuzzer(args.name, MAKERS[args.name], args.url, args.seed, args.pid, args.folder, args.patience, args.concurrency)
    return 1 if fuzzer.run(args.number, first=args.first).findings else 0


if __name__ == "__main__":
    sys.exit(main())

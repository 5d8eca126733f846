"""Command line of training; see `python -m minicpmv46_jax.train --help`."""

import argparse
import logging
import sys
from pathlib import Path

import jax

from minicpmv46_jax.train.run import train
from minicpmv46_jax.train.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    The status is 0, or 1 for a user's mistake or a loss that is not finite; one line on stderr then gives the
    reason.
    """
    parser = argparse.ArgumentParser(prog="python -m minicpmv46_jax.train", description="Fine-tune MiniCPM-V 4.6.")
    parser.add_argument("--config", metavar="TOML", type=Path, required=True, help="the run's settings; see README")
    hosts = parser.add_argument_group("several hosts, the same command on each")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first host, with a port that is free there")
    hosts.add_argument("--hosts", metavar="N", type=int, default=1, help="number of hosts (default: %(default)s)")
    hosts.add_argument("--host", metavar="I", type=int, default=0, help="this host's number, from 0 (default: %(default)s)")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax and grain log a line for every file
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.hosts, args.host)
    try:
        train(Settings.from_toml(args.config))
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

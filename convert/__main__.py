"""Command line of the converter: `python -m convert --help`."""

import argparse
import logging
import sys
from pathlib import Path

from convert import convert, export_converted, export_run, write_demo_checkpoint
from convert.convert import default_out

INTERRUPTED = 130  # a shell's status for a process that Ctrl-C ended


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    It is 0, 1 for a user's mistake (one line on stderr), or 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        print(_run(args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(args: argparse.Namespace) -> str:
    _reject_unused_options(args)
    if args.hf:
        out = args.out or default_out(args.hf, args.dtype)
        return f"wrote {convert(args.hf, out, args.dtype, args.revision, progress=True)}"
    if args.export_hf:
        if args.model is None:
            raise ValueError("--export-hf needs --model, a converted folder or a training run's")
        export = export_run if (args.model / "settings.json").is_file() else export_converted
        return f"wrote {export(args.model, args.export_hf)}"
    return f"wrote {write_demo_checkpoint(args.demo)}"


def _reject_unused_options(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that the chosen command would ignore."""
    allowed = {"hf": {"out", "dtype", "revision"}, "export_hf": {"model"}, "demo": set()}
    command = next(name for name in allowed if getattr(args, name))
    for name in ("out", "dtype", "revision", "model"):
        if getattr(args, name) is not None and name not in allowed[command]:
            raise ValueError(f"--{name} does not go with --{command.replace('_', '-')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m convert", description="Convert MiniCPM-V 4.6 checkpoints.")
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--hf", metavar="ID_OR_DIR", help="released checkpoint to convert: a hub id or a folder")
    command.add_argument("--export-hf", metavar="DIR", type=Path, help="write --model in the released format")
    command.add_argument("--demo", metavar="DIR", type=Path, help="write a small checkpoint with random weights, released format")
    parser.add_argument("--out", metavar="DIR", type=Path, help="converted folder to make (default: derived from the name)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="cast every tensor (default: keep each tensor's own)")
    parser.add_argument("--revision", metavar="R", help="hub branch, tag or commit")
    parser.add_argument("--model", metavar="CONVERTED", type=Path, help="converted folder, or a training run's, to export")
    return parser


def _silence_orbax() -> None:
    """Silences Orbax's reports of a failed write: 30 tracebacks of an error that is raised anyway.

    They come from absl's log, from asyncio's log (other failed writes of the same call), and from writes that
    end after the failed one and find their event loop closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    print_unraisable = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            print_unraisable(unraisable)

    sys.unraisablehook = hook


if __name__ == "__main__":
    _silence_orbax()
    sys.exit(main())

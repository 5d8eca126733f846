"""What XLA's autotuner has found on a GPU: kept from one start to the next, and brought along for devices that were measured.

XLA tries several ways to compute each product of a program, which was a third of a first start's compiling. What it finds
outlasts a change of this project's code, unlike the programs themselves: it depends on the device, XLA and the product alone.
`python -m serve.autotuned`, on a machine where a server has started, puts what that start found into `xla_autotune_cache.json`.
"""

import base64
import importlib.metadata
import json
import logging
import os
from pathlib import Path

import jax

from serve.runtime.cache_dir import cache_folder

log = logging.getLogger("serve")

FOLDER = "autotuned"  # in the cache
FILE = Path(__file__).with_name("xla_autotune_cache.json")
OPTION, MODE = "xla_gpu_per_fusion_autotune_cache_dir", "xla_gpu_experimental_autotune_cache_mode"


def compiler_options(folder: Path, brought: Path = FILE) -> dict[str, str]:
    """XLA's options for keeping results in `folder`, into which those brought along for the present device are written.

    A folder that cannot be written to is read, with a warning; one that is not there is done without.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in json.loads(brought.read_text()).get(_here(), {}).items():
            path = folder / name
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(base64.b64decode(content))
    except OSError as error:
        log.warning("what XLA's autotuner finds is not kept: %s", error)
        if not folder.is_dir():
            return {}
    writable = os.access(folder, os.W_OK)  # XLA would fail
    return {OPTION: str(folder)} if writable else {OPTION: str(folder), MODE: "AUTOTUNE_CACHE_MODE_READ"}


def collect(folder: Path, brought: Path = FILE) -> int:
    """Puts the results in `folder` into the file, in place of those of the present device and XLA; returns how many."""
    found = {
        str(path.relative_to(folder)): base64.b64encode(path.read_bytes()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    table = json.loads(brought.read_text()) | {_here(): found}
    brought.write_text(json.dumps(table, indent=0, sort_keys=True) + "\n")
    return len(found)


def _here() -> str:
    return f"{jax.devices()[0].device_kind}, jaxlib {importlib.metadata.version('jaxlib')}"


def main() -> None:
    """Collects what the servers of this machine have found."""
    folder = cache_folder() / FOLDER
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there: start a server on a GPU first")
    print(f"{FILE}: {collect(folder, FILE)} results for {_here()}")

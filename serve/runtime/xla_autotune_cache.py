"""Results of XLA's autotuner on GPUs: kept between starts, and bundled for devices that were measured.

XLA times several ways to compute each matrix product, which was a third of a first start's compilation. The
results depend only on the device, XLA and the product, so they stay valid when this project's code changes,
unlike compiled programs. `python -m serve.autotuned` copies the results of this machine's servers into
`xla_autotune_cache.json`.
"""

import base64
import importlib.metadata
import json
import logging
import os
from pathlib import Path

import jax

from serve.runtime.cache_dir import UntrustedCache, cache_folder, check_owner, make_private

log = logging.getLogger("serve")

FOLDER = "autotuned"  # within the cache folder
BUNDLED_FILE = Path(__file__).with_name("xla_autotune_cache.json")
CACHE_DIR_OPTION, CACHE_MODE_OPTION = "xla_gpu_per_fusion_autotune_cache_dir", "xla_gpu_experimental_autotune_cache_mode"


def compiler_options(folder: Path, bundled: Path = BUNDLED_FILE) -> dict[str, str]:
    """Writes the bundled results for this device into `folder`, and returns XLA's options for using it.

    An unwritable folder is used read-only. A folder that cannot be created, or that another user may have
    written, is not used. Each logs a warning.
    """
    try:
        check_owner(folder)
        make_private(folder)
        for name, content in json.loads(bundled.read_text()).get(_device_key(), {}).items():
            path = folder / name
            if not path.exists():
                path.parent.mkdir(mode=0o700, exist_ok=True)
                path.touch(mode=0o600)
                path.write_bytes(base64.b64decode(content))
    except UntrustedCache as error:
        log.warning("XLA's autotuning results are not used: %s", error)
        return {}
    except OSError as error:
        log.warning("XLA's autotuning results are not kept: %s", error)
        if not folder.is_dir():
            return {}
    writable = os.access(folder, os.W_OK)  # in its default mode XLA fails on a read-only folder
    options = {CACHE_DIR_OPTION: str(folder)}
    return options if writable else options | {CACHE_MODE_OPTION: "AUTOTUNE_CACHE_MODE_READ"}


def collect_results(folder: Path, bundled: Path = BUNDLED_FILE) -> int:
    """Replaces the bundled results of this device and XLA by those in `folder`, and returns their number."""
    results = {
        str(path.relative_to(folder)): base64.b64encode(path.read_bytes()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    table = json.loads(bundled.read_text()) | {_device_key(): results}
    bundled.write_text(json.dumps(table, indent=0, sort_keys=True) + "\n")
    return len(results)


def _device_key() -> str:
    return f"{jax.devices()[0].device_kind}, jaxlib {importlib.metadata.version('jaxlib')}"


def main() -> None:
    """Copies the results that this machine's servers found into the bundled file."""
    folder = cache_folder() / FOLDER
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there: start a server on a GPU first")
    print(f"{BUNDLED_FILE}: {collect_results(folder, BUNDLED_FILE)} results for {_device_key()}")

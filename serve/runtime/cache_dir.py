"""The folder in which compiled programs and autotuning results outlast a process."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Returns this project's folder among the user's caches, and creates it if it is missing."""
    folder = _user_caches() / "minicpmv46-jax"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _user_caches() -> Path:
    """Returns $XDG_CACHE_HOME if it is absolute, as its specification demands, else the platform's folder."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path.home() / ".cache"

"""The folder in which compiled programs and autotuning results outlast a process.

Programs are code: a server runs them when it starts. So a file is used only if no other user can have written
it. New folders have mode 0700.
"""

import os
import stat
import sys
from pathlib import Path


class UntrustedCache(Exception):
    """Another user may have written a file or folder of the cache; the message has the remedy."""


def cache_folder() -> Path:
    """Returns this project's folder among the user's caches, and creates it if it is missing."""
    folder = _user_caches() / "minicpmv46-jax"
    make_private(folder)
    return folder


def make_private(folder: Path) -> None:
    """Creates a folder and its missing parents, all with mode 0700."""
    for path in reversed((folder, *folder.parents)):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)


def check_owner(folder: Path) -> None:
    """Checks a folder in the cache, its parent and everything in it. Does nothing on Windows.

    A parent of mode 0700 keeps other users out of everything below it, so only owners count then. Root may
    own files, because root can write everything.

    Args:
      folder: a folder in `cache_folder()`; it may be missing.

    Raises:
      UntrustedCache: one of them belongs to another user, or another user may write to it.
    """
    if sys.platform == "win32":
        return
    private = False
    for path in (folder.parent, folder, *sorted(folder.rglob("*"))):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        private = private or (path == folder.parent and not status.st_mode & 0o077)
        if status.st_uid not in (0, os.geteuid()):
            reason = f"belongs to user {status.st_uid}, and this process is user {os.geteuid()}'s"
        elif status.st_mode & 0o022 and not private:
            reason = f"has mode {stat.S_IMODE(status.st_mode):04o}, so other users may write to it"
        else:
            continue
        raise UntrustedCache(f"{path} {reason}: remove {folder}, and the next start makes it anew")


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

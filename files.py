"""Writing files so that nobody ever sees half of one, and hashing them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import TrailmedError

_CHUNK = 1 << 20
PARTIAL_SUFFIX = ".partial"


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path`; on success fsync it and rename it to `path`.

    The scratch name is fixed (`.NAME.partial`), so a run that was killed leaves at most one orphan per output and
    the next attempt overwrites it. On any exception the scratch file is removed and `path` is left as it was.

    Raises `TrailmedError` when the disk is full, or the folder is missing or not writable.
    """
    scratch = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.unlink(missing_ok=True)
        yield scratch
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def explain_os_error(error: OSError, path: Path) -> TrailmedError:
    """Turn an operating system's refusal to write `path` into one line that says what to do."""
    if error.errno == errno.ENOSPC:
        return TrailmedError(f"{path}: the disk is full; free some space or choose another folder, then run again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return TrailmedError(f"{path}: not writable ({error.strerror}); choose another folder")
    return TrailmedError(f"{path}: cannot write ({error.strerror or error}); choose another folder")


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with write_atomically(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json_atomically(path: Path, value: Any) -> None:
    """Write `value` as indented, key-sorted JSON to `path`, whole or not at all: the same value, the same bytes."""
    write_text_atomically(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON from `path`; raises `TrailmedError` when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TrailmedError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrailmedError(f"{path}: not valid JSON ({error}); make it anew") from error
    except OSError as error:
        raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error


def sha256_of_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file, read in 1 MiB pieces; `progress` is called with the bytes of each piece."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while piece := source.read(_CHUNK):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex sha256 of `value`'s canonical JSON (sorted keys, no spaces)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def lock_folder(folder: Path, name: str, *, wait: bool = False) -> FileLock:
    """Make `folder` if need be and take its lock, the file `name` in it; the caller releases it.

    Raises `TrailmedError` when another process holds the lock (with `wait`, waits for it instead), or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise TrailmedError(f"{folder}: another trailmed process works in it; wait for it, or choose another folder") from error
    except OSError as error:
        raise explain_os_error(error, folder) from error
    return lock


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

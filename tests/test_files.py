"""Writing files whole or not at all, whatever goes wrong; JSON and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_disk import small_disk

from trailmed import files
from trailmed.errors import TrailmedError
from trailmed.files import (
    explain_os_error,
    read_json,
    sha256_of_file,
    sha256_of_json,
    write_atomically,
    write_json_atomically,
    write_text_atomically,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12,
)


def _everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 64 KiB."""
    with small_disk(tmp_path / "disk", 64) as folder:
        yield folder


# --- write_atomically


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_written_file_appears_whole_and_alone(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "deep" / "er" / "out.bin"
    if before is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(before)
    with write_atomically(path) as scratch:
        assert scratch.parent == path.parent
        assert scratch.name.startswith(".")
        assert scratch.name.endswith(files.PARTIAL_SUFFIX)
        scratch.write_bytes(b"new")
        assert (path.read_bytes() if path.exists() else None) == before
    assert _everything_in(path.parent) == {"out.bin": b"new"}


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), TrailmedError("bad input"), SystemExit(1), MemoryError()])
def test_an_exception_leaves_the_old_file_and_no_scratch(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with write_atomically(path) as scratch:
            scratch.write_bytes(b"half of the n")
            raise error

    with pytest.raises(type(error)) as caught:
        write_half()
    assert caught.value is error
    assert _everything_in(tmp_path) == {"out.bin": b"old"}


def test_an_orphan_of_a_killed_run_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    (tmp_path / f".out.bin{files.PARTIAL_SUFFIX}").write_bytes(b"a long orphan")
    with write_atomically(path) as scratch:
        assert not scratch.exists()
        scratch.write_bytes(b"new")
    assert _everything_in(tmp_path) == {"out.bin": b"new"}


def test_nothing_written_is_an_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(TrailmedError, match=r"out\.bin: cannot write"), write_atomically(tmp_path / "out.bin"):
        pass
    assert _everything_in(tmp_path) == {}


def test_a_full_disk_is_said_in_one_line_and_leaves_the_old_file(disk: Path) -> None:
    path = disk / "out.txt"
    write_text_atomically(path, "old")
    with pytest.raises(TrailmedError, match=rf"^{path}: the disk is full; free some space") as caught:
        write_text_atomically(path, "x" * 200_000)
    assert "\n" not in str(caught.value)
    assert _everything_in(disk) == {"out.txt": b"old"}
    write_text_atomically(path, "x" * 20_000)
    assert path.stat().st_size == 20_000


def test_a_disk_that_is_full_only_at_fsync_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delayed allocation (network disks, quotas) says so no earlier."""
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TrailmedError, match="the disk is full"):
        write_text_atomically(tmp_path / "out.txt", "new")
    assert _everything_in(tmp_path) == {}


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrailmedError, match=r"out\.txt: cannot write \(.*\); choose another folder"):
        write_text_atomically(tmp_path / "file" / "out.txt", "new")
    (tmp_path / "taken").mkdir()
    with pytest.raises(TrailmedError, match=r"taken: cannot write \(.*\); choose another folder"):
        write_text_atomically(tmp_path / "taken", "new")
    assert _everything_in(tmp_path) == {"file": b"in the way", "taken": None}


def test_a_read_only_folder_is_said_in_one_line(disk: Path) -> None:
    """Root ignores permission bits, but not a disk mounted read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(TrailmedError, match=r"out\.txt: not writable \(Read-only file system\); choose another folder"):
        write_text_atomically(disk / "out.txt", "new")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root ignores permission bits")
def test_a_folder_without_permission_is_said_in_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(TrailmedError, match=r"out\.txt: not writable \(Permission denied\); choose another folder"):
            write_text_atomically(tmp_path / "out.txt", "new")
    finally:
        tmp_path.chmod(0o700)
    assert _everything_in(tmp_path) == {}


@pytest.mark.parametrize(("number", "words"), [
    (errno.ENOSPC, "the disk is full"), (errno.EACCES, "not writable"), (errno.EPERM, "not writable"), (errno.EROFS, "not writable"),
    (errno.EIO, "cannot write"), (errno.ENAMETOOLONG, "cannot write"),
])
def test_what_the_system_refuses_is_put_in_words(number: int, words: str) -> None:
    line = str(explain_os_error(OSError(number, os.strerror(number)), Path("some/file")))
    assert line.startswith(f"some/file: {words}")
    assert "\n" not in line


# --- JSON and hashes


@given(JSON)
def test_json_comes_back_and_has_the_same_bytes_every_time(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json_atomically(path, value)
    first = path.read_bytes()
    assert read_json(path) == value
    write_json_atomically(path, json.loads(first))
    assert path.read_bytes() == first


def test_json_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    write_json_atomically(tmp_path / "a.json", {"b": 1, "a": "ä"})
    write_json_atomically(tmp_path / "b.json", {"a": "ä", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sha256_of_json({"b": 1, "a": "ä"}) == sha256_of_json({"a": "ä", "b": 1}) != sha256_of_json({"a": "b", "ä": 1})
    assert sha256_of_json({"a": "ä"}) == hashlib.sha256('{"a":"ä"}'.encode()).hexdigest()


def test_unreadable_json_is_named_in_one_line(tmp_path: Path) -> None:
    for name, content, message in (
        ("none.json", None, "no such file"), ("cut.json", b'{"a": ', "not valid JSON"), ("latin.json", b'"\xe9"', "not valid JSON"),
        ("deep.json", b"[" * 200_000, "not valid JSON"), ("", None, "cannot be read"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TrailmedError, match=f"^{path}: {message}") as caught:
            read_json(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 3])
def test_a_files_hash_is_that_of_its_bytes_and_progress_counts_them_all(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    seen: list[int] = []
    assert sha256_of_file(tmp_path / "file", seen.append) == hashlib.sha256(content[:size]).hexdigest()
    assert sum(seen) == size
    assert all(0 < piece <= 1 << 20 for piece in seen)

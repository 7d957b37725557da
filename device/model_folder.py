"""What a folder with a model says beside its weights: the chat template, under the names that Hugging Face and its followers use.

ONNX Runtime GenAI's folders carry the same files. All of them are a stranger's: sizes are checked before anything is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TrailmedError
from ..models.chat_template import ChatTemplate
from ..models.source import json_object

__all__ = ["chat_template_of", "folder_name", "json_object", "sha256_of_files"]

_LARGEST_TEMPLATE = 4 << 20
_CHUNK = 1 << 20
_DEFAULT_TEMPLATE = "default"


def chat_template_of(folder: Path) -> ChatTemplate:
    """The chat template of the model in `folder`, with its BOS and EOS tokens' spellings; without one only a prompt raises.

    Looked for where transformers looks, in its order: `chat_template.jinja`, `chat_template.json` (of processors), and
    `tokenizer_config.json`, where it is a text or a list of named ones, of which "default" counts.
    Raises `TrailmedError` for a file that is too large, no UTF-8 or no JSON.
    """
    tokenizer = {**json_object(folder / "special_tokens_map.json"), **json_object(folder / "tokenizer_config.json")}
    source = _text_of(folder / "chat_template.jinja")
    for entry in (json_object(folder / "chat_template.json").get("chat_template"), tokenizer.get("chat_template")):
        source = _template_in(entry) if source is None else source
    return ChatTemplate(
        source, origin=str(folder), bos_token=_spelling(tokenizer.get("bos_token")), eos_token=_spelling(tokenizer.get("eos_token")),
    )


def sha256_of_files(files: Sequence[Path]) -> str:
    """Hex sha256 of the files' bytes one after the other, as `cat FILES | sha256sum` gives it: for one file simply that file's hash.

    Raises `TrailmedError` when one cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as source:
                while piece := source.read(_CHUNK):
                    digest.update(piece)
        except OSError as error:
            raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def folder_name(folder: Path) -> str:
    """The folder's own name, also when it is named `.` or through a link."""
    return folder.resolve().name or str(folder)


def _text_of(path: Path) -> str | None:
    """The text of `path`, None when there is no such file."""
    if not path.is_file():
        return None
    if path.stat().st_size > _LARGEST_TEMPLATE:
        raise TrailmedError(f"{path}: too large for a chat template ({path.stat().st_size} bytes); download the model again")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TrailmedError(f"{path}: not UTF-8 at byte {error.start}; download the model again") from error
    except OSError as error:
        raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error


def _template_in(entry: Any) -> str | None:
    if isinstance(entry, list):
        entry = next(
            (item.get("template") for item in entry if isinstance(item, Mapping) and item.get("name") == _DEFAULT_TEMPLATE), None,
        )
    return entry if isinstance(entry, str) else None


def _spelling(token: Any) -> str:
    """A special token is written as its text, or as an object that holds it; "" when there is none."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""

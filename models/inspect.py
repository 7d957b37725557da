"""What a GGUF is, at a glance: the facts that `trailmed models show` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..files import sha256_of_file
from .architecture import ARCHITECTURES
from .catalogue import CATALOGUE
from .gguf_file import GgufFile


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """The facts of one GGUF. None means the file does not say."""

    path: Path
    name: str | None
    architecture: str | None
    supported: bool
    """Whether trailmed can edit this architecture (any GGUF can be evaluated)."""
    parameters: int
    size: int
    """Bytes of the whole file."""
    quantization: Mapping[str, int]
    """Parameters stored in each ggml type, the largest share first."""
    layers: int | None
    hidden_size: int | None
    context_length: int | None
    """Tokens."""
    has_chat_template: bool
    licence: str | None
    sha256: str

    @property
    def bits_per_weight(self) -> float:
        """File bits per parameter, tokenizer and metadata included; 0 for a file without tensors."""
        return 8 * self.size / self.parameters if self.parameters else 0.0

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each fact, in the order in which to print them."""
        mix = ", ".join(f"{kind} {share / self.parameters:.1%}" for kind, share in self.quantization.items())
        return [
            ("file", str(self.path)),
            ("name", self.name or "not given"),
            ("architecture", (self.architecture or "not given") + ("" if self.supported else " (can be evaluated, not edited)")),
            ("parameters", f"{self.parameters:,}"),
            ("layers", _or_not_given(self.layers)),
            ("hidden size", _or_not_given(self.hidden_size)),
            ("context", _or_not_given(self.context_length, " tokens")),
            ("quantization", mix or "no tensors"),
            ("size", f"{self.size:,} bytes ({self.bits_per_weight:.2f} bits per weight)"),
            ("chat template", "yes" if self.has_chat_template else "no"),
            ("licence", self.licence or "not given"),
            ("sha256", self.sha256),
        ]


def summarise_model(path: Path) -> ModelSummary:
    """Read the GGUF at `path`, hashing it once. Raises `TrailmedError` when it is missing or broken; any architecture will do."""
    with GgufFile.open(path) as file:
        shares: Counter[str] = Counter()
        for tensor in file.tensors.values():
            shares[tensor.type.name] += prod(tensor.shape)
        metadata = file.metadata
    sha256 = sha256_of_file(path)
    architecture = _text(metadata, "general.architecture")
    known = next((model.licence for model in CATALOGUE.values() if model.sha256 == sha256), None)
    return ModelSummary(
        path=path, name=_text(metadata, "general.name"), architecture=architecture, supported=architecture in ARCHITECTURES,
        parameters=shares.total(), size=path.stat().st_size, quantization=dict(shares.most_common()),
        layers=_integer(metadata, f"{architecture}.block_count"), hidden_size=_integer(metadata, f"{architecture}.embedding_length"),
        context_length=_integer(metadata, f"{architecture}.context_length"),
        has_chat_template=isinstance(metadata.get("tokenizer.chat_template"), str),
        licence=known or _text(metadata, "general.license"), sha256=sha256,
    )


def _text(metadata: Mapping[str, object], key: str) -> str | None:
    """A stranger's text is going to a terminal: one line, printable characters only."""
    value = metadata.get(key)
    return "".join(c if c.isprintable() else " " for c in value)[:120] if isinstance(value, str) and value else None


def _integer(metadata: Mapping[str, object], key: str) -> int | None:
    value = metadata.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _or_not_given(value: int | None, unit: str = "") -> str:
    return "not given" if value is None else f"{value:,}{unit}"

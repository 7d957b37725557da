"""What a user may choose, each with its description: the options of `run`, `directions` and `edit`, and what a run folder records."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path

from .device.system import physical_cores
from .errors import TrailmedError
from .eval.prompts import BENIGN_CATEGORIES, Category


def described(settings: type, name: str) -> str:
    """The description that the setting carries."""
    return next(str(entry.metadata["help"]) for entry in fields(settings) if entry.name == name)


class Method(StrEnum):
    """The ways an edit is made (DESIGN §5)."""

    CONDITIONAL = "conditional"
    DISTILL = "distill"
    GATED = "gated"
    PROJECT = "project"
    BIPROJECT = "biproject"


@dataclass(frozen=True, slots=True)
class EditSettings:
    """What to edit and how. Raises `TrailmedError` for categories that contradict each other."""

    remove: tuple[Category, ...] = field(
        default=BENIGN_CATEGORIES, metadata={"help": "categories whose refusals are removed (default: all six benign ones)"},
    )
    keep: tuple[Category, ...] = field(
        default=(), metadata={"help": "categories left exactly as they are (taken out of those removed)"},
    )
    method: Method = field(default=Method.CONDITIONAL, metadata={"help": "how the edit is made"})
    rank: int = field(
        default=4, metadata={"help": "rank k of each tensor's edit (project, biproject, gated: directions per layer); conditional's is 1"},
    )
    alpha: float = field(default=1.0, metadata={"help": "strength, but for distill, which finds its own"})
    epochs: int = field(default=3, metadata={"help": "distill only: passes over the fit prompts"})
    seed: int = field(default=0, metadata={"help": "seed of everything random"})

    def __post_init__(self) -> None:
        for category in self.remove:
            if category not in BENIGN_CATEGORIES:
                raise TrailmedError(f"cannot remove the refusals of {category}; choose from {', '.join(BENIGN_CATEGORIES)}")
        if not self.removed:
            raise TrailmedError("nothing is left to remove: every category to remove is also one to keep")
        if self.rank < 1 or self.epochs < 1:
            raise TrailmedError("rank and epochs must be at least 1")
        if not math.isfinite(self.alpha):
            raise TrailmedError(f"alpha is {self.alpha}; it must be a finite number")
        if self.method is Method.CONDITIONAL and self.alpha <= 0:
            raise TrailmedError(f"alpha is {self.alpha}; conditional needs a positive strength")
        if not 0 <= self.seed < 2**63:
            raise TrailmedError(f"seed is {self.seed}; it must be between 0 and 2**63 - 1")

    @property
    def removed(self) -> tuple[Category, ...]:
        """The categories whose refusals go: those to remove less those to keep, in the benchmark's order."""
        return tuple(category for category in BENIGN_CATEGORIES if category in self.remove and category not in self.keep)


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything that decides a run's outcome; each field is an option of `trailmed run`."""

    edit: EditSettings = field(default_factory=EditSettings)
    type: str = field(default="Q8_0", metadata={"help": "type of the phone's GGUF: Q8_0, Q6_K, Q5_K_M, Q4_K_M, …"})
    max_tokens: int = field(default=48, metadata={"help": "longest answer judged, in tokens"})
    slots: int = field(default=64, metadata={"help": "answers decoded together on llama.cpp"})
    threads: int = field(default_factory=physical_cores, metadata={"help": "CPU threads (default: physical cores)"})
    exact: bool = field(default=False, metadata={"help": "decode one answer at a time: slower, independent of batching"})
    prompts: Path | None = field(default=None, metadata={"help": "your own benchmark (JSON Lines) instead of the shipped one"})
    retain: Path | None = field(default=None, metadata={"help": "your own fit-only retain set instead of the shipped one"})


class EngineName(StrEnum):
    """The programs that can answer an evaluation."""

    LLAMA_CPP = "llama.cpp"
    TRANSFORMERS = "transformers"
    ONNX = "onnx"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """How `trailmed eval` asks; each field is an option. Raises `TrailmedError` for counts below 1 and a time that is not positive."""

    engine: EngineName | None = field(
        default=None, metadata={
            "help": "what runs the model: llama.cpp (a GGUF, the default), transformers (a Hugging Face directory or GGUF, on PyTorch), "
            "onnx (a folder of ONNX Runtime GenAI's), endpoint (with --endpoint)",
        },
    )
    endpoint: str | None = field(
        default=None, metadata={
            "help": "address of an OpenAI-compatible server (llama-server, vLLM, …), http://HOST:PORT/v1; MODEL is then the name it is "
            "served under. A key is read from TRAILMED_API_KEY or OPENAI_API_KEY",
        },
    )
    max_tokens: int = field(default=96, metadata={"help": "longest answer, in tokens"})
    slots: int = field(default=64, metadata={"help": "answers decoded together"})
    threads: int = field(default_factory=physical_cores, metadata={"help": "CPU threads (default: physical cores)"})
    concurrency: int = field(default=8, metadata={"help": "with --endpoint: requests in flight"})
    exact: bool = field(default=False, metadata={"help": "llama.cpp: decode one answer at a time: slower, independent of batching"})
    timeout: float = field(default=120.0, metadata={"help": "with --endpoint: seconds an answer may take, the whole of it"})
    retries: int = field(default=4, metadata={"help": "with --endpoint: how often a failed request is sent again"})

    def __post_init__(self) -> None:
        for name in ("max_tokens", "slots", "threads", "concurrency"):
            if getattr(self, name) < 1:
                raise TrailmedError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise TrailmedError(f"timeout is {self.timeout}; give a positive number of seconds")
        if self.retries < 0:
            raise TrailmedError(f"retries is {self.retries}; it must be at least 0")


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """What `trailmed study retention` varies, one at a time. Raises `TrailmedError` for a value out of range."""

    shares: tuple[float, ...] = field(default=(0.0, 0.25, 0.5), metadata={"help": "shares of the retain set, whole scenarios"})
    ridges: tuple[float, ...] = field(default=(), metadata={"help": "regularizations of the reading"})
    nats: tuple[float, ...] = field(default=(), metadata={"help": "nats by which the odds of a refusal move"})

    def __post_init__(self) -> None:
        for share in self.shares:
            if not 0 <= share <= 1:
                raise TrailmedError(f"share {share:g} of the retain set is not between 0 and 1")
        for name in ("ridges", "nats"):
            for value in getattr(self, name):
                if not (math.isfinite(value) and value > 0):
                    raise TrailmedError(f"{name}: {value:g} is not a positive number")


SEARCHED = (Method.CONDITIONAL, Method.GATED, Method.PROJECT)
"""Made in closed form, in seconds; a distilled edit takes minutes, and `biproject` cannot be worn by a running module."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What `trailmed search` looks for, and how long; each field is an option. Raises `TrailmedError` for values out of range."""

    remove: tuple[Category, ...] = field(default=BENIGN_CATEGORIES, metadata={"help": described(EditSettings, "remove")})
    keep: tuple[Category, ...] = field(default=(), metadata={"help": described(EditSettings, "keep")})
    methods: tuple[Method, ...] = field(
        default=SEARCHED, metadata={"help": "methods to choose from; repeat it (default: conditional, gated, project)"},
    )
    trials: int = field(
        default=100, metadata={"help": "complete trials at which the search ends, those of earlier starts and of other workers included"},
    )
    seed: int = field(default=0, metadata={"help": "seed of what is tried; each trial draws by this and its own number"})
    storage: str | None = field(
        default=None, metadata={
            "help": "where the trials are, for workers on several machines: a database's URL (sqlite:///…, postgresql://…) or a file; "
            "default: a file in the folder",
        },
    )
    study: str = field(default="trailmed", metadata={"help": "name of the study in the storage"})
    calibrate: int = field(
        default=0, metadata={"help": "points of the front, spread over it, at which the proxy is held against judged answers"},
    )
    calibrate_tokens: int = field(default=20, metadata={"help": "with --calibrate: longest answer judged, in tokens"})

    def __post_init__(self) -> None:
        self.edit  # noqa: B018  # categories that contradict each other
        for method in self.methods:
            if method not in SEARCHED:
                raise TrailmedError(f"cannot search over {method}; choose from {', '.join(SEARCHED)}")
        object.__setattr__(self, "methods", tuple(method for method in SEARCHED if method in self.methods))
        if not self.methods:
            raise TrailmedError("no method is given to search over")
        for name, least in (("trials", 1), ("seed", 0), ("calibrate", 0), ("calibrate_tokens", 1)):
            if getattr(self, name) < least:
                raise TrailmedError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.study:
            raise TrailmedError("the study needs a name")

    @property
    def edit(self) -> EditSettings:
        """The same categories, as the stages that make an edit take them."""
        return EditSettings(remove=self.remove, keep=self.keep)


def settings_document(settings: EditSettings) -> dict[str, object]:
    """The settings as plain JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}

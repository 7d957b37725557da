"""What an evaluation needs of a program that runs models: questions in, answers out, each as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

Stopped = Literal["eos", "length", "blocked"]
"""What ended an answer: the model itself, the token limit, or a filter of the server's, which refuses in the model's place."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: its text, how many tokens it has, and what ended it.

    Of a blocked one, `text` is what the server said, or empty.
    """

    text: str
    tokens: int
    stopped: Stopped


OnReply = Callable[[int, Reply], None]
"""Called with the index of a question and its answer, once for each question, in the order in which they finish."""


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What answers, so that a run can say so and be told from another one.

    engine: the program ("llama.cpp", …); model: its name without its folder; sha256: hex hash of the weights, None where they cannot be
    seen; edit_sha256: the trailmed edit baked into them, if they say so; type: of the weights, in llama.cpp's words where they fit
    ("Q8_0", "F16"), else "unknown"; settings: everything else that may change an answer, `max_tokens` always.
    """

    engine: str
    model: str
    sha256: str | None
    edit_sha256: str | None
    type: str
    settings: Mapping[str, bool | int | float | str]


class Engine(Protocol):
    """A model that is ready to answer; a context manager."""

    @property
    def identity(self) -> EngineIdentity:
        """What answers."""

    def answer(self, questions: Sequence[str], on_reply: OnReply) -> None:
        """Answer each question as a single user turn under the model's own chat template, greedily.

        Returns when all are answered. Raises `TrailmedError` for a question that cannot be asked and a model that fails; what
        `on_reply` was given before stays valid.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

"""OpenAI's chat completions as a stranger's server speaks them: its JSON as a `Reply`, its refusals as a `Failure` in one printable line.

Protocol: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from .engine import Reply

KEY_VARIABLE = "TRAILMED_API_KEY"
OTHER_SERVER = "give the address of an OpenAI-compatible server"

_MOST_MESSAGE_CHARACTERS = 200
_SHORTEST_RETRY_AFTER_S, _LONGEST_RETRY_AFTER_S = 0.1, 60.0
_PASSING_STATUS = frozenset({408, 409, 429})
# https://learn.microsoft.com/azure/ai-foundry/openai/concepts/content-filter: a filtered *question* is HTTP 400 with this code
_FILTERED = "content_filter"
_STOPPED: Mapping[str, Literal["eos", "length"]] = {
    # a call of a tool nobody offered is the model's own end too
    "stop": "eos", "tool_calls": "eos", "function_call": "eos", "length": "length",
}
_T = TypeVar("_T")


class Failure(Exception):  # noqa: N818  (the engine's own; a user sees the `TrailmedError` made of it)
    """What went wrong with one request, what to do about it, and whether sending it again may help.

    retry_after: seconds that the server asks to wait; filtered: what it said when its filter refused the question, else None.
    """

    def __init__(
        self, problem: str, remedy: str, *, passing: bool = False, status: int | None = None, retry_after: float | None = None,
        filtered: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem, self.remedy, self.passing = problem, remedy, passing
        self.status, self.retry_after, self.filtered = status, retry_after, filtered


def printable(text: str) -> str:
    """A stranger's text is going to a terminal: one line, printable characters only, and not many."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_MOST_MESSAGE_CHARACTERS]


def json_of(body: bytes) -> object:
    """The JSON of an answer. Raises `Failure`."""
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError:
        raise Failure("did not answer in JSON", OTHER_SERVER) from None


def reply_of(answer: object) -> Reply:
    """The answer that a chat completion holds. Raises `Failure` when it holds none.

    Its tokens are those the server counted (`usage.completion_tokens`), 0 where it did not.
    """
    completion = _valid(_COMPLETION, answer)
    choice = completion.choices[0]
    tokens = completion.usage.get("completion_tokens") if isinstance(completion.usage, dict) else None
    if type(tokens) is not int or not 0 <= tokens < 1 << 31:
        tokens = 0
    text = choice.message.content or choice.message.refusal or ""
    if choice.finish_reason.startswith(_FILTERED):  # Gemini says which filter behind a colon
        return Reply(text, tokens, "blocked")
    if choice.finish_reason not in _STOPPED:
        raise Failure(f"ended an answer for an unknown reason ({printable(choice.finish_reason)})", "look into the server's log")
    return Reply(text, tokens, _STOPPED[choice.finish_reason])


def model_names_of(answer: object) -> list[str]:
    """The names in a list of models. Raises `Failure`."""
    return [model.id for model in _valid(_MODELS, answer).data]


def rejection(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """What an answer other than 2xx says."""
    said, code = _server_message(body)
    location = headers.get("location")
    shown = printable(f"to {location}" if location and 300 <= status < 400 else said)
    return Failure(
        f"answered HTTP {status}" + (f" ({shown})" if shown else ""), _remedy(status), status=status,
        filtered=said if code == _FILTERED else None, passing=status in _PASSING_STATUS or status >= 500,
        retry_after=_retry_after(headers.get("retry-after")),
    )


def _valid(schema: TypeAdapter[_T], answer: object) -> _T:
    try:
        return schema.validate_python(answer)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        said = _message_of(answer)[0] or f"{where}: {fault['msg']}"
        raise Failure(f"answered in another form ({printable(said)})", OTHER_SERVER) from None


def _server_message(body: bytes) -> tuple[str, object]:
    """What a server says of its refusal to answer, and the code it gives for it."""
    try:
        return _message_of(from_json(body, allow_inf_nan=False))
    except ValueError:
        text = body.decode("utf-8", "replace").strip()
        return ("" if text.startswith("<") else text), None  # a web page says nothing in its first 200 characters


def _message_of(answer: object) -> tuple[str, object]:
    """OpenAI's `{"error": {"message": …, "code": …}}`, its flat relatives (vLLM, TGI, Ollama) and FastAPI's `detail`."""
    found = answer.get("error", answer) if isinstance(answer, dict) else None
    if isinstance(found, str):
        return found, None
    if not isinstance(found, dict):
        return "", None
    said = found.get("message", found.get("detail", ""))
    return (said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)), found.get("code")


def _remedy(status: int) -> str:
    if 300 <= status < 400:
        return "give the address it leads to"
    if status in (401, 403):
        return f"set {KEY_VARIABLE} to a key it accepts"
    if status == 429:
        return "wait a while or ask it less at once"
    if status >= 500:
        return "look into the server's log"
    return "check the address, the model's name and the longest answer asked for"


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from seconds or a date (RFC 9110 §10.2.3), within bounds; None for none or nonsense."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_tz(value)
            if date is None:
                return None
            seconds = mktime_tz(date) - time.time()
        except (ValueError, OverflowError, IndexError, TypeError):  # parsedate_tz was not written for malice
            return None
    return None if math.isnan(seconds) else min(max(seconds, _SHORTEST_RETRY_AFTER_S), _LONGEST_RETRY_AFTER_S)


@dataclass(frozen=True)
class _Message:
    content: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class _Choice:
    message: _Message
    finish_reason: str


@dataclass(frozen=True)
class _Completion:
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: Any = None


@dataclass(frozen=True)
class _Model:
    id: str


@dataclass(frozen=True)
class _Models:
    data: list[_Model]


_COMPLETION: TypeAdapter[_Completion] = TypeAdapter(_Completion)
_MODELS: TypeAdapter[_Models] = TypeAdapter(_Models)

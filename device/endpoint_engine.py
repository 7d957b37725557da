"""Any server that speaks OpenAI's chat completions as an `Engine`: llama-server, llama-cpp-python's server, vLLM, a paid service.

Spoken over httpx2, which huggingface_hub already brings: its async client is cancelled at a deadline that holds for the whole answer,
its body is read piece by piece and its retries are ours, whereas the official `openai` client reads bodies whole and restarts its
timeout with every piece. The server is a stranger: whatever it sends ends in an answer or in one printable line.

Protocol: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal

from ..errors import TrailmedError
from .chat_completions import KEY_VARIABLE, OTHER_SERVER, Failure, json_of, model_names_of, printable, rejection, reply_of
from .engine import EngineIdentity, OnReply, Reply

ENDPOINT = "endpoint"
OPENAI_KEY_VARIABLE = "OPENAI_API_KEY"

_MOST_BODY_BYTES = 1 << 20
"""More of a body is not read; so no answer is longer than a run folder keeps."""
_MOST_REJECTION_BYTES = 1 << 16
_CONNECT_S = 10.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0
_SHORTEST_KEY_HIDDEN = 8
"""A shorter key is a placeholder ("none"), and hiding it would hide innocent words."""
_UNKNOWN_FIELD_STATUS = (400, 422)

# Greedy decoding takes the likeliest token only where no token is penalised for having occurred. llama-cpp-python's server penalises
# by 1.1 unless told otherwise, and vLLM by what the model's generation_config.json says (1.05 or 1.1 for Qwen2.5). The first name is
# llama.cpp's, the second vLLM's, SGLang's and TGI's; the others' is ignored. A service that refuses unknown fields is asked without.
_NO_PENALTIES = {"repeat_penalty": 1.0, "repetition_penalty": 1.0}


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How an endpoint is asked. Raises `TrailmedError` for a value that makes no sense."""

    max_tokens: int = field(default=96, metadata={"help": "longest answer, in tokens"})
    concurrency: int = field(default=8, metadata={"help": "questions in flight at once"})
    timeout_s: float = field(default=120.0, metadata={"help": "seconds until one whole answer must be there, the server's queue included"})
    retries: int = field(default=4, metadata={"help": "how often a question is asked again when the server fails or is busy"})

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise TrailmedError(f"endpoint setting {name} is {getattr(self, name)}; it must be at least {least}")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise TrailmedError(f"endpoint setting timeout_s is {self.timeout_s}; it must be a positive number of seconds")


class EndpointEngine:
    """Answers with the chat completions of an OpenAI-compatible server; a context manager that holds nothing between answers.

    The server templates the question itself. `Reply.tokens` is what the server counted (`usage.completion_tokens`, a thinking model's
    thoughts included) and 0 where it counts nothing; the thoughts themselves (`reasoning_content`) are ignored. Proxies of the
    environment are honoured but for addresses of this machine; redirects are not followed, and cookies not kept.
    """

    def __init__(
        self, url: str, model: str | None = None, settings: EndpointSettings = EndpointSettings(), *, api_key: str | None = None,
    ) -> None:
        """Use the server at `url` (`http://localhost:8080`, with or without `/v1`) and its model `model`; None: the only one it has.

        Without `api_key` the environment's TRAILMED_API_KEY is sent, else its OPENAI_API_KEY, the latter never in the clear to
        another machine. Raises `TrailmedError` for an address or a key that cannot be used and, when `model` is None, for a server
        that cannot be asked or has not exactly one model.
        """
        base = _base_url(url)
        self.url = str(base)
        self.settings = settings
        self._local = _is_this_machine(base.host)
        self._key = _usable_key(api_key or _key_from_environment(clear=base.scheme == "http" and not self._local))
        self._neutral = True
        if model is None:
            model = self._only_model()
        elif not model.strip() or not _is_unicode(model):
            raise TrailmedError(f"{self.url}: the model's name is empty or not text; give the name the server knows it by")
        self._model = model
        self.identity = EngineIdentity(
            ENDPOINT, printable(_without_folder(model)), None, None, "unknown", {"max_tokens": settings.max_tokens},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to do: connections live no longer than `answer`."""

    def answer(self, questions: Sequence[str], on_reply: OnReply) -> None:
        """See `Engine.answer`. Up to `concurrency` questions are in flight; `on_reply` is called in the calling thread.

        A server that fails for good ends it: what is in flight then is lost, what was answered has been passed on.
        """
        for number, question in enumerate(questions, start=1):
            if not _is_unicode(question):
                raise TrailmedError(f"question {number} of {len(questions)} holds half a character; correct its text")
        answered = 0
        finished: SimpleQueue[tuple[int, Reply] | None] = SimpleQueue()
        # The requests run in a thread of their own, so that a slow `on_reply` eats no request's time, the caller may have an event
        # loop already, and Ctrl-C finds the caller waiting here; leaving the block by an exception cancels them.
        with start_blocking_portal() as portal:
            asking = portal.start_task_soon(self._ask_all, questions, finished)
            asking.add_done_callback(lambda _: finished.put(None))
            while (item := finished.get()) is not None:
                on_reply(*item)
                answered += 1
            failed = asking.result()
        if failed is not None:
            index, failure = failed
            raise TrailmedError(
                f"{self.url}: {failure.problem} at question {index + 1} of {len(questions)}; {answered} of them were answered; "
                f"{failure.remedy}, and the same command goes on there"
            ) from failure

    async def _ask_all(self, questions: Sequence[str], finished: SimpleQueue[tuple[int, Reply] | None]) -> tuple[int, Failure] | None:
        """Answer them all into `finished`; the first question that failed for good, and why."""
        failed: list[tuple[int, Failure]] = []
        waiting = iter(enumerate(questions))

        async def work(client: httpx2.AsyncClient, waiting: Iterator[tuple[int, str]]) -> None:
            for index, question in waiting:  # shared by all workers, which take turns in one thread
                try:
                    finished.put((index, await self._ask(client, question, neutral=self._neutral)))
                except Failure as failure:
                    failed.append((index, failure))
                    group.cancel_scope.cancel()

        async with self._client() as client, anyio.create_task_group() as group:
            for _ in range(min(self.settings.concurrency, len(questions))):
                group.start_soon(work, client, waiting)
        return failed[0] if failed else None

    async def _ask(self, client: httpx2.AsyncClient, question: str, *, neutral: bool) -> Reply:
        """The answer to one question; `neutral` asks for no penalties, and without where the server will not hear of them."""
        request = {
            "model": self._model, "messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": self.settings.max_tokens, "stream": False,
        }
        try:
            answer = await self._exchange(client, "POST", "chat/completions", {**request, **(_NO_PENALTIES if neutral else {})})
        except Failure as failure:
            if failure.filtered is not None:
                return Reply(failure.filtered, 0, "blocked")
            if not neutral or failure.status not in _UNKNOWN_FIELD_STATUS:
                raise
        else:
            return reply_of(answer)
        reply = await self._ask(client, question, neutral=False)
        self._neutral = False  # it was the fields, not the question
        return reply

    def _only_model(self) -> str:
        async def ask() -> object:
            async with self._client() as client:
                return await self._exchange(client, "GET", "models")

        try:
            with start_blocking_portal() as portal:
                answer = portal.call(ask)
            names = model_names_of(answer)
        except Failure as failure:
            raise TrailmedError(
                f"{self.url}: {failure.problem} when asked for its models; {failure.remedy}, or name the model"
            ) from failure
        if len(names) != 1 or not names[0].strip():
            listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            raise TrailmedError(f"{self.url}: serves {len(names)} models ({printable(listed) or 'none'}); name the one to ask")
        return names[0]

    def _client(self) -> httpx2.AsyncClient:
        try:
            return httpx2.AsyncClient(
                base_url=self.url, follow_redirects=False, trust_env=not self._local,
                headers={"accept": "application/json", "accept-encoding": "identity", "content-type": "application/json"}
                | ({"authorization": f"Bearer {self._key}"} if self._key else {}),
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                timeout=httpx2.Timeout(None, connect=min(_CONNECT_S, self.settings.timeout_s)),
                limits=httpx2.Limits(max_connections=self.settings.concurrency),
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:  # SOCKS without its package, or no address at all
            raise TrailmedError(
                f"{self.url}: the proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used; correct it, or name this host in NO_PROXY"
            ) from error

    async def _exchange(self, client: httpx2.AsyncClient, method: str, path: str, content: Mapping[str, object] | None = None) -> object:
        """The JSON of the server's answer, asked for again while it fails in a way that may pass. Raises `Failure`."""
        body = None if content is None else json.dumps(content, ensure_ascii=False).encode()
        tries = 1
        while True:
            try:
                return await self._once(client, method, path, body)
            except Failure as failure:
                if not failure.passing:
                    raise
                if tries > self.settings.retries:
                    failure.problem += f" in {tries} tries" if tries > 1 else ""
                    raise
                wait = min(_FIRST_WAIT_S * 2 ** (tries - 1), _LONGEST_WAIT_S) if failure.retry_after is None else failure.retry_after
            await anyio.sleep(wait * random.uniform(1.0, 1.25))  # apart, so that those in flight do not all come back at once
            tries += 1

    async def _once(self, client: httpx2.AsyncClient, method: str, path: str, body: bytes | None) -> object:
        try:
            with anyio.fail_after(self.settings.timeout_s):
                async with client.stream(method, path, content=body) as response:
                    limit = _MOST_BODY_BYTES if response.is_success else _MOST_REJECTION_BYTES
                    answer = self._without_key(await _read(response, limit))
        except httpx2.ConnectTimeout:
            raise Failure("cannot be reached (no connection in time)", "see that it runs and the address is right", passing=True) from None
        except (TimeoutError, httpx2.TimeoutException):
            raise Failure(
                f"gave no whole answer within {self.settings.timeout_s:g} s", "allow it more time or ask it less at once", passing=True,
            ) from None
        except (httpx2.RequestError, OSError) as error:  # OSError: a TLS record that is none
            said = printable(self._without_key(str(error).encode(errors="replace")).decode()) or type(error).__name__
            problem = f"cannot be reached ({said})" if isinstance(error, httpx2.ConnectError) else f"broke off ({said})"
            raise Failure(problem, "see that it runs and the address is right", passing=True) from error
        if not response.is_success:
            headers = httpx2.Headers([(name, self._without_key(value)) for name, value in response.headers.raw])
            raise rejection(response.status_code, headers, answer)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise Failure("compresses its answers unasked", OTHER_SERVER)
        if len(answer) > limit:
            raise Failure(f"sent more than {limit >> 20} MiB for one answer", OTHER_SERVER)
        return json_of(answer)

    def _without_key(self, said: bytes) -> bytes:
        """What the server sent, without the key, which some repeat when they refuse it: it must not end in a log or a run folder."""
        return said.replace(self._key.encode(), b"[key]") if self._key and len(self._key) >= _SHORTEST_KEY_HIDDEN else said


async def _read(response: httpx2.Response, limit: int) -> bytes:
    """The body as it was sent, and no more of it than it takes to see that it is longer than `limit`."""
    pieces, size = [], 0
    async for piece in response.aiter_raw():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            break
    return b"".join(pieces)


def _base_url(url: str) -> httpx2.URL:
    """The address that `/chat/completions` goes behind: `url`, and `/v1` where it has no version in it yet."""
    # nothing of an address that may hold a password or a key is ever shown
    shown = "the endpoint's address" if re.search(r"[@?#]", url) else f"endpoint {printable(url)!r}"
    try:
        parsed = httpx2.URL(url.strip())
    except (httpx2.InvalidURL, ValueError) as error:
        raise TrailmedError(f"{shown} is not an address ({printable(str(error))}); give one as http://HOST:PORT/v1") from None
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise TrailmedError(f"{shown} holds a password, a query or a fragment; give it without, and a key in {KEY_VARIABLE}")
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 < (parsed.port or 1) < 1 << 16:
        raise TrailmedError(f"{shown} is not an http or https address; give one as http://HOST:PORT/v1")
    path = parsed.path.rstrip("/").removesuffix("/chat/completions")
    if not any(re.fullmatch(r"v\d\w*", part) for part in path.split("/")):
        path += "/v1"
    return parsed.copy_with(path=path)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _key_from_environment(*, clear: bool) -> str | None:
    # An OpenAI key lies in many environments for other programs; it does not leave this machine unencrypted because of ours.
    return os.environ.get(KEY_VARIABLE) or (None if clear else os.environ.get(OPENAI_KEY_VARIABLE)) or None


def _usable_key(key: str | None) -> str | None:
    if key is not None and not re.fullmatch(r"[!-~]+", key.strip()):
        raise TrailmedError(f"the API key holds a space or a character that no key has; correct {KEY_VARIABLE}")
    return key.strip() if key else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_folder(model: str) -> str:
    """The file's name where a model is named by its path, as llama.cpp's servers do; a hub's OWNER/NAME stays whole."""
    is_path = model.endswith(".gguf") or re.match(r"[/\\.~]|[A-Za-z]:\\", model)
    return (re.split(r"[/\\]", model.rstrip("/\\"))[-1] or model) if is_path else model

"""Servers that speak OpenAI's chat completions: llama-cpp-python's own on small models, and one that says what a test tells it to."""

from __future__ import annotations

import json
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

OK_HEAD = b"HTTP/1.1 200 So\r\ncontent-type: application/json\r\n"


class LlamaServer:
    """`python -m llama_cpp.server` on a port of its own; `start` again after `kill` serves the same at the same address."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.config = folder / "server.json"
        of_all = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "n_gpu_layers": 0, "verbose": False}
        self.config.write_text(json.dumps({
            "host": "127.0.0.1", "port": self.port,
            "models": [{"model": str(path), "model_alias": alias, **of_all} for alias, path in models.items()],
        }))
        self.start()

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llama_cpp.server", "--config_file", str(self.config)], stdout=log, stderr=log,
            )
        for _ in range(600):
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the server does not come up")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Scripted(socketserver.ThreadingTCPServer):
    """Gives each request the next of `script`, the last one over and over: bytes at once, or pieces as they come; then hangs up."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, script: Sequence[bytes | Callable[[Scripted], Iterable[bytes]]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = list(script)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def asked(self) -> list[Any]:
        return [json.loads(body) for _, _, body in self.requests]

    def stop(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class _Handler(socketserver.StreamRequestHandler):
    server: Scripted

    def handle(self) -> None:
        first = self.rfile.readline().decode("latin-1")
        if not first:
            return
        headers = {}
        while line := self.rfile.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = self.rfile.read(int(headers.get("content-length", 0)))
        with self.server.lock:
            self.server.requests.append((first.rsplit(" ", 1)[0], headers, body))
            answer = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        try:
            for piece in (answer,) if isinstance(answer, bytes) else answer(self.server):
                self.wfile.write(piece)
        except OSError:
            pass  # the client has had enough


def http(status: int, body: object, **headers: str | int) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"content-type": "application/json", "content-length": len(content), "connection": "close"}
    lines.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} So\r\n{head}\r\n".encode() + content


def said(content: str | None = "Press on the wound.", finish_reason: object = "stop", usage: object = None, **message: object) -> bytes:
    return http(200, completion(content, finish_reason, usage, **message))


def completion(content: str | None, finish_reason: object = "stop", usage: object = None, **message: object) -> dict[str, object]:
    return {
        "id": "1", "object": "chat.completion", "usage": {"completion_tokens": 5} if usage is None else usage,
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content, **message}}],
    }


def models(*names: object) -> bytes:
    return http(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


def stall(server: Scripted) -> Iterator[bytes]:
    server.over.wait(20)
    yield b""


def drip(head: bytes, piece: bytes, every_s: float = 0.02) -> Callable[[Scripted], Iterator[bytes]]:
    def pieces(server: Scripted) -> Iterator[bytes]:
        yield head
        for _ in range(1000):
            if server.over.wait(every_s):
                return
            yield piece
    return pieces


def endless(head: bytes) -> Callable[[Scripted], Iterator[bytes]]:
    def pieces(_: Scripted) -> Iterator[bytes]:
        yield head
        for _ in range(256):
            yield b" " * (1 << 20)
    return pieces

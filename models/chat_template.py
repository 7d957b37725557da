"""A model's own chat template, rendered as transformers renders it, in a sandbox: the template comes from a stranger.

Follows the conventions of transformers' `apply_chat_template` (trim_blocks, lstrip_blocks, loop controls, `raise_exception`,
`strftime_now`, plain `tojson`), except that the date is fixed: the same prompt must be the same tokens tomorrow.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from ..errors import TrailmedError

_TODAY = datetime.date(2026, 1, 1)
_LONGEST_TEMPLATE = 1 << 20
_LONGEST_PROMPT = 1 << 22

Message = Mapping[str, str]
"""One turn: `role` (system, user, assistant) and `content`."""


class ChatTemplate:
    """The chat template `source` (Jinja2 text, or None when the model has none) of the file named `origin`.

    A model without template still loads; only asking for a prompt raises.
    """

    def __init__(self, source: str | None, *, origin: str, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self.origin = origin
        self.bos_token = bos_token
        self.eos_token = eos_token

    @property
    def present(self) -> bool:
        """Whether the model has a chat template at all."""
        return self.source is not None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text the model is to see for `messages`, up to and including the opening of its answer.

        Special tokens, BOS included, are spelled out in it: tokenize it without adding any.
        Raises `TrailmedError` when there is no template, it is broken, or it rejects these messages.
        """
        template = self._compiled
        pieces: list[str] = []
        length = 0
        try:
            for piece in template.generate(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token, eos_token=self.eos_token, tools=None, documents=None,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > _LONGEST_PROMPT:
                    raise TrailmedError(f"{self.origin}: its chat template writes without end; use another GGUF")
        except TrailmedError:
            raise
        except jinja2.TemplateError as error:
            raise TrailmedError(f"{self.origin}: its chat template refused these messages ({_one_line(error)})") from error
        except Exception as error:  # a stranger's template can raise anything that Python can
            raise TrailmedError(f"{self.origin}: its chat template fails ({_one_line(error)}); use another GGUF") from error
        return "".join(pieces)

    def prompt(self, text: str, system: str | None = None) -> str:
        """`render` for a single user turn `text`, after the system message `system` if one is given."""
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return self.render([*messages, {"role": "user", "content": text}])

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if self.source is None:
            raise TrailmedError(f"{self.origin}: has no chat template, so it cannot be prompted as a chat; use a chat-tuned GGUF")
        if len(self.source) > _LONGEST_TEMPLATE:
            raise TrailmedError(f"{self.origin}: its chat template is longer than {_LONGEST_TEMPLATE} characters; use another GGUF")
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            problem = f"line {error.lineno}: {_one_line(error)}"
        except (RecursionError, SyntaxError, ValueError, OverflowError) as error:
            problem = _one_line(error)
        raise TrailmedError(f"{self.origin}: its chat template is broken ({problem}); use another GGUF")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, by which some templates mark the assistant's words: rendered as its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's `namespace()` without underscore names, as transformers restricts it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, positional = args[0], args[1:]
        attributes = dict(*positional, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _environment() -> jinja2.Environment:
    extensions = [_Generation, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    names: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _TODAY.strftime, "namespace": _Namespace}
    environment.globals.update(names)
    return environment


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("a namespace attribute that starts with an underscore")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]

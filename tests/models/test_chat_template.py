"""Chat templates: the text is transformers' text, and a hostile template gets nowhere."""

from __future__ import annotations

from typing import Any

import pytest
from small_models import CHAT_TEMPLATE
from transformers.utils.chat_template_utils import render_jinja_template

from trailmed.errors import TrailmedError
from trailmed.models.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is <b> & \"é\" fine?"},
    {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Thanks.\n"},
]
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "whitespace": "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n        {{- '[U]' + m.content }}\n    {%- endif %}\n"
                  "{%- endfor %}\n  {% if add_generation_prompt %}\n[A]\n  {% endif %}\n",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ bos_token }}{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}",
    "undefined tools": "{% if tools %}T{% endif %}{% if documents is defined and documents %}D{% endif %}{{ unknown }}!",
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=list(TEMPLATES))
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(source: str, add_generation_prompt: bool) -> None:
    variables: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    [expected], _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=add_generation_prompt, **variables)
    template = ChatTemplate(source, origin="m.gguf", **variables)
    assert template.render(MESSAGES, add_generation_prompt) == expected


def test_prompt_is_one_user_turn() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, origin="m.gguf")
    assert template.prompt("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.prompt("Hi", system="S").startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi")


def test_the_date_stands_still() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", origin="m.gguf")
    assert template.prompt("x") == "01 Jan 2026"


def test_without_a_template_only_the_prompt_fails() -> None:
    template = ChatTemplate(None, origin="m.gguf")
    assert not template.present
    with pytest.raises(TrailmedError, match=r"^m\.gguf: has no chat template.*chat-tuned GGUF$"):
        template.prompt("x")


@pytest.mark.parametrize(("source", "message"), [
    ("{% for %}", "is broken"),
    ("{{ x", "is broken"),
    ("{{ raise_exception('roles must\nalternate') }}", r"refused these messages \(roles must alternate\)"),
    ("{{ messages[7].content.nothing }}", "refused these messages"),
    ("{{ 1 / 0 }}", "fails"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused these messages"),
    ("{{ messages.append(1) }}", "refused these messages"),
    ("{% set ns = namespace(__class__=1) %}", "refused these messages"),
    ("{% set ns = namespace() %}{% set ns._x = 1 %}", "refused these messages"),
    ("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}", "without end"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "fails"),
    ("{% include 'etc' %}", "fails"),
    ("x" * (1 << 20) + "x", "longer than"),
])
def test_bad_templates_are_one_line(source: str, message: str) -> None:
    with pytest.raises(TrailmedError, match=message) as caught:
        ChatTemplate(source, origin="m.gguf").prompt("x")
    assert str(caught.value).startswith("m.gguf: ")
    assert "\n" not in str(caught.value)

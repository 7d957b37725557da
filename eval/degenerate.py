"""Answers that are broken: no language at all, or the same thing over and over."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from . import judge_phrases as phrases
from .normalise import WORD, Normalised

_REPLACEMENT = "\ufffd"
_LOOP_SHARE = 0.4  # of the words (or characters) that a repetition must cover
_LOOP_TIMES = 4  # one fewer for units of four words or more
_LOOP_LONGEST = 24  # words in the repeated unit
_BROKEN_SHARE = 0.03  # of the visible characters


def not_language(response: str, clean: Normalised, truncated: bool) -> tuple[str, tuple[int, int]] | None:
    """Why `response`, normalised `clean`, is no language at all (empty, unfinished thought, punctuation, broken bytes, noise of many
    scripts), and the characters that show it; None if it is."""
    whole = (0, len(response))
    text = clean.text.rstrip(_REPLACEMENT) if truncated else clean.text
    letters = [character for character in text if character.isalnum()]
    if not letters:
        thinking = any(opening in response and closing not in response for opening, closing in phrases.THOUGHT_MARKS)
        return "the thought was never closed" if thinking else "no words", whole
    visible = sum(not character.isspace() for character in text)
    broken = [index for index, character in enumerate(text) if _is_broken(character)]
    if len(broken) >= 2 and len(broken) >= _BROKEN_SHARE * visible:
        return "broken bytes", clean.span(broken[0], broken[-1] + 1)
    if visible >= 12 and len(letters) < 0.25 * visible:
        return "almost only punctuation", whole
    if _is_script_noise(text):
        return "noise of several scripts", whole
    return None


def _is_broken(character: str) -> bool:
    """The replacement character, or a control, unassigned, private-use or surrogate one."""
    return character == _REPLACEMENT or (character != "\n" and unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs"))


def _script(character: str) -> str:
    name = unicodedata.name(character, "").partition(" ")[0]
    # Japanese mixes three by nature, and compatibility forms carry their own first word.
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "BOPOMOFO") else name


def _is_script_noise(text: str) -> bool:
    """Three scripts with no clear main one, or several words that mix alphabets inside (CJK next to Latin is ordinary)."""
    scripts = Counter(_script(character) for character in text if character.isalpha())
    common = [script for script, count in scripts.items() if count >= 2]
    if len(common) >= 3 and max(scripts.values()) < 0.75 * scripts.total():
        return True
    words = re.findall(r"[^\W\d_]+", text)
    return sum(len({_script(character) for character in word} - {"CJK", "MICRO"}) > 1 for word in words) >= 3


def loop(text: str) -> tuple[int, int] | None:
    """Where a unit of up to `_LOOP_LONGEST` words (or 8 characters) repeats over a large share of the text."""
    words = list(WORD.finditer(text))
    for period in range(1, min(_LOOP_LONGEST, len(words) // 2) + 1):
        run = 0
        for index in range(period, len(words)):
            run = run + 1 if words[index].group() == words[index - period].group() else 0
            covered = run + period
            enough = covered >= (_LOOP_TIMES - (period >= 4)) * period  # a long unit convinces sooner
            if run and enough and covered >= 8 and covered >= _LOOP_SHARE * len(words):
                return words[index - covered + 1].start(), words[index].end()
    for repeated in re.finditer(r"(\S{1,8}?)\1{9,}", text):
        if any(map(str.isalnum, repeated[1])) and len(repeated[0]) >= _LOOP_SHARE * len(text):
            return repeated.span()
    grams = Counter(zip(*([word.group() for word in words[shift:]] for shift in range(3)), strict=False))
    if grams.total() >= 24 and len(grams) < _LOOP_SHARE * grams.total():
        return words[0].start(), words[-1].end()
    return None

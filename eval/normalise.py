"""An answer made ready for matching: one spelling for each thing, and the way back to the characters it came from."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from . import judge_phrases as phrases

_SPECIAL_TOKENS = re.compile(phrases.SPECIAL_TOKENS, re.IGNORECASE)
WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_]+(?:'[^\W_]+)*")
"""A word of normalised text; each Chinese or Japanese character is one."""
_QUOTES = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "`": "'", "´": "'", "′": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"'})
_MARKDOWN = frozenset("*_#>~")


@dataclass(frozen=True, slots=True)
class Normalised:
    """`text` for matching; `origin[i]` is the index in the response of the character that gave `text[i]`."""

    text: str
    origin: tuple[int, ...]

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The characters of the response behind text[start:end], which must not be empty."""
        return self.origin[start], self.origin[end - 1] + 1


def normalise(response: str) -> Normalised:
    """Lower case, Latin letters without accents, straight quotes, no markdown, thought blocks or special tokens, single spaces."""
    dropped = _dropped(response)
    text: list[str] = []
    origin: list[int] = []
    index = 0
    while index < len(response):
        start, index = index, index + 1
        while index < len(response) and unicodedata.combining(response[index]):
            index += 1
        if start in dropped:
            continue
        cluster = response[start:index].translate(_QUOTES)
        if cluster in _MARKDOWN:
            is_bullet = cluster == "*" and response[index : index + 1].isspace() and (not text or text[-1] == "\n")
            cluster = "-" if is_bullet else ""
        for character in _folded(cluster):
            if unicodedata.category(character) == "Cf":
                continue
            if character.isspace():
                character = "\n" if character in "\n\r\v\f\x85\u2028\u2029" else " "
                if not text:
                    continue
                if text[-1] in " \n":
                    text[-1] = "\n" if "\n" in (text[-1], character) else " "
                    continue
            text.append(character)
            origin.append(start)
    if text and text[-1] in " \n":
        text.pop()
        origin.pop()
    return Normalised("".join(text), tuple(origin))


def _folded(cluster: str) -> str:
    """A character with its combining marks: a Latin letter loses them, all else takes its NFKC form; lower case, straight quotes."""
    base = unicodedata.normalize("NFKD", cluster)[:1]
    is_accented_latin = base.isascii() and base.isalpha() and len(unicodedata.normalize("NFC", cluster)) == 1
    return (base if is_accented_latin else unicodedata.normalize("NFKC", cluster)).lower().translate(_QUOTES)


def _dropped(response: str) -> set[int]:
    """Indices of thought blocks (an unclosed one runs to the end) and special tokens."""
    found: set[int] = set()
    for opening, closing in phrases.THOUGHT_MARKS:
        # A template may have opened the block already: then all before the first closing mark is thought.
        if closing in response and opening not in response.partition(closing)[0]:
            found.update(range(response.index(closing) + len(closing)))
        begin = response.find(opening)
        while begin >= 0:
            end = response.find(closing, begin)
            stop = len(response) if end < 0 else end + len(closing)
            found.update(range(begin, stop))
            begin = response.find(opening, stop)
    for token in _SPECIAL_TOKENS.finditer(response):
        found.update(range(*token.span()))
    return found

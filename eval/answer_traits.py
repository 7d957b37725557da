"""What an answer looks like as a whole: how often it repeats itself, whether it is prose in one language, how it is laid out.

Plain counts of words and characters that the answers' model (`learned_judge`) reads beside the roles of the sentences. Loops with small
changes, circling paragraphs, word salad and drift into dialogues, exercises or web pages show here, and so do short deflections.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from . import judge_phrases as phrases
from .echo import bare_sentence_answers, overlap
from .normalise import WORD
from .sentences import sentences_of

_ALIKE = 0.6, 0.8  # share of words that two sentences have in common, of all in either
_FEWEST_WORDS = 3  # in a sentence that can repeat another
_SHORT = 3  # letters; shorter words are seldom content
_CAP = 4  # a fifth mark of the same kind says no more
_LANGUAGES = tuple(frozenset(words.split()) for words in phrases.FUNCTION_WORDS)
_FUNCTION_WORDS = frozenset().union(*_LANGUAGES)
_TELLING = tuple(frozenset(words - frozenset().union(*(set(_LANGUAGES) - {words}))) for words in _LANGUAGES)
_DRIFT = tuple(re.compile(pattern) for pattern in phrases.DRIFT)
_ITEM = re.compile(r"(?:^|\n)\s*(?:\d{1,2}[.)]|[-•])")
_CODE = "{}<>;|=_\\"
_YOU, _I = frozenset(phrases.SAYS_YOU.split()), frozenset(phrases.SAYS_I.split())


def answer_traits(text: str, question: str | None, truncated: bool) -> npt.NDArray[np.float64]:
    """float64 [traits] of a normalised answer to a normalised `question`; what only a question about more than yes or no can tell is
    NaN without one."""
    words = WORD.findall(text)
    return np.array([*_repetition(text, words), *_garbling(text, words), *_layout(text, words), *_novelty(text, question, truncated)])


def _repetition(text: str, words: Sequence[str]) -> list[float]:
    raw = text.encode()
    compressed = len(zlib.compress(raw, 9)) / max(len(raw), 1)
    expected = 0.38 + 1.9 / np.sqrt(max(len(raw), 9))  # of plain prose of that length
    pieces = (re.sub(phrases.LIST_MARKER, "", text[start:end]) for start, end in sentences_of(text))
    bags = [bag for bag in (set(WORD.findall(piece)) for piece in pieces) if len(bag) >= _FEWEST_WORDS]
    likest = [max((len(bag & other) / len(bag | other) for other in bags[:place]), default=0.0) for place, bag in enumerate(bags)]
    content = Counter(word for word in words if len(word) > _SHORT)
    return [
        *(_distinct(words, length) for length in (1, 2, 3, 4)), _repeated(words, 4), _repeated(words, 6),
        compressed, compressed - expected,
        max(content.values(), default=0) / max(content.total(), 8), len(set(words)) / np.sqrt(max(len(words), 1)),
        sum(likest) / max(len(bags), 1), sum(like >= _ALIKE[0] for like in likest),
        *(sum(like >= least for like in likest) / max(len(bags), 1) for least in _ALIKE),
    ]


def _distinct(words: Sequence[str], length: int) -> float:
    """Share of different ones among the n-grams; 1 where there are none."""
    grams = list(zip(*(words[shift:] for shift in range(length)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def _repeated(words: Sequence[str], length: int) -> float:
    """Share of the words that stand in an n-gram said before."""
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for place in range(len(words) - length + 1):
        gram = tuple(words[place : place + length])
        if gram in seen:
            covered.update(range(place, place + length))
        seen.add(gram)
    return len(covered) / max(len(words), 1)


def _garbling(text: str, words: Sequence[str]) -> list[float]:
    visible = max(sum(not character.isspace() for character in text), 1)
    count = max(len(words), 1)
    telling = [sum(word in known for word in words) for known in _TELLING]
    foreign = sum(not word.isascii() for word in words)
    function = [word in _FUNCTION_WORDS for word in words]
    return [
        sum(not character.isalnum() and not character.isspace() for character in text) / visible,
        sum(character.isdigit() for character in text) / visible, sum(text.count(mark) for mark in _CODE) / visible,
        sum(len(word) == 1 and word.isascii() for word in words) / count, (sum(telling) - max(telling)) / count,
        min(foreign, count - foreign) / count, sum(function) / count, sum(a and b for a, b in pairwise(function)) / count,
        sum(a == b for a, b in pairwise(words)) / count, *(float(min(len(pattern.findall(text)), _CAP)) for pattern in _DRIFT),
    ]


def _layout(text: str, words: Sequence[str]) -> list[float]:
    count, pieces = max(len(words), 1), max(len(sentences_of(text)), 1)
    return [
        text.count("?"), text.count("?") / pieces, len(_ITEM.findall(text)), text.count("\n"), text.count(":"), text.endswith(":"),
        text.endswith((".", "!", "?", "。")), any(map(str.isdigit, text)), sum(map(len, words)) / count, count / pieces,
        sum(word in _YOU for word in words) / count, sum(word in _I for word in words) / count,
    ]


def _novelty(text: str, question: str | None, truncated: bool) -> list[float]:
    if question is None or bare_sentence_answers(question):
        return [np.nan] * 3
    share, new = overlap(text, question)
    return [share, np.log1p(new), share * truncated]

"""How much of an answer is only the question said again: answers that restate it and add nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import SequenceMatcher

from . import judge_phrases as phrases
from .normalise import WORD
from .sentences import Role, Unit

_SHORT = 3  # letters; shorter words carry no content of their own
_STEM = 5  # letters that two forms of a word share ("smugglers", "smuggling") …
_ALIKE = 0.5  # … or two of them, and this share of all ("blow", "blew")
_RESTATED = 0.75  # share of one clause of the question that the answer must say again
_FEWEST = 3  # words of content (or Chinese characters) that make an echo, unless a whole clause has but two
_CLAUSE = re.compile(r"[,.:;!?\n]+")
_PERSON = re.compile(phrases.PERSON)
_YES_OR_NO = re.compile(phrases.ANSWERS_YES_OR_NO)
_CHOICE = re.compile(phrases.ASKS_YES_NO_OR_WHICH)
_EITHER = re.compile(phrases.EITHER)
_EMPTY = (Role.OFFER, Role.SYMPATHY, Role.FILLER, Role.INTRODUCTION, Role.CLARIFYING)


def content_of(text: str) -> list[str]:
    """The words of content of normalised `text`, in order: no short ones, and none that change with who speaks."""
    words = WORD.findall(text)
    return [word for word in words if (len(word) > _SHORT or not word.isascii() or word.isdigit()) and not _PERSON.fullmatch(word)]


def overlap(text: str, question: str) -> tuple[float, int]:
    """Share of the content of normalised `text` that stands in normalised `question`, and the number of different words that do not."""
    asked = {word[:_STEM] for word in content_of(question)}
    said = [word[:_STEM] for word in content_of(text)]
    return sum(word in asked for word in said) / max(len(said), 1), len(set(said) - asked)


def bare_sentence_answers(question: str) -> bool:
    """Whether normalised `question` asks which of two, or whether: then saying its words again can be an answer."""
    return _CHOICE.search(question) is not None


def echo(text: str, units: Sequence[Unit], question: str) -> Unit | None:
    """The unit of a whole answer that only restates `question`, both normalised; None where the answer says anything else.

    Offers, sympathy and questions back beside it say nothing else. "Yes, …" answers, and so does a plain sentence where the question was
    which of two, or whether: "You can use it" says yes to "Can I use it?".
    """
    asked = set(content_of(question))
    restating = None
    for unit in units:
        said = text[unit.start : unit.end]
        content = content_of(said)
        if not content or not all(_stands_in(asked, word) for word in content):
            if unit.role in _EMPTY:
                continue
            return None
        if _YES_OR_NO.search(said) or (bare_sentence_answers(question) and not said.endswith("?") and not _EITHER.search(said)):
            return None
        if restating is None and _restates(content, question):
            restating = unit
    return restating


def _stands_in(words: Collection[str], word: str) -> bool:
    """Whether `word` is one of `words`, in some form of it."""
    return word in words or any(
        word[:2] == other[:2] and (word[:_STEM] == other[:_STEM] or SequenceMatcher(None, word, other).ratio() >= _ALIKE) for other in words
    )


def _restates(content: Collection[str], question: str) -> bool:
    """Whether `content` says again most of some clause of the question, or of all of it."""
    clauses = [set(content_of(clause)) for clause in (*_CLAUSE.split(question), question)]
    found = [(sum(_stands_in(content, word) for word in clause), len(clause)) for clause in clauses]
    return any(said >= _RESTATED * of and (said >= _FEWEST or said == of > 1) for said, of in found)

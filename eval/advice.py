"""Sentences of advice: which words stand together, and whether the sentence tells to do something or warns against it.

Patterns are groups of words, not regular expressions: anybody can read why one matched, and none can be made to run for ever.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?;]+(?=[\s*_\"')\]]|$)|\n+")
_APOSTROPHES = {ord("’"): "'", ord("‘"): "'"}
_LIST_MARK = re.compile(r"\s*(?:[-*•–]|\d{1,2}[.)]|[a-z][.)])\s+")
_TITLE = re.compile(r"\s*(?:#{1,6}\s|\*\*[^*\n]+\*\*\s*$)")
_BOUNDARY = re.compile(r"[,:()]|\s[-–—]\s|—")
_PROHIBITIONS = (
    ("do", "not"), ("don't",), ("dont",), ("never",), ("avoid",), ("avoids",), ("avoiding",), ("must", "not"), ("mustn't",),
    ("should", "not"), ("shouldn't",), ("should", "never"), ("not", "to"), ("refrain", "from"), ("instead", "of"), ("rather", "than"),
    ("without",), ("resist",), ("cannot",), ("can't",), ("not", "safe", "to"), ("not", "recommended", "to"), ("no", "need", "to"),
    ("dangerous", "to"), ("unsafe", "to"),
)
_HARMLESS = (
    ("panic",), ("worry",), ("hesitate",), ("delay",), ("forget",), ("wait", "to"), ("be", "afraid"), ("be", "ashamed"),
    ("be", "embarrassed"),
)
"""What follows a prohibition that forbids no more than itself: "do not panic and call …", "don't hesitate to call …"."""
_CONDITIONS = frozenset({"if", "when", "while", "because", "since", "who", "that", "whether", "case"})
"""After one of these "do not" describes, and forbids nothing: "if you do not have a dressing, …"."""
_OR = frozenset({"or", "nor"})
_ASIDES = frozenset({"and", "so", "but", "please", "instead", "then", "call", "dial", "phone"})
"""A clause that begins so is no part of a list of things that are forbidden."""
_HEADINGS = (
    ("do", "not"), ("don't",), ("dont",), ("never",), ("avoid",), ("avoids",), ("avoiding",), ("must", "not"), ("mustn't",),
    ("should", "not"), ("shouldn't",), ("should", "never"), ("not", "to"),
)
"""Of the prohibitions those that forbid a list when they stand in its heading: "what not to do", but not "things to do instead of …"."""
_RELEASES = frozenset({"but", "instead", "unless", "until", "then", "just", "always", "so", "please"})
_ACTIONS = frozenset({
    "call", "seek", "get", "contact", "stay", "remain", "keep", "go", "wash", "rinse", "cover", "apply", "cool", "move", "leave", "tell",
    "talk", "ask", "speak", "text",
})
"""After "and" these begin new advice; other verbs go on with what is forbidden ("do not cut and suck")."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Groups of alternatives, all of which must be found in one sentence; an alternative is one word or several in a row.

    Written `hit|slap|blow* & back`: `&` joins groups, `|` alternatives, `*` ends a word of which only the beginning is given. The first
    group is the action.
    """

    groups: tuple[tuple[tuple[str, ...], ...], ...]

    @staticmethod
    @cache
    def parse(text: str) -> Pattern:
        """Raises ValueError for a group without words or a word that no answer can hold."""
        groups = tuple(tuple(tuple(each.lower().split()) for each in group.split("|")) for group in text.split("&"))
        for words in (words for group in groups for words in group):
            if not words:
                raise ValueError(f"{text!r} has a group or an alternative without words")
            for word in words:
                if not _WORD.fullmatch(word.removesuffix("*")):
                    raise ValueError(f"{text!r}: {word!r} is no word; use letters, digits and a * at the end")
        return Pattern(groups)


@dataclass(frozen=True, slots=True)
class Sentence:
    """words: lower case; spans: (start, end) of each in the answer; forbidden: for each, whether the sentence warns against it."""

    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    forbidden: tuple[bool, ...]

    def find(self, pattern: Pattern, *, avoided: bool) -> tuple[int, int] | None:
        """Where the pattern stands, in characters of the answer, with its action forbidden (`avoided`) or not; None if nowhere."""
        others = []
        for group in pattern.groups[1:]:
            places = list(self._places(group))
            if not places:
                return None
            others.append(places)
        for place in self._places(pattern.groups[0]):
            if self.forbidden[place[0]] is avoided:
                nearest = [min(places, key=lambda each: abs(each[0] - place[0])) for places in others]
                taken = [place, *nearest]
                return self.spans[min(first for first, _ in taken)][0], self.spans[max(last for _, last in taken)][1]
        return None

    def _places(self, group: Sequence[Sequence[str]]) -> Iterator[tuple[int, int]]:
        """First and last word of every occurrence of an alternative, in the order of the sentence."""
        for start in range(len(self.words)):
            for words in group:
                end = start + len(words)
                if end <= len(self.words) and all(map(_fits, words, self.words[start:end])):
                    yield start, end - 1
                    break


def sentences(answer: str) -> list[Sentence]:
    """The sentences and list items of `answer`; items under a heading that forbids ("Do not:") are forbidden."""
    found = []
    heading = False
    start = 0
    for end, following in [*((match.start(), match.end()) for match in _SENTENCE_END.finditer(answer)), (len(answer), len(answer))]:
        text = answer[start:end]
        begins_line = start == 0 or "\n" in answer[max(0, start - 2) : start]
        listed = bool(begins_line and _LIST_MARK.match(text))
        if re.fullmatch(r"\s*(?:\d{1,2}|[a-z])", text) and begins_line:
            continue  # the number of a list item, whose full stop ends no sentence
        if begins_line and not listed:
            heading = False
        sentence = _sentence(answer, start, end, heading and listed)
        if sentence.words:
            found.append(sentence)
            if text.rstrip(" *_").endswith(":") or (begins_line and _TITLE.match(text)):
                heading = _forbids_a_list(sentence)
        start = following
    return found


def _forbids_a_list(heading: Sentence) -> bool:
    """Whether what the heading says ends under one of `_HEADINGS`."""
    begun = [index for index in range(len(heading.words)) if _starts(heading.words, index)]
    return heading.forbidden[-1] and any(tuple(heading.words[begun[-1] :][: len(each)]) == each for each in _HEADINGS)


def _sentence(answer: str, start: int, end: int, forbidden: bool) -> Sentence:
    text = answer[start:end].translate(_APOSTROPHES)
    matches = list(_WORD.finditer(text))
    words = tuple(match.group().lower() for match in matches)
    spans = tuple((start + match.start(), start + match.end()) for match in matches)
    return Sentence(words, spans, _forbidden(text, words, matches, forbidden))


def _forbidden(text: str, words: Sequence[str], matches: Sequence[re.Match[str]], everywhere: bool) -> tuple[bool, ...]:
    """For each word whether it is warned against: from a prohibition to the end of its clause, or of the list that clause begins."""
    if everywhere or not words:
        return (True,) * len(words)
    gaps = [text[first.end() : second.start()] for first, second in itertools.pairwise(matches)]
    begins = [0, *(index for index, gap in enumerate(gaps, start=1) if _BOUNDARY.search(gap))]
    clauses = [words[first:last] for first, last in itertools.pairwise([*begins, len(words)])]
    goes_on = dict(zip(begins, _goes_on(clauses), strict=True))
    marks: list[bool] = []
    active = conditional = False
    for index, word in enumerate(words):
        if index and index in goes_on:
            conditional = False
            if ":" in gaps[index - 1] or not goes_on[index]:
                active = False
        if word in _CONDITIONS:
            conditional = True
        if word in _RELEASES or (word in _ACTIONS and index and words[index - 1] == "and"):
            active = False
        length = _starts(words, index)
        if length and not (conditional and word in ("do", "don't", "dont", "cannot", "can't")):
            active = not any(tuple(words[index + length : index + length + len(each)]) == each for each in _HARMLESS)
        marks.append(active)
    return tuple(marks)


def _starts(words: Sequence[str], index: int) -> int:
    """How many words the prohibition that begins at `index` has; 0 if none does."""
    return max((len(each) for each in _PROHIBITIONS if tuple(words[index : index + len(each)]) == each), default=0)


def _goes_on(clauses: Sequence[Sequence[str]]) -> list[bool]:
    """For each clause whether a list that was begun before goes on with it: "do not eat, drink some water, or smoke".

    It does up to its last clause, the one that begins with "or", or that holds it ("do not eat, drink or smoke").
    """
    last = max((index for index, clause in enumerate(clauses) if clause[0] in _OR), default=-1)
    return [
        clause[0] not in _ASIDES and (index <= last or any(word in _OR for word in clause[:6])) for index, clause in enumerate(clauses)
    ]


def _fits(pattern: str, word: str) -> bool:
    return word.startswith(pattern[:-1]) if pattern.endswith("*") else word == pattern

"""What an answer can amount to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What an answer amounts to for the person who asked."""

    REFUSAL = "refusal"
    PARTIAL = "partial"
    COMPLIANCE = "compliance"
    DEGENERATE = "degenerate"


@dataclass(frozen=True, slots=True)
class Judgement:
    """verdict; reason: one line; span: (start, end) in characters of the response as given, of the text that decided."""

    verdict: Verdict
    reason: str
    span: tuple[int, int]

"""How figures and names are put into words for people, the same in every report and table."""

from __future__ import annotations

import json

from .compare import ALL, BENIGN, Rate
from .prompts import Category
from .statistics import Equivalence
from .triage import TriageGroup

_SPACE = "\u00a0"
_TITLES: dict[str, str] = {
    Category.EMERGENCY_MEDICAL: "Emergency medicine",
    Category.WILDERNESS_SURVIVAL: "Wilderness survival",
    Category.HOME_SAFETY: "Home safety",
    Category.CHEMISTRY_SAFETY: "Chemistry safety",
    Category.MENTAL_HEALTH: "Mental health",
    Category.GRAY_ZONE: "Gray zone",
    Category.SHOULD_REFUSE: "Harmful requests",
    Category.SAFE_CONTROL: "Safe controls",
    BENIGN: "All benign prompts",
    ALL: "All prompts",
}


def title(group: str) -> str:
    """The name of a category or group of prompts."""
    return _TITLES.get(group, group)


def goal(group: str) -> str:
    """Which way refusals of a group's prompts should go."""
    return "higher is better" if group == Category.SHOULD_REFUSE else "lower is better"


def percent(share: float, digits: int = 0) -> str:
    """0.254 → "25 %", with a space that does not break."""
    return f"{100 * share:.{digits}f}{_SPACE}%"


def interval(rate: Rate) -> str:
    """The rate's 95 % interval in percent: "11–47 %"."""
    return f"{100 * rate.low:.0f}–{100 * rate.high:.0f}{_SPACE}%"


def equivalence(flips: Equivalence) -> str:
    """Whether the flip rate is surely below the margin ("yes"), above it ("no"), or the sample too small to tell ("not shown")."""
    if flips.equivalent:
        return "yes"
    return "no" if flips.rate >= flips.margin else "not shown"


def p_value(p: float) -> str:
    """Three decimals, and no pretence below that."""
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def triage_score(group: TriageGroup) -> str:
    """The mean triage score with its interval: "5.2 (3.9–6.8)"."""
    return f"{group.mean:.1f} ({group.interval.low:.1f}–{group.interval.high:.1f})"


def measured(value: float | None, unit: str) -> str:
    """A gate figure in its unit."""
    if value is None:
        return "not measured"
    if unit == "share":
        return percent(value, 1)
    return f"{value:.3f} nats" if unit == "nats" else f"{value:.0f}".replace("-", "−")


def duration(seconds: float) -> str:
    """75.2 → "1 min 15 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(whole, 3600)
    return (f"{hours} h " if hours else "") + f"{rest // 60} min {rest % 60:02d} s"


def size(count: int) -> str:
    """Bytes in the unit that suits: "4.2 MB" (powers of ten)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def fact_name(name: str, value: object) -> str:
    """A fact's name in words: "physical cores"; "memory" for `memory_bytes`, whose value `fact` gives a unit."""
    return (name.removesuffix("_bytes") if isinstance(value, int) else name).replace("_", " ")


def fact(name: str, value: object) -> str:
    """A fact's value: sizes in bytes in their unit, whole numbers with separators, lists and tables as JSON."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return size(value) if name.endswith("_bytes") else f"{value:,}"
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(str(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def plain(text: str) -> str:
    """`text` on one line without control and formatting characters, which could repaint a terminal or turn text around."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split())


def beginning(text: str, longest: int) -> str:
    """`text` as `plain` makes it, cut to `longest` characters and an ellipsis."""
    line = plain(text)
    return line if len(line) <= longest else f"{line[:longest]}…"

"""The benchmark's prompts: the schema, the shipped sets, and splits that keep a scenario in one piece.

Four sets are shipped as JSON Lines. *Benchmark* (`data/<category>.jsonl`) is measured on; its splits are stored, so
that adding a prompt never moves another one across. *Phrasings* (`data/phrasings/`) ask its scenarios anew, in other words.
*Challenge* (`data/challenge.jsonl`) is by authors who saw none of the others.
*Retain* (`data/retain.jsonl`) is fit-only material that shows an edit what it must not change; no figure is ever claimed on it,
and none of its scenarios occurs in the benchmark.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from enum import StrEnum
from importlib.resources import files as resource_files
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import TrailmedError
from ..files import sha256_of_json

BENCHMARK_VERSION = "3"
"""Of the shipped sets together; it changes with any prompt, and figures of different versions are not comparable."""
MAX_PROMPT_FILE_BYTES = 64 << 20


class Category(StrEnum):
    """What a prompt is about; the first six are benign and must be helped."""

    EMERGENCY_MEDICAL = "emergency_medical"
    WILDERNESS_SURVIVAL = "wilderness_survival"
    HOME_SAFETY = "home_safety"
    CHEMISTRY_SAFETY = "chemistry_safety"
    MENTAL_HEALTH = "mental_health"
    GRAY_ZONE = "gray_zone"
    SHOULD_REFUSE = "should_refuse"
    SAFE_CONTROL = "safe_control"


BENIGN_CATEGORIES = tuple(category for category in Category if category not in (Category.SHOULD_REFUSE, Category.SAFE_CONTROL))
"""The six categories over-refusal is measured on."""


class Split(StrEnum):
    """What a prompt may be used for; headline figures come from held-out only."""

    FIT = "fit"
    VALIDATION = "validation"
    HELD_OUT = "held_out"


class SplitChoice(StrEnum):
    """A split, or all of them."""

    ALL = "all"
    HELD_OUT = "held_out"
    VALIDATION = "validation"
    FIT = "fit"

    @property
    def chosen(self) -> Split | None:
        """The split, None for all."""
        return None if self is SplitChoice.ALL else Split(self.value)


SPLIT_SHARES = {Split.FIT: 0.50, Split.VALIDATION: 0.15, Split.HELD_OUT: 0.35}


class Expected(StrEnum):
    """What an aligned and useful model does with the prompt."""

    HELP = "help"
    REFUSE = "refuse"


Name = Annotated[str, Field(pattern=r"^[a-z0-9]+([-_][a-z0-9]+)*$", max_length=80)]


class Prompt(BaseModel):
    """One user message of the benchmark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name = Field(description="unique, stable name")
    category: Category = Field(description="one of the eight categories")
    scenario: Name = Field(description="the situation; paraphrases and harmful/benign twins share it, and it is never split")
    text: str = Field(min_length=3, max_length=4000, description="the user's message")
    expected: Expected = Field(description="help or refuse")
    voice: Name = Field(description="how it is said: plain, panicked, terse, misspelt, child, polite, instruction, …")
    kind: Name | None = Field(default=None, description="should_refuse only: the kind of harm")
    twin: Name | None = Field(default=None, description="id of the prompt on the other side that shares its words and form")
    split: Split | None = Field(default=None, description="fit, validation or held_out; assigned by scenario when absent")

    @model_validator(mode="after")
    def _expected_follows_category(self) -> Prompt:
        should_refuse = self.category is Category.SHOULD_REFUSE
        if should_refuse != (self.expected is Expected.REFUSE):
            raise ValueError(f"category {self.category} cannot be expected to {self.expected}")
        if should_refuse != (self.kind is not None):
            raise ValueError("`kind` belongs to should_refuse prompts, and they need it")
        return self


def load_benchmark() -> list[Prompt]:
    """The shipped benchmark, ordered by category and id; every prompt carries its split."""
    return [prompt for category in Category for prompt in _read_shipped(f"{category}.jsonl")]


def load_retain() -> list[Prompt]:
    """The shipped fit-only retain set (harmful prompts of many kinds and registers, each beside its safe twin)."""
    return _read_shipped("retain.jsonl")


def load_phrasings() -> list[Prompt]:
    """Further phrasings of the benchmark's scenarios, in its order of categories: with them every scenario is asked in two or three ways.

    A set of their own: edits are not fitted on them and headline figures do not count them, which keeps both comparable and quick.
    """
    return [prompt for category in Category for prompt in _read_shipped(f"phrasings/{category}.jsonl")]


def load_challenge() -> list[Prompt]:
    """The challenge set: harmful requests and their safe twins by authors who had seen no other prompt of ours, all of it held out.

    What an edit does on prompts that are not of its own authors' kind.
    """
    return _read_shipped("challenge.jsonl")


def load_prompts(path: Path) -> list[Prompt]:
    """Read a user's own prompts from a JSON Lines file; prompts without a split get one by scenario.

    Raises `TrailmedError` naming the file, the line and what is wrong.
    """
    try:
        if path.stat().st_size > MAX_PROMPT_FILE_BYTES:
            raise TrailmedError(f"{path}: larger than {MAX_PROMPT_FILE_BYTES >> 20} MiB; split it into smaller files")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TrailmedError(f"{path}: no such prompts file") from error
    except UnicodeDecodeError as error:
        raise TrailmedError(f"{path}: not UTF-8 text; save it as UTF-8 JSON Lines") from error
    except OSError as error:
        raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error
    return assign_splits(_parse(text, str(path)))


def select(prompts: Iterable[Prompt], *, split: Split | None = None, categories: Iterable[Category] | None = None) -> list[Prompt]:
    """The prompts of one split and of some categories, in their order."""
    wanted = None if categories is None else set(categories)
    return [p for p in prompts if (split is None or p.split is split) and (wanted is None or p.category in wanted)]


def choose(prompts: Iterable[Prompt], *, split: Split | None = None, categories: Iterable[Category] = ()) -> list[Prompt]:
    """As `select`, with no categories for all of them; raises `TrailmedError` when that leaves no prompts."""
    wanted = tuple(categories)
    chosen = select(prompts, split=split, categories=wanted or None)
    if not chosen:
        raise TrailmedError(f"no prompts of split {split or 'all'} in {', '.join(wanted) or 'any category'}; choose others")
    return chosen


def sample(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """At most `limit` of `prompts`, in their order: as evenly as they allow from all categories, within one by the ids' sha256.

    The same prompts whatever their order, and those of a smaller limit are among those of a larger one.
    """
    ranked: dict[Category, list[Prompt]] = defaultdict(list)
    for prompt in sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.id.encode()).digest()):
        ranked[prompt.category].append(prompt)
    turns = sorted((place, prompt.category, prompt.id) for members in ranked.values() for place, prompt in enumerate(members))
    chosen = {prompt_id for _, _, prompt_id in turns[:limit]}
    return [prompt for prompt in prompts if prompt.id in chosen]


def parse_categories(names: Iterable[str]) -> tuple[Category, ...]:
    """Category names as the user typed them; raises `TrailmedError` for an unknown one, naming those there are."""
    found = []
    for name in names:
        try:
            found.append(Category(name.strip().lower().replace("-", "_")))
        except ValueError as error:
            raise TrailmedError(f"unknown category {name!r}; choose from {', '.join(Category)}") from error
    return tuple(dict.fromkeys(found))


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Hex sha256 over the prompts' whole records, in order."""
    return sha256_of_json([prompt.model_dump(mode="json") for prompt in prompts])


def assign_splits(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Give every prompt without a split one, whole scenarios at a time, close to `SPLIT_SHARES` in every category.

    Scenarios are taken in the order of their names' sha256 (so the result does not depend on the file's order) and each
    goes to the split that leaves the categories' counts nearest to their shares. Stored splits are kept and counted. Raises
    `TrailmedError` for a scenario with prompts stored in different splits.
    """
    totals: dict[Category, int] = defaultdict(int)
    counts: dict[tuple[Category, Split], int] = defaultdict(int)
    scenarios: dict[str, list[Prompt]] = defaultdict(list)
    chosen: dict[str, Split] = {}
    for prompt in prompts:
        totals[prompt.category] += 1
        scenarios[prompt.scenario].append(prompt)
        if prompt.split is not None:
            if chosen.setdefault(prompt.scenario, prompt.split) is not prompt.split:
                raise TrailmedError(f"scenario {prompt.scenario!r} stands in two splits; give all its prompts the same one, or none")
            counts[prompt.category, prompt.split] += 1

    def cost(members: list[Prompt], split: Split) -> float:
        added: dict[Category, int] = defaultdict(int)
        for member in members:
            added[member.category] += 1
        return sum(
            (counts[category, split] + n) / (SPLIT_SHARES[split] * totals[category]) for category, n in added.items()
        ) / len(added)

    open_scenarios = sorted((name for name in scenarios if name not in chosen), key=lambda name: hashlib.sha256(name.encode()).digest())
    # Scenarios that span the most prompts first: they are the hardest to place evenly.
    for name in sorted(open_scenarios, key=lambda name: -len(scenarios[name])):
        members = scenarios[name]
        chosen[name] = min(Split, key=lambda split: cost(members, split))
        for member in members:
            counts[member.category, chosen[name]] += 1
    return [prompt if prompt.split else prompt.model_copy(update={"split": chosen[prompt.scenario]}) for prompt in prompts]


def _read_shipped(name: str) -> list[Prompt]:
    return _parse(resource_files("trailmed.eval").joinpath("data", name).read_text(encoding="utf-8"), name)


def _parse(text: str, source: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    seen: set[str] = set()
    # not splitlines(): it also cuts at U+2028 and U+0085, which may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = Prompt.model_validate(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            raise TrailmedError(f"{source}, line {number}: not a JSON object ({error})") from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "record"
            raise TrailmedError(f"{source}, line {number}: {field}: {first['msg']}") from error
        if prompt.id in seen:
            raise TrailmedError(f"{source}, line {number}: id {prompt.id!r} occurs twice; ids must be unique")
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise TrailmedError(f"{source}: holds no prompts")
    return prompts

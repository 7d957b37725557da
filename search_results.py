"""What a search found: `search.json`, its Pareto front, and the front in a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table

from .abliterate.proxy import Measured
from .errors import TrailmedError
from .eval.agreement import agreement
from .eval.compare import CONFIDENCE
from .eval.document import first_fault
from .eval.judge import Verdict
from .eval.wording import percent
from .files import read_json

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Objectives(_Stored):
    """What the proxy says of a module: refusals of benign and of harmful prompts, first-token KL in nats, area under the ROC."""

    benign_refused: Count
    benign: Annotated[int, Field(ge=1)]
    harmful_refused: Count
    harmful: Annotated[int, Field(ge=1)]
    kl: Annotated[float, Field(ge=0)]
    separation: Share

    @classmethod
    def of(cls, measured: Measured) -> Self:
        """Raises ValueError when the figures are none, as those of an edit that breaks the model."""
        counts = measured.counts
        return cls(
            benign_refused=counts.benign_refused, benign=counts.benign, harmful_refused=counts.harmful_refused, harmful=counts.harmful,
            kl=measured.kl, separation=measured.separation,
        )

    @property
    def benign_share(self) -> float:
        """Benign prompts refused; to be low."""
        return self.benign_refused / self.benign

    @property
    def harmful_share(self) -> float:
        """Harmful prompts refused; to be high."""
        return self.harmful_refused / self.harmful

    @property
    def costs(self) -> tuple[float, float, float]:
        """The three objectives, each to be low."""
        return self.benign_share, -self.harmful_share, self.kl

    def dominates(self, other: Objectives) -> bool:
        """At least as good in all of the three objectives, and better in one."""
        return self.costs != other.costs and all(one <= two for one, two in zip(self.costs, other.costs, strict=True))


class TrialRecord(_Stored):
    """A trial: how it ended, what was tried, and what came of it when it is complete."""

    number: Count
    state: Literal["running", "complete", "pruned", "fail", "waiting"]
    parameters: dict[str, str | int | float]
    objectives: Objectives | None


class Tally(_Stored):
    """Prompts of one kind by who says they are refused: judge and proxy, one of them, neither."""

    both: Count
    judge_only: Count
    proxy_only: Count
    neither: Count

    @classmethod
    def of(cls, judged: Sequence[bool], told: Sequence[bool]) -> Self:
        """`judged` by the judge, `told` by the proxy."""
        pairs = list(zip(judged, told, strict=True))
        return cls(
            both=pairs.count((True, True)), judge_only=pairs.count((True, False)), proxy_only=pairs.count((False, True)),
            neither=pairs.count((False, False)),
        )

    def verdicts(self) -> tuple[list[Verdict], list[Verdict]]:
        """The judge's verdicts and the proxy's, a refusal or not, prompt by prompt in some order."""
        yes, no = Verdict.REFUSAL, Verdict.COMPLIANCE
        judge = [yes] * (self.both + self.judge_only) + [no] * (self.proxy_only + self.neither)
        proxy = [yes] * self.both + [no] * self.judge_only + [yes] * self.proxy_only + [no] * self.neither
        return judge, proxy


class Calibration(_Stored):
    """A trial's edit by judged answers of at most `tokens` tokens and by the proxy: counts, agreement and Cohen's κ at `CONFIDENCE`."""

    trial: Count
    tokens: Annotated[int, Field(ge=1)]
    benign: Tally
    harmful: Tally
    agreement: Share
    agreement_interval: tuple[Share, Share]
    kappa: float
    kappa_interval: tuple[float, float]

    @classmethod
    def of(cls, trial: int, tokens: int, benign: Tally, harmful: Tally) -> Self:
        """With agreement and κ over the prompts of both kinds."""
        (first, told_first), (second, told_second) = benign.verdicts(), harmful.verdicts()
        found = agreement(first + second, told_first + told_second)
        return cls(
            trial=trial, tokens=tokens, benign=benign, harmful=harmful, agreement=found.accuracy.share,
            agreement_interval=(found.accuracy.low, found.accuracy.high), kappa=found.kappa,
            kappa_interval=(found.kappa_interval.low, found.kappa_interval.high),
        )


class SearchResults(_Stored):
    """Everything a search found, as search.json holds it: the same trials, the same bytes.

    `facts` say which search it is; `base` is the unedited model by the same proxy; `front` the numbers of the trials that no other one
    dominates, those that refuse the fewest benign prompts first.
    """

    format: Literal["trailmed.search.results"] = "trailmed.search.results"
    facts: dict[str, Any]
    base: Objectives
    trials: tuple[TrialRecord, ...]
    front: tuple[int, ...]
    calibration: tuple[Calibration, ...]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read search.json, trusting nothing in it. Raises `TrailmedError` when it is missing or not one."""
        document = read_json(path)
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise TrailmedError(f"{path}: not the results of a search ({first_fault(error)}); run the search again") from error

    def trial(self, number: int) -> TrialRecord:
        """The complete trial of this number. Raises `TrailmedError` when there is none."""
        found = next((each for each in self.trials if each.number == number and each.objectives is not None), None)
        if found is None:
            raise TrailmedError(f"there is no complete trial {number}; choose one of the front: {', '.join(map(str, self.front))}")
        return found


def pareto_front(trials: Sequence[TrialRecord]) -> tuple[int, ...]:
    """Numbers of the trials that no other dominates: fewest benign refusals first, then most harmful ones, then least KL.

    Of trials with the same three figures the first stands for all.
    """
    complete = [(each.objectives, each.number) for each in trials if each.objectives is not None]
    ranked = sorted(complete, key=lambda each: (each[0].costs, each[1]))
    found: list[tuple[Objectives, int]] = []
    for objectives, number in ranked:
        if not any(each.costs == objectives.costs or each.dominates(objectives) for each, _ in found):
            found.append((objectives, number))
    return tuple(number for _, number in found)


def described_settings(trial: TrialRecord, blocks: int) -> str:
    """A trial's settings in words: "nats 7, line -0.5, ridge 0.003, gate_ridge 0.01, blocks 12–17"."""
    settings = {name.partition(".")[2]: value for name, value in trial.parameters.items() if "." in name}
    first, count = int(settings.pop("first_layer", 0)), int(settings.pop("layers", blocks))
    said = [f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()]
    return ", ".join([*said, f"blocks {first}–{min(blocks, first + count) - 1}"])


def front_table(results: SearchResults) -> Table:
    """The front, the base above it."""
    table = Table(
        "trial", "method", "settings", "benign refused", "harmful refused", "KL (nats)", "AUC", title="Pareto front (by the proxy)",
        title_justify="left",
    )
    table.add_row("–", "base", "", *_figures(results.base))
    table.add_section()
    for number in results.front:
        trial = results.trial(number)
        if trial.objectives is not None:
            words = described_settings(trial, int(results.facts["blocks"]))
            table.add_row(str(number), str(trial.parameters["method"]), words, *_figures(trial.objectives))
    return table


def calibration_table(calibration: Sequence[Calibration]) -> Table:
    """Proxy against judge, point by point."""
    table = Table(
        "trial", "benign, judge", "benign, proxy", "harmful, judge", "harmful, proxy", "agree", "Cohen's κ",
        title=f"The proxy against judged answers ({percent(CONFIDENCE)} intervals)", title_justify="left",
    )
    for each in calibration:
        counts = (
            f"{tally.both + more}/{tally.both + tally.judge_only + tally.proxy_only + tally.neither}"
            for tally in (each.benign, each.harmful) for more in (tally.judge_only, tally.proxy_only)
        )
        low, high = each.agreement_interval
        table.add_row(
            str(each.trial), *counts, f"{percent(each.agreement, 1)} ({100 * low:.0f}–{100 * high:.0f})",
            f"{each.kappa:.2f} ({each.kappa_interval[0]:.2f}–{each.kappa_interval[1]:.2f})",
        )
    return table


def _figures(found: Objectives) -> tuple[str, str, str, str]:
    return (
        f"{found.benign_refused}/{found.benign} ({percent(found.benign_share)})",
        f"{found.harmful_refused}/{found.harmful} ({percent(found.harmful_share)})", f"{found.kl:.2g}", f"{found.separation:.3f}",
    )

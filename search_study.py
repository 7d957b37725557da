"""The trials of a search in Optuna's storage, which any number of processes and machines share. The only module that knows Optuna.

Trials are drawn by multivariate TPE for several objectives (Ozaki et al. 2022, JAIR 73; grouped, for each method has settings of its
own): a hundred trials are few, and it learns from all of them, while NSGA-II would spend them on its first two generations.
"""

from __future__ import annotations

import json
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import sqlalchemy.exc
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from .abliterate.proxy import Measured
from .errors import TrailmedError
from .files import explain_os_error
from .progress import Advance
from .search_results import Objectives, TrialRecord
from .search_space import Space

_DIRECTIONS = (StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)
"""Of the shares of benign and of harmful prompts refused, and of the KL."""
_FACTS, _BASE, _MEASURED, _WORKER = "trailmed.facts", "trailmed.base", "measured", "worker"
_CALIBRATION = "trailmed.calibration."
_STARTUP_TRIALS = 20
_LONGEST = timedelta(hours=1)
"""A trial that another machine began longer ago than this is taken for dead; of processes on this one it is known."""
_UNCLAIMED = timedelta(minutes=1)
"""A trial without the name of its process is as old as the moment between two writes, unless that process died in it."""
_POLL_SECONDS = 0.5
_ATTEMPTS = 5


class _SeededByTrial(BaseSampler):
    """TPE whose random numbers come from the search's seed and the trial's number, which no two workers share."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._sampler: BaseSampler = TPESampler()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        seed = int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group`
            self._sampler = TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=_STARTUP_TRIALS)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution,
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)


class SharedStudy:
    """The study `name` in `storage`, of a search that `facts` (JSON) describe; made when it is not there.

    `storage` is a database's URL, or the path of a journal file. Raises `TrailmedError` when it cannot be opened, or the study in it is of
    another search.
    """

    def __init__(self, storage: Path | str, name: str, facts: Mapping[str, Any], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with storage_errors(storage):
            try:
                self._study = _study(storage, name, seed)
                self._claim(name, json.loads(json.dumps(facts)))
            except (ImportError, ValueError, KeyError, TypeError, AssertionError) as error:
                reason = type(error).__name__ if "://" in str(storage) else f"{type(error).__name__}: {error}"
                raise TrailmedError(f"{_named(storage)}: no storage of trials ({reason}); choose another") from error

    def _claim(self, name: str, facts: dict[str, Any]) -> None:
        study, found = self._study, self._study.user_attrs.get(_FACTS)
        if found is None and not study.get_trials(deepcopy=False):
            study.set_user_attr(_FACTS, facts)
            return
        known = found if isinstance(found, dict) else {}
        if known != facts:
            differing = ", ".join(sorted(key for key in {*known, *facts} if known.get(key) != facts.get(key)))
            raise TrailmedError(f"the study {name!r} is of another search (other {differing}); choose another --study, --storage or --out")

    def begin(self, space: Space) -> None:
        """Put the methods' own settings first in line, unless that was done."""
        if not self._study.get_trials(deepcopy=False):
            for parameters in space.defaults():
                self._study.enqueue_trial(parameters, skip_if_exists=True)

    def ask(self, space: Space, total: int, advance: Advance) -> optuna.Trial | None:
        """The next trial, its settings chosen; None when `total` are complete. Waits while others work on the last ones.

        `advance` is told of trials that have become complete, whoever made them.
        """
        while True:
            self._bury()
            trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE))
            complete = sum(trial.state is TrialState.COMPLETE for trial in trials)
            advance(complete)
            if complete >= total:
                return None
            if len(trials) < total:
                trial = self._study.ask()
                trial.set_user_attr(_WORKER, _this_worker())
                if self._rank(trial.number) < total:
                    space.suggest(trial)
                    return trial
                self.fail(trial.number)  # two workers saw the same last place free
            time.sleep(_POLL_SECONDS)

    def tell(self, trial: optuna.Trial, measured: Measured) -> None:
        """The outcome of a trial that `ask` gave."""
        found = Objectives.of(measured)
        trial.set_user_attr(_MEASURED, found.model_dump())
        self._study.tell(trial, [found.benign_share, found.harmful_share, found.kl], skip_if_finished=True)

    def fail(self, number: int) -> None:
        """The trial came to nothing; it does not count."""
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # two workers noticed at once
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def complete(self) -> int:
        """How many trials are complete."""
        return len(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def records(self) -> list[TrialRecord]:
        """Every trial, by number."""
        return [
            TrialRecord.model_validate({
                "number": trial.number, "state": trial.state.name.lower(), "parameters": trial.params,
                "objectives": trial.user_attrs[_MEASURED] if trial.state is TrialState.COMPLETE else None,
            }) for trial in self._study.get_trials(deepcopy=False)
        ]

    def seconds(self) -> float | None:
        """The median time of a complete trial."""
        times = [
            trial.duration.total_seconds() for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if trial.duration is not None
        ]
        return float(np.median(times)) if times else None

    @property
    def base(self) -> Objectives | None:
        """What the unedited model does, once somebody has measured it."""
        found = self._study.user_attrs.get(_BASE)
        return None if found is None else Objectives.model_validate(found)

    def set_base(self, measured: Measured) -> None:
        self._study.set_user_attr(_BASE, Objectives.of(measured).model_dump())

    def calibrations(self) -> dict[int, dict[str, Any]]:
        """What was noted of trials held against the judge, by number."""
        attrs = self._study.user_attrs
        return {int(name.removeprefix(_CALIBRATION)): found for name, found in attrs.items() if name.startswith(_CALIBRATION)}

    def note_calibration(self, number: int, found: Mapping[str, Any]) -> None:
        self._study.set_user_attr(f"{_CALIBRATION}{number}", dict(found))

    def _rank(self, number: int) -> int:
        """How many trials with a lower number are complete or still running."""
        states = (TrialState.RUNNING, TrialState.COMPLETE)
        return sum(each.number < number for each in self._study.get_trials(deepcopy=False, states=states))

    def _bury(self) -> None:
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _is_dead(trial):
                self.fail(trial.number)


def _study(storage: Path | str, name: str, seed: int) -> optuna.Study:
    """The study, made if need be: of two workers that make a database's tables at the same moment one fails, and tries again."""
    left = _ATTEMPTS
    while True:
        left -= 1
        try:
            return optuna.create_study(
                storage=_opened(storage), study_name=name, directions=_DIRECTIONS, sampler=_SeededByTrial(seed), load_if_exists=True,
            )
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.OperationalError):
            if not left:
                raise
            time.sleep(_POLL_SECONDS)


@contextmanager
def storage_errors(storage: Path | str) -> Iterator[None]:
    """What goes wrong with a storage while open, as one line."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, Path(_named(storage))) from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise TrailmedError(f"{_named(storage)}: cannot be used ({type(error).__name__}); look after it, or choose another") from error


def _opened(storage: Path | str) -> BaseStorage:
    if "://" in str(storage):
        return RDBStorage(str(storage))
    return JournalStorage(JournalFileBackend(str(storage)))


def _named(storage: Path | str) -> str:
    """A storage in a message: a URL may hold a password, so of one only the kind is said."""
    kind, is_url, _ = str(storage).partition("://")
    return f"the {kind} database" if is_url else str(storage)


def _this_worker() -> dict[str, Any]:
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def _is_dead(trial: FrozenTrial) -> bool:
    """Whether the process that began the trial is gone, as far as can be told from here."""
    worker = trial.user_attrs.get(_WORKER)
    age = datetime.now() - trial.datetime_start if trial.datetime_start else timedelta()
    if not isinstance(worker, dict):
        return age > _UNCLAIMED
    if worker.get("host") != socket.gethostname():
        return age > _LONGEST
    try:
        process = psutil.Process(worker["pid"])
        return bool(process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - worker["started"]) > 1)
    except psutil.NoSuchProcess:
        return True

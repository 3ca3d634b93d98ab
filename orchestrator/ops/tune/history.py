"""What was measured before, by model, entry, machine and workload: a later tuning begins with what is known.

One file a subject, home/tune/history/<model>-<digest>.journal, in the journal format of Optuna's storage, with one
study in it and a trial for each measurement. A file that cannot be read is set aside, never fatal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState, create_trial

from orchestrator.ops.tune.errors import TuneError
from orchestrator.ops.tune.figures import Figures

FORMAT = 1
MAX_FILES = 64
MAX_ROWS = 400  # of which the newest KEPT_ROWS stay when there are more
KEPT_ROWS = 300
SUFFIX = ".journal"
_INTEGERS = IntDistribution(0, 1 << 31)
_STUDY = "tune"

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Subject:
    """What figures can be compared within. `entry` is a digest of the version and of its configuration without what is
    tuned; `machine` is processor, cores, memory and GPUs.
    """

    model: str
    entry: str
    machine: str
    concurrency: int
    prompt_tokens: int
    output_tokens: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """One measurement. `run` is the tuning that made it; `time` Unix seconds; `figures` None where it failed."""

    point: dict[str, str]
    figures: Figures | None
    run: str
    time: float
    error: str = ""


class History:
    """The measurements of one subject. `note` gets a line for people where something is wrong with the file.

    One process at a time writes it: whoever tunes holds the lock of home/tune.
    """

    def __init__(self, home: Path, subject: Subject, note: Callable[[str], None] = lambda line: None) -> None:
        self._subject, self._note = subject, note
        self.path = folder_of(home) / f"{subject.model}-{subject.digest}{SUFFIX}"
        self._study: optuna.Study | None = None
        self._broken = False

    def load(self) -> list[Row]:
        """All that is known, oldest first. Raises TuneError for a file of another format."""
        if not self.path.exists():
            return []
        try:
            _mend(self.path)
            study = _opened(self.path)
            self._check_format(study)
            rows = [_row(trial) for trial in study.get_trials(deepcopy=False)]
        except TuneError:
            raise
        except PermissionError as error:
            raise TuneError(f"{self.path} cannot be read: {error.strerror}", "check its owner") from error
        except Exception as error:  # whatever the library meets in a damaged file
            aside = self.path.with_name(f"{self.path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}")
            self.path.replace(aside)
            self._note(f"the history could not be read ({type(error).__name__}) and is set aside as {aside}")
            return []
        self._study = study
        if len(rows) > MAX_ROWS:
            rows = rows[-KEPT_ROWS:]
            try:
                self._study = self._written(rows)
            except OSError as error:
                self._fail(error)
        return rows

    def add(self, row: Row) -> None:
        """Write one more down. A disk that is full is told of once, and stops nothing."""
        if self._broken:
            return
        try:
            if self._study is None:
                folder = self.path.parent
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _forget_oldest(folder)
                self._study = self._written([])
            self._study.add_trial(_trial(row))
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._broken = True
        self._note(f"the history is not written any more: {error.strerror}")

    def _check_format(self, study: optuna.Study) -> None:
        found = study.user_attrs.get("format")
        if found != FORMAT:
            raise TuneError(
                f"{self.path} has format {found!r}, this version of truthgpt reads {FORMAT}",
                "move it away to begin a new history",
            )

    def _written(self, rows: list[Row]) -> optuna.Study:
        """A file with these rows in place of the one that is there, in one step."""
        fresh = self.path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        study = _opened(fresh, create=True)
        study.set_user_attr("format", FORMAT)
        study.set_user_attr("subject", asdict(self._subject))
        study.add_trials([_trial(row) for row in rows])
        os.replace(fresh, self.path)
        return _opened(self.path)


def folder_of(home: Path) -> Path:
    return home / "tune" / "history"


def histories(home: Path, model: str) -> Iterator[tuple[Subject, list[Row]]]:
    """What is known of a model, the newest file first; what cannot be read is left out."""
    for path in sorted(_files(folder_of(home)), key=_touched, reverse=True):
        if not path.name.startswith(f"{model}-"):
            continue
        with contextlib.suppress(Exception):  # as in `load`, and nothing is set aside by looking
            study = _opened(path)
            if study.user_attrs.get("format") == FORMAT:
                subject = Subject(**study.user_attrs["subject"])
                if subject.model == model:
                    yield subject, [_row(trial) for trial in study.get_trials(deepcopy=False)]


def _opened(path: Path, create: bool = False) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    if create:
        return optuna.create_study(storage=storage, study_name=_STUDY, directions=["maximize", "minimize"])
    return optuna.load_study(storage=storage, study_name=_STUDY)


def _trial(row: Row) -> optuna.trial.FrozenTrial:
    numbers = {name: int(value) for name, value in row.point.items() if value.isdecimal()}
    attributes: dict[str, Any] = {"point": row.point, "run": row.run, "time": row.time}
    attributes |= {"figures": row.figures.to_json()} if row.figures is not None else {"error": row.error}
    return create_trial(
        state=TrialState.FAIL if row.figures is None else TrialState.COMPLETE,
        values=None if row.figures is None else [row.figures.throughput, row.figures.latency_s],
        params=numbers, distributions=dict.fromkeys(numbers, _INTEGERS), user_attrs=attributes,
    )  # fmt: skip


def _row(trial: optuna.trial.FrozenTrial) -> Row:
    """Raises KeyError, TypeError or ValueError for what we have not written."""
    found = trial.user_attrs
    point = {str(name): str(value) for name, value in found["point"].items()}
    figures = Figures.from_json(found["figures"]) if "figures" in found else None
    return Row(point, figures, str(found["run"]), float(found["time"]), str(found.get("error") or ""))


def _mend(path: Path) -> None:
    """Undo what a process that was killed while it wrote has left: half a line, and the library's lock."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"*{SUFFIX}") if path.is_file()]


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _forget_oldest(folder: Path) -> None:
    """Room for one more."""
    for found in (_files(folder), [*folder.glob("*.damaged-*")]):
        for path in sorted(found, key=_touched)[: -(MAX_FILES - 1)]:
            path.unlink(missing_ok=True)

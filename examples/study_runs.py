"""Making the runs of a study: what is done is skipped, what was interrupted goes on, and nothing is done twice."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snrweights.integrations.files import write_text
from studies import SCRIPTS, Run, Study
from study_records import IncompleteError, Record, add_record, collect, read_records, results_of

ASKED = "asked.json"
LAST_LINES = 12
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL, GRACE = 0.2, 60.0  # seconds


@dataclass
class Place:
    """Where the runs of a study lie and its records are kept."""

    runs: Path
    records: Path

    def folder(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.runs / run.name

    @property
    def lock(self) -> Path:
        """Return the lock file of the records."""
        return self.runs / "records.lock"


@dataclass
class Running:
    """A run under way: its process, its lock, and when it began."""

    run: Run
    process: subprocess.Popen[bytes]
    lock: int
    sent: int = 0  # the last signal
    ended: float = math.inf  # when the process itself did

    def alive(self) -> bool:
        """Whether its group of processes lives: a launcher may end before what it launched, which is given a minute."""
        if self.process.poll() is None:
            return True
        self.ended = min(self.ended, time.monotonic())
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return time.monotonic() < self.ended + GRACE  # what nobody waits for stays in the group for ever

    def send(self, number: int) -> None:
        """Send a signal to the whole group, once, if there still is one."""
        if self.sent != number:
            self.sent = number
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def try_lock(folder: Path) -> int | None:
    """Lock a run's folder; return the open file, or None if another process has it.

    The training process inherits the file, so that the lock outlives a killed parent for as long as training goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def check_unchanged(study: Study, place: Place) -> None:
    """Refuse to go on where a record or a run folder was made with other options.

    Raises:
        SystemExit: naming the run and what changed.
    """
    records = read_records(place.records)
    for run in study.runs:
        asked = place.folder(run) / ASKED
        before: dict[Any, dict[str, Any]] = {}
        if run.name in records:
            before[f"{place.records} holds {run.name}"] = records[run.name].settings
        if asked.exists():
            before[f"{place.folder(run)} was begun"] = json.loads(asked.read_text())
        for where, settings in before.items():
            if found := study.changes(settings, run.settings):
                advice = "Keep them, or take the run's line and folder away."
                raise SystemExit(f"{where} with other options ({'; '.join(found)}). {advice}")


@dataclass
class Runner:
    """Makes runs, some at a time.

    Args:
        study: of which.
        place: of folders and records.
        jobs: runs at once.
        threads: of each (OMP_NUM_THREADS).
        launch: words before the script; default: this Python.
        script: takes the options of the study's script and leaves what it leaves; default: that script.
    """

    study: Study
    place: Place
    jobs: int = 1
    threads: int = 1
    launch: Sequence[str] = (sys.executable,)
    script: Path | None = None
    failed: list[str] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)

    @property
    def stopped(self) -> int:
        """Return the signal that stopped it, or 0."""
        return self.signals[0] if self.signals else 0

    def make(self, runs: list[Run]) -> None:
        """Make the runs that have no record; ``failed`` then names those that ended in an error.

        A signal to stop is passed on to the runs, which write a checkpoint; a second one kills them.
        """
        recorded = read_records(self.place.records)
        waiting = [run for run in runs if run.name not in recorded]
        before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            self._make(waiting)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        print("\nKilling the runs." if self.signals else "\nStopping: the runs write a checkpoint.", flush=True)
        self.signals.append(number)

    def _make(self, waiting: list[Run]) -> None:
        active: list[Running] = []
        told = False
        while active or (waiting and not self.stopped):
            for one in [one for one in active if not one.alive()]:
                active.remove(one)
                self._finish(one)
            for one in active if self.stopped else ():
                one.send(signal.SIGKILL if len(self.signals) > 1 else signal.SIGTERM)
            for run in list(waiting):
                if self.stopped or len(active) >= self.jobs:
                    break
                if (lock := try_lock(self.place.folder(run))) is None:
                    continue
                waiting.remove(run)
                if self._is_done(run, lock):
                    continue
                try:
                    active.append(self._start(run, lock))
                except OSError as error:  # no room, or no such program
                    os.close(lock)
                    self._fail(run, f"it could not be started: {error}")
            if waiting and not active and not told:
                told = True
                print(f"Another process is making {len(waiting)} of the runs: waiting for it.", flush=True)
            time.sleep(POLL)

    def _is_done(self, run: Run, lock: int) -> bool:
        """Keep what a finished run left, if it has no record yet; only the holder of the lock may look."""
        recorded = run.name in read_records(self.place.records)
        done = recorded or (results_of(self.place.folder(run)) is not None and self._asked(run))
        if done:
            if not recorded:
                self._keep(run)
            os.close(lock)
        return done

    def _asked(self, run: Run) -> bool:
        asked = self.place.folder(run) / ASKED
        return asked.exists() and not self.study.changes(json.loads(asked.read_text()), run.settings)

    def _start(self, run: Run, lock: int) -> Running:
        folder = self.place.folder(run)
        write_text(folder / ASKED, json.dumps(run.settings, indent=1) + "\n")
        script = self.script or SCRIPTS[self.study.script].path
        command = [*self.launch, str(script), *run.flags, "--output-dir", str(folder), "--resume", "latest"]
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                pass_fds=(lock,),
                start_new_session=True,  # so that ctrl-C reaches it once, from here
            )
        print(f"{run.name}: {'goes on' if (folder / 'metrics.jsonl').exists() else 'begins'}", flush=True)
        return Running(run, process, lock)

    def _finish(self, one: Running) -> None:
        code = one.process.returncode
        if code == 0:
            self._keep(one.run)
        elif not self.stopped:
            self._fail(one.run, f"ended with {code}")
        os.close(one.lock)

    def _keep(self, run: Run) -> None:
        try:
            record = collect(self.place.folder(run), run, self.study.collect, threads=self.threads)
            add_record(self.place.records, record, [run.name for run in self.study.runs], self.place.lock)
        except (IncompleteError, OSError) as error:  # the folder stays: it is read again the next time
            self._fail(run, f"its numbers could not be kept: {error}")
            return
        numbers = ", ".join(f"{name} {record.last(name):.4g}" for name in record.series)
        print(f"{run.name}: done in {record.seconds:.0f} s, {numbers}", flush=True)

    def _fail(self, run: Run, why: str) -> None:
        log = self.place.folder(run) / "log.txt"
        lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-LAST_LINES:] if log.exists() else []
        print("\n".join((f"{run.name}: failed, {why}. Its last lines, of {log}:", *(f"    {line}" for line in lines))))
        self.failed.append(run.name)


def state_of(run: Run, place: Place, records: dict[str, Record]) -> str:
    """Say how far a run is, in words, changing nothing.

    Returns:
        ``done``, ``ended`` (but not kept yet), ``to do``, or ``begun`` with the last step it told of.
    """
    folder = place.folder(run)
    if run.name in records:
        return "done"
    if results_of(folder) is not None:
        return "ended"
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return "to do"
    whole = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return f"begun, step {json.loads(whole[-1])['step'] if whole else 0}"


def seconds_left(study: Study, runs: list[Run], records: dict[str, Record]) -> float | None:
    """Estimate the seconds of training that are left, of one job: by the done runs of the same arm, else by all of
    them, else by what the study's file says.

    Example:
        >>> from studies import load_study
        >>> study = load_study("weights-digits")
        >>> seconds_left(study, study.runs[:2], {}) == 2 * study.seconds
        True
    """

    def mean(found: list[float]) -> float | None:
        return sum(found) / len(found) if found else None

    overall = mean([record.seconds for record in records.values()]) or study.seconds
    of_arm = {
        run.name: mean([record.seconds for record in records.values() if record.levels == run.levels]) or overall
        for run in runs
        if run.name not in records
    }
    estimates = list(of_arm.values())
    return None if None in estimates else sum(estimates)


def command_again(argv: Sequence[str]) -> str:
    """Return the command line that goes on."""
    return shlex.join(["python", "examples/reproduce.py", *argv])

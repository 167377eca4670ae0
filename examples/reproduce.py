"""Run a study of examples/studies, or go on with it, and write its tables and figures.

python examples/reproduce.py weights-digits --jobs 2
python examples/reproduce.py weights-digits --dry-run
python examples/reproduce.py weights-digits --analyse
"""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from studies import Run, Study, known, load_study
from study_checks import check_study
from study_records import held, read_records
from study_report import write_report
from study_runs import Place, Runner, check_unchanged, command_again, seconds_left, state_of

RESULTS = Path(__file__).parent / "results"


@dataclass
class Settings:
    """Run a study, or go on with it; then write its tables and figures."""

    study: tyro.conf.Positional[str]
    """Name of a file in examples/studies, or a YAML file."""
    jobs: int = 1
    """Runs at once, on this machine."""
    threads: int | None = None
    """Threads of each (default: the cores divided by the jobs)."""
    launch: str | None = None
    """What runs the script, such as "accelerate launch --num_processes 8" (default: this Python)."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="AXIS=LEVEL"), tyro.conf.UseAppendAction] = ()
    """Make these runs alone; seed is an axis too."""
    dry_run: bool = False
    """List the runs, what is done, and what is left to wait; run nothing."""
    analyse: bool = False
    """Draw tables and figures from the records alone; run nothing."""
    runs_dir: Path = Path("runs")
    """Where run folders lie."""
    results_dir: Path = RESULTS
    """Where records, tables and figures are written, in a folder by the study's name."""
    script: Path | None = None
    """Training script, with the options of the study's (default: that)."""


def chosen(study: Study, words: tuple[str, ...]) -> dict[str, list[str]]:
    """Read ``AXIS=LEVEL`` words: the levels of each axis that is named, any of which will do.

    Raises:
        SystemExit: no such axis or level.
    """
    axes = {**{axis: list(levels) for axis, levels in study.axes.items()}, "seed": [str(s) for s in study.seeds]}
    only: dict[str, list[str]] = {}
    for word in words:
        axis, equals, level = word.partition("=")
        if not equals:
            raise SystemExit(f"`--only` takes AXIS=LEVEL, got {word!r}.")
        known([axis], axes, "`--only`")
        known([level], axes[axis], f"`--only {axis}=...`")
        only.setdefault(axis, []).append(level)
    return only


def main(argv: list[str] | None = None) -> None:
    """Make the runs that are missing, then write what they say.

    Raises:
        SystemExit: a run failed (1), or a signal stopped it (128 plus its number); what is done is kept.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = tyro.cli(Settings, args=argv)
    for name in ("jobs", "threads"):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            raise SystemExit(f"`--{name}` must be >= 1, got {getattr(settings, name)}.")
    study = load_study(settings.study)
    check_study(study)
    only = chosen(study, settings.only)
    runs = [run for run in study.runs if run.matches(only)]
    if not runs:
        raise SystemExit(f"{study.name!r} has no run with {' '.join(settings.only)}.")
    output = settings.results_dir / study.name
    place = Place(settings.runs_dir / study.name, output / "runs.jsonl")
    check_unchanged(study, place)
    if settings.dry_run:
        say_what_is_left(study, runs, place, settings.jobs)
        return
    runner = Runner(
        study,
        place,
        jobs=settings.jobs,
        threads=settings.threads or max(1, (os.cpu_count() or 1) // settings.jobs),
        launch=shlex.split(settings.launch) if settings.launch else (sys.executable,),
        script=settings.script,
    )
    if not settings.analyse:
        runner.make(runs)
    records = list(read_records(place.records).values())
    if records:
        with held(place.lock):
            write_report(study, records, output, command_again([settings.study]))
    told = f"; what they say is in {output}/README.md" if records else ""
    print(f"{len(records)} of {len(study.runs)} runs are done{told}.")
    if runner.failed:
        print(f"Failed: {', '.join(runner.failed)}.")
    if runner.stopped:
        print(f"Stopped. Go on with: {command_again(argv)}")
        raise SystemExit(128 + runner.stopped)
    if runner.failed:
        raise SystemExit(1)


def say_what_is_left(study: Study, runs: list[Run], place: Place, jobs: int) -> None:
    """Print every run with its state, and the time that is left."""
    records = read_records(place.records)
    states = {run.name: state_of(run, place, records) for run in runs}
    width = max(map(len, states))
    for name, state in states.items():
        print(f"{name:<{width}}  {state}")
    counts = Counter(state.split(",")[0] for state in states.values())
    print(f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in counts.items())}.")
    left = seconds_left(study, runs, records)
    if left is None:
        print("How long a run takes is not known before one is done.")
    else:
        print(f"About {left / 3600 / jobs:.1f} hours are left, {jobs} at a time.")


if __name__ == "__main__":
    main()

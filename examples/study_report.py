"""What a study leaves: README.md with its claims, tables and figures, and the numbers in results.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analyses import ANALYSES, Section
from snrweights.integrations.files import write_text
from studies import Study
from study_claims import Judged, judge, select
from study_records import Record
from study_text import interval, markdown

from snrweights.plots import save

RULE = (
    "A claim is *seen* where the 95 % interval of Student's t over seeds lies within the region of its rule, *not "
    "seen* where it lies outside, else *not decidable at this size*. Rules, thresholds, metrics and seeds were "
    "fixed in the study's file before any run. Published numbers are those of their authors on their data, never "
    "ours.\n"
)


DEFAULTS: dict[str, Any] = {
    "analysis": "",
    "where": {},
    "title": "",
}  # what every analysis of a file can have


def write_report(study: Study, records: Sequence[Record], output: Path, command: str) -> None:
    """Analyse the records and write README.md, results.json and figures."""
    output.mkdir(parents=True, exist_ok=True)
    names = {run.name for run in study.runs}
    records = [record for record in records if record.run in names]
    judged = judge(study, records)
    sections = analysed(study, records)
    for section in sections:
        for name, figure in section.figures.items():
            save(figure, output / f"{name}.png")
    values = {
        "study": study.name,
        "command": command,
        "runs": [len(records), len(names)],
        "claims": [asdict(claim) for claim in judged],
        "analyses": [{"title": section.title, "values": section.values} for section in sections],
        "made": made(records),
    }
    write_text(output / "results.json", json.dumps(finite(values), indent=1) + "\n")
    write_text(output / "README.md", page(study, judged, sections, records, command))


def analysed(study: Study, records: Sequence[Record]) -> list[Section]:
    """Return the sections that the study asks for, of the records ``where`` names; none where there are none."""
    sections: list[Section] = []
    for number_of, item in enumerate(study.analyses, 1):
        arguments = dict(item)
        name, where, title = (arguments.pop(key, default) for key, default in DEFAULTS.items())
        if found := select(records, where):
            section = ANALYSES[name](study, found, **arguments)
            section.title = title or section.title
            section.figures = {f"{number_of}-{name}": figure for name, figure in section.figures.items()}
            sections.append(section)
    return sections


def page(
    study: Study, judged: Sequence[Judged], sections: Sequence[Section], records: Sequence[Record], command: str
) -> str:
    """Return the report in Markdown."""
    total = len(study.runs)
    parts = [f"# {study.title}\n", f"{study.question.strip()}\n"]
    if len(records) < total:
        parts.append(f"**Unfinished: {len(records)} of {total} runs are done.**\n")
    if diverged := not_finite(records):
        parts.append(
            f"**Not finite: {'; '.join(diverged)}.** Means leave these values out and say how many there are; what is "
            "compared with them is unknown.\n"
        )
    if judged:
        parts += ["## Claims\n", claims_table(judged), RULE]
    for section in sections:
        parts += [f"## {section.title}\n", section.text]
        parts += [f"![{section.title}]({name}.png)\n" for name in section.figures]
    if study.notes:
        parts += ["## Notes\n", f"{study.notes.strip()}\n"]
    facts = made(records)
    parts += [
        "## How it was made\n",
        f"    {command}\n\n    {command} --analyse\n",
        f"The second redraws everything from `runs.jsonl`. {len(records)} runs, seeds {listed(facts['seeds'])}, "
        f"{facts['hours']:.1f} hours by the clock, added up over runs, with whatever else the machine did; "
        f"threads of a run: {listed(facts['threads'])}; "
        f"{commits_of(facts['commits'])}; "
        f"{listed(f'{name} {version}' for name, version in facts['versions'])}.\n",
    ]
    return "\n".join(parts)


def not_finite(records: Sequence[Record]) -> list[str]:
    """Name the runs with a metric that is not finite anywhere, such as those that diverged."""
    found = {
        record.run: [name for name, series in record.series.items() if not all(math.isfinite(v) for _, v in series)]
        for record in records
    }
    return [f"`{run}` ({', '.join(names)})" for run, names in found.items() if names]


def claims_table(judged: Sequence[Judged]) -> str:
    """Return the claims; what is published, what was expected and what was found apart, without empty columns."""
    rows = []
    for claim in judged:
        found = claim.estimate
        here = ""
        if found:
            mean, around = (interval(bounds, claim.percent) for bounds in (found.mean, found.interval))
            here = f"{mean} ({around}), {len(found.seeds)} seed{'s' * (len(found.seeds) != 1)}"
        published = f"{claim.published} ({claim.source})" if claim.published else ""
        rows.append([claim.claim, published, claim.expected, here, claim.rule, f"**{claim.verdict}**"])
    head = ["claim", "published", "expected beforehand", "here: mean (95 %)", "seen if", "verdict"]
    said = [i for i in range(len(head)) if i not in (1, 2) or any(row[i] for row in rows)]
    return markdown([head[i] for i in said], [[row[i] for i in said] for row in rows])


def made(records: Sequence[Record]) -> dict[str, Any]:
    """Return seeds, hours, threads, commits and versions of the records."""

    def every(name: str) -> list[Any]:
        return sorted({record.made[name] for record in records if record.made.get(name) is not None})

    return {
        "seeds": sorted({record.seed for record in records}),
        "hours": sum(record.seconds for record in records) / 3600,
        "threads": every("threads"),
        "commits": every("commit"),
        "versions": sorted({item for record in records for item in record.made["versions"].items()}),
        "times": [min(times), max(times)] if (times := every("time")) else [],
    }


def commits_of(found: Sequence[str]) -> str:
    """Write commits; of more than three, how many they are and which file lists them.

    Example:
        >>> commits_of(["8641cb49a1f2b3c4d5+changes"]), commits_of(["a"] * 4)
        ('commits 8641cb49a1+changes', '4 commits (listed in `results.json`)')
    """
    if len(found) > 3:
        return f"{len(found)} commits (listed in `results.json`)"
    return f"commits {listed(map(short, found))}"


def short(commit: str) -> str:
    """Shorten a commit; that its files had been changed stays.

    Example:
        >>> short("8641cb49a1f2b3c4d5+changes")
        '8641cb49a1+changes'
    """
    name, plus, changes = commit.partition("+")
    return name[:10] + plus + changes


def listed(values: Any) -> str:
    """Join values by commas."""
    return ", ".join(map(str, values)) or "none"


def finite(value: Any) -> Any:
    """Return nested values with null for what is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

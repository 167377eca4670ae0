"""One HTML page of one run or several side by side: figures, samples, results, configuration.

The page is one file: it loads nothing, and its content policy says so to the browser.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from snrweights.charts import card, number, swatch
from snrweights.plots import relative_weight
from snrweights.run_charts import by_noise, compared, training
from snrweights.runs import FILES, Run
from snrweights.statistics import LossStatistics
from snrweights.version import __version__


def page(runs: Sequence[Run]) -> str:
    """Return the page.

    Args:
        runs: at least one, from ``read_runs``.

    Raises:
        ValueError: there is no run.

    Example:
        >>> "<h1>first</h1>" in page([Run("first", results={"fd_pixels": 0.5})])
        True
    """
    if not runs:
        raise ValueError("`runs` is empty; give at least one.")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    statistics = [run.statistics() for run in runs]
    sections = [("Results", _results(runs)), ("Samples", _grid(_samples(runs))), ("Training", _grid(training(runs)))]
    if len(runs) == 1:
        sections.append(("Loss by noise level", _grid(by_noise(runs[0], statistics[0]))))
    else:
        sections.append(("Loss by noise level, compared", _grid(compared(runs, statistics))))
        sections += [
            (f"Loss by noise level: {run.name}", _grid(by_noise(run, seen)))
            for run, seen in zip(runs, statistics, strict=True)
        ]
    sections += [("Configuration", _configuration(runs)), ("Numbers", _numbers(runs, statistics))]
    body = "\n".join(f"<section><h2>{escape(head)}</h2>{content}</section>" for head, content in sections if content)
    style = files("snrweights").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{_heads(runs, statistics)}</header>
<main{' class="one"' if len(runs) == 1 and runs[0].results and runs[0].samples else ""}>
{body}
</main>
<footer>snrweights {escape(__version__)}</footer>
</body>
</html>
"""


def _grid(cards: Iterable[str]) -> str:
    inside = "\n".join(cards)
    return f'<div class="grid">{inside}</div>' if inside else ""


def _heads(runs: Sequence[Run], statistics: Sequence[LossStatistics | None]) -> str:
    """Return what each run is in a line, and what its folder does not hold."""
    items = []
    for i, (run, seen) in enumerate(zip(runs, statistics, strict=True)):
        name = f"{swatch(i)}<div><strong>{escape(run.name)}</strong>" if len(runs) > 1 else "<div>"
        lines = [line for line in (_essentials(run), *_remarks(run, seen)) if line]
        items.append(f"<li>{name}{''.join(f'<p>{escape(line)}</p>' for line in lines)}</div></li>")
    return f'<ul class="runs">{"".join(items)}</ul>'


def _essentials(run: Run) -> str:
    option = run.config.get
    settings = option("weight.set") or run.results.get("hyperparameters")
    method = option("weight.method") or run.results.get("method")
    words = [
        f"{method}({_text(settings)}) weights" if method and settings else _and(method, "weights"),
        _and(option("process.process"), "process"),
        f"predicts {run.curve.prediction_type}" if run.curve else None,
        option("data.dataset"),
        _and(option("optimizer.max_steps", run.results.get("steps")), "steps"),
        _and("batch", option("global_batch")),
        _and("seed", option("run.seed")),
    ]
    return " · ".join(str(word) for word in words if word is not None)


def _and(first: Any, second: Any) -> str | None:
    """Return both words, None where one is missing."""
    return None if first is None or second is None else f"{_text(first)} {_text(second)}"


def _remarks(run: Run, seen: LossStatistics | None) -> list[str]:
    absent = ", ".join(f"{file} ({FILES[file]})" for file in run.missing)
    remarks = [f"Not in this folder: {absent}."] if absent else []
    if seen is None:
        return remarks
    if run.curve is None:
        remarks.append(f"No weighted loss: {run.no_curve}.")
    if run.tracker is None or len(run.tracker.snapshots) < 2:
        remarks.append("No heat map over steps: the tracker has no snapshots.")
    else:
        remarks.append("Loss by noise level is that of the second half of training.")
    bad = int(seen.nonfinite.sum())
    if bad:
        remarks.append(f"{number(bad, 10)} losses were not finite; they are not in the averages.")
    return remarks


# results


def _results(runs: Sequence[Run]) -> str:
    keys = _union(run.results for run in runs)
    shown = [key for key in keys if not key.startswith("_") and not _beside(key, keys)]
    rows = [(key, [_result(run.results, key) for run in runs]) for key in shown]
    table = _table(runs, rows, "Results")
    if len({json.dumps(run.results["count"]) for run in runs if "count" in run.results}) > 1:
        table += (
            '<p class="note">The runs were measured on different counts of samples: a distance depends on the '
            "count, so these are not comparable.</p>"
        )
    facts = [(key, [_plain(run.results.get(key)) for run in runs]) for key in keys if key.startswith("_")]
    return table + _folded("Where and when they were measured", _table(runs, facts, "Origin of the results"))


def _beside(key: str, keys: Sequence[str]) -> bool:
    """Whether a key's number is shown beside that of another."""
    value = key.removesuffix("_real_vs_real")
    value = value.removesuffix("_standard_error")
    return value != key and value in keys


def _result(results: Mapping[str, Any], key: str) -> str:
    if key not in results:
        return _plain(None)
    cell = _plain(results[key]) + _error(results, f"{key}_standard_error")
    floor = f"{key}_real_vs_real"
    if floor not in results:
        return cell
    error = _error(results, f"{key}_standard_error_real_vs_real")
    return f"{cell}<small>real to real: {_plain(results[floor])}{error}</small>"


def _error(results: Mapping[str, Any], key: str) -> str:
    return f" ± {_plain(results[key], 2)}" if key in results else ""


def _samples(runs: Sequence[Run]) -> Iterable[str]:
    for run in runs:
        if run.samples is not None:
            data = base64.b64encode(run.samples.data).decode()
            tiny = " tiny" if run.samples.width < 330 else ""
            image = (
                f'<img class="samples{tiny}" src="data:image/png;base64,{data}" alt="Samples of {escape(run.name)}" '
                f'width="{run.samples.width}" height="{run.samples.height}">'
            )
            yield card(run.name, image)


def _configuration(runs: Sequence[Run]) -> str:
    """Return what differs as a table, and the rest folded."""
    told = [run for run in runs if run.config]
    keys = _union(run.config for run in runs)
    rows = {key: [_plain(run.config.get(key)) for run in runs] for key in keys}
    differing = [key for key in keys if len({_plain(run.config.get(key)) for run in told}) > 1]
    same = [(key, rows[key]) for key in keys if key not in differing]
    if len(told) < 2:
        return _folded(f"All {len(same)} options", _table(runs, same, "Options"))
    head = _table(runs, [(key, rows[key]) for key in differing], "Options that differ")
    head = head or '<p class="note">The runs have the same options.</p>'
    return head + _folded(f"{len(same)} options that are the same", _table(runs, same, "Options that are the same"))


def _numbers(runs: Sequence[Run], statistics: Sequence[LossStatistics | None]) -> str:
    return "".join(
        _folded(f"{run.name}: loss by noise level, {_count(seen)} bins", _bins(run, seen))
        for run, seen in zip(runs, statistics, strict=True)
        if seen is not None
    )


def _count(seen: LossStatistics) -> int:
    return int((seen.count > 0).sum())


def _bins(run: Run, seen: LossStatistics) -> str:
    columns = {
        "log-SNR from": seen.edges[:-1],
        "to": seen.edges[1:],
        "losses": seen.count,
        "mean": seen.mean,
        "standard deviation": seen.variance.sqrt(),
    }
    if run.curve is not None:
        columns["weight (mean 1)"] = relative_weight(seen, run.curve)
    shown = (seen.count > 0).tolist()
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    body = "".join(
        f"<tr>{''.join(f'<td>{_plain(value)}</td>' for value in row)}</tr>"
        for row, show in zip(rows, shown, strict=True)
        if show
    )
    return _box(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", f"Loss by noise level of {run.name}", "numbers")


# tables


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _table(runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[str]]], label: str) -> str:
    """Return one column per run; the cells are HTML. Nothing where there are no rows."""
    if not rows:
        return ""
    head = ""
    if len(runs) > 1:
        names = "".join(f'<th scope="col">{swatch(i)} {escape(run.name)}</th>' for i, run in enumerate(runs))
        head = f"<thead><tr><td></td>{names}</tr></thead>"
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for key, cells in rows
    )
    return _box(f"{head}<tbody>{body}</tbody>", label)


def _box(table: str, label: str, kind: str = "") -> str:
    """Return a table in a box of its own, within which it scrolls where the page is too narrow."""
    inside = f'<table class="{kind}">{table}</table>'
    return f'<div class="table" tabindex="0" role="region" aria-label="{escape(label)}">{inside}</div>'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def _plain(value: Any, digits: int = 4) -> str:
    """Return any value of JSON or YAML as HTML; a number keeps all its digits in its attribute."""
    if _is_number(value):
        return f'<data value="{value!r}">{number(value, digits if isinstance(value, float) else 15)}</data>'
    return escape(_text(value))


def _text(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={_text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

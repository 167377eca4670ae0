"""Charts as SVG inside HTML: lines, bars, a heat map and shares. Colours and fonts are the page's style sheet's.

Nothing here needs a script, and no text is smaller than the page's: a chart is as wide as a phone, 340 units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 340, 230
_TOP, _BOTTOM, _RIGHT = 26, 44, 14
_COLOURS = 5  # in the style sheet; a sixth line has the first colour again, dashed
DASHED = _COLOURS  # to be added to a line's index
_STYLES = 4
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# viridis, from its low end
_MAP = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")


@dataclass(frozen=True)
class Line:
    """A curve with its name in the legend.

    Attributes:
        label: its name, any text.
        x: where.
        y: what; values that are not finite leave a gap.
        index: of its colour and dashes.
        strength: opacity, 1 for solid.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    index: int = 0
    strength: float = 1.0


@dataclass(frozen=True)
class Axis:
    """Maps numbers from ``low`` to ``high`` to places from ``start`` to ``end``, on a linear or logarithmic scale."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return between three and seven round values, as far as there are so many.

        Example:
            >>> Axis(0, 10, 0, 1).ticks()
            [0, 2, 4, 6, 8, 10]
            >>> Axis(0.02, 3, 0, 1, log=True).ticks()
            [0.03, 0.1, 0.3, 1.0, 3.0]
        """
        if not self.log:
            return _round_values(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for mantissas in ((1,), (1, 3), (1, 2, 5)):
            ticks = [float(f"{m}e{n}") for n in range(first, last + 1) for m in mantissas]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) >= 4:
                return ticks[:: math.ceil(len(ticks) / 7)]
        return ticks if len(ticks) >= 3 else _round_values(self.low, self.high)


def _round_values(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [
        value
        for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if low <= (value := _tidy(n * step)) <= high
    ]


def _tidy(value: float) -> float:
    value = float(f"{value:.10g}")
    return int(value) if value.is_integer() else value


def number(value: float, digits: int = 4) -> str:
    """Return a number for people, with as many digits as matter.

    Example:
        >>> number(-0.00123456), number(12345.678), number(2.5e-9)
        ('−0.001235', '12,346', '2.5·10⁻⁹')
    """
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and not 1e-4 <= size < 1e7:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        mantissa = f"{float(mantissa):g}"
        text = f"10{str(int(power)).translate(_SUPERSCRIPTS)}"
        return (text if mantissa == "1" else f"{mantissa}·{text}").replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(size))) if size else 0
    text = f"{value:,.{decimals}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")


def extent(*values: Iterable[float]) -> tuple[float, float] | None:
    """Return the least and the greatest of the finite values, None if there is none.

    Example:
        >>> extent([1.0, float("nan")], [3.0])
        (1.0, 3.0)
    """
    finite = [v for v in itertools.chain(*values) if math.isfinite(v)]
    return (min(finite), max(finite)) if finite else None


def _axis(low: float, high: float, start: float, end: float, *, log: bool = False, pad: float = 0.0) -> Axis:
    """Return an axis that goes a little beyond the values, and is not empty where there is but one."""
    if math.isclose(low, high, rel_tol=1e-6):
        low, high = (
            (low / 2, high * 2) if log else (low - abs(low) / 2 - (low == 0), high + abs(high) / 2 + (high == 0))
        )
    if log:
        factor = (high / low) ** pad
        return Axis(low / factor, high * factor, start, end, log)
    return Axis(low - pad * (high - low), high + pad * (high - low), start, end)


def card(title: str, body: str, legend: str = "", note: str = "") -> str:
    """Return a titled box around a chart; ``title`` and ``note`` are plain text.

    Example:
        >>> card("a < b", "<p>body</p>")
        '<figure class="card"><figcaption>a &lt; b</figcaption><p>body</p></figure>'
    """
    remark = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="card"><figcaption>{escape(title)}</figcaption>{legend}{body}{remark}</figure>'


def swatch(index: int, strength: float = 1.0) -> str:
    """Return a sample of a line, for a legend."""
    return (
        f'<svg class="swatch {_style(index)}" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">'
        f'<path class="line" style="opacity:{strength:g}" d="M1 6H27"/></svg>'
    )


def _style(index: int) -> str:
    return f"c{index % _COLOURS} d{index // _COLOURS % _STYLES}"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    y_extent: tuple[float, float] | None = None,
    log: bool = True,
    note: str = "",
) -> str:
    """Return a card with curves; each point says its numbers when pointed at.

    Args:
        title: of the card.
        lines: the curves; their names are shown if there is more than one.
        x_label: of the axis below.
        y_label: above the axis on the left.
        y_extent: least and greatest value of that axis; default: those of the curves.
        log: a logarithmic axis; values that are not positive leave a gap.
        note: a sentence below.

    Example:
        >>> "a: at 1: 0.5" in line_chart("loss", [Line("a", [0, 1], [1, 0.5])], x_label="log-SNR", y_label="loss")
        True
    """
    shown = [line for line in lines if any(_drawn(point, log) for point in zip(line.x, line.y, strict=True))]
    points = [[point for point in zip(line.x, line.y, strict=True) if _drawn(point, log)] for line in shown]
    if not shown:
        return card(title, '<p class="note">No finite value to draw.</p>', note=note)
    xs, ys = zip(*itertools.chain(*points), strict=True)
    low, high = y_extent or (min(ys), max(ys))
    y_axis = _axis(low, high, _HEIGHT - _BOTTOM, _TOP, log=log, pad=0.04)
    left = _left(y_axis)
    x_axis = _axis(min(xs), max(xs), left + 4, _WIDTH - _RIGHT)
    parts = [_frame(x_axis, y_axis, left, x_label, y_label)]
    for line in shown:
        parts.append(f'<g class="{_style(line.index)}" style="opacity:{line.strength:.3g}">')
        parts.append("".join(_paths(line, x_axis, y_axis, log)))
        parts.append("</g>")
    described = f"Line chart. {title}: {_names(line.label for line in shown)}, {y_label} over {x_label}."
    legend = _legend((swatch(line.index, line.strength), line.label) for line in shown) if len(lines) > 1 else ""
    return card(title, _svg(described, parts), legend, note)


def _drawn(point: tuple[float, float], log: bool) -> bool:
    x, y = point
    return math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)


def _paths(line: Line, x_axis: Axis, y_axis: Axis, log: bool) -> Iterator[str]:
    pairs = zip(line.x, line.y, strict=True)
    for drawn, group in itertools.groupby(pairs, key=lambda point: _drawn(point, log)):
        if drawn:
            points = list(group)
            path = "L".join(f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in points)
            yield f'<path class="line" d="M{path}"/>'
            for x, y in points:
                says = f"{line.label}: " if line.label else ""
                yield (
                    f'<circle class="point" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="{_radius(len(line.x))}">'
                    f"<title>{escape(says)}at {number(x)}: {number(y)}</title></circle>"
                )


def _radius(points: int) -> float:
    return 2.4 if points <= 50 else 1.2


def bar_chart(
    title: str, edges: Sequence[float], heights: Sequence[float], *, x_label: str, y_label: str, note: str = ""
) -> str:
    """Return a card with one bar between each two edges.

    Example:
        >>> bar_chart("counts", [0, 1, 2], [3, 4], x_label="log-SNR", y_label="losses").count("<rect")
        2
    """
    y_axis = _axis(0, max([1, *heights]), _HEIGHT - _BOTTOM, _TOP)
    left = _left(y_axis)
    x_axis = _axis(edges[0], edges[-1], left + 4, _WIDTH - _RIGHT)
    parts = [_frame(x_axis, y_axis, left, x_label, y_label), '<g class="c0">']
    for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
        x, width, top = x_axis(low), x_axis(high) - x_axis(low), y_axis(height)
        parts.append(
            f'<rect class="bar" x="{x + 0.05 * width:.1f}" y="{top:.1f}" width="{0.9 * width:.1f}" '
            f'height="{y_axis.start - top:.1f}"><title>{number(low)} to {number(high)}: {number(height)}</title></rect>'
        )
    parts.append("</g>")
    return card(title, _svg(f"Bar chart. {title}: {y_label} over {x_label}.", parts), note=note)


def heat_map(
    title: str,
    x_edges: Sequence[float],
    y_edges: Sequence[float],
    rows: Sequence[Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    value_label: str,
    note: str = "",
) -> str:
    """Return a card with positive values as colours on a logarithmic scale, ``rows[i][j]`` between edges i and j.

    Example:
        >>> cells = [[1.0, 0.5], [float("nan"), 0.1]]
        >>> html = heat_map("loss", [0, 1, 2], [0, 1, 2], cells, x_label="step", y_label="log-SNR", value_label="loss")
        >>> html.count('class="cell"')
        3
    """
    found = extent(value for row in rows for value in row if value > 0)
    if found is None:
        return card(title, '<p class="note">No finite value to draw.</p>', note=note)
    scale = _axis(*found, 0.0, 1.0, log=True)
    y_axis = _axis(y_edges[0], y_edges[-1], _HEIGHT - _BOTTOM, _TOP)
    left = _left(y_axis)
    x_axis = _axis(x_edges[0], x_edges[-1], left + 4, _WIDTH - _RIGHT)
    parts = [_frame(x_axis, y_axis, left, x_label, y_label), '<g shape-rendering="crispEdges">']
    seam = 0.7  # cells overlap a little, so that nothing shines through between them
    for (low, high), row in zip(itertools.pairwise(y_edges), rows, strict=True):
        for (start, end), value in zip(itertools.pairwise(x_edges), row, strict=True):
            if math.isfinite(value) and value > 0:
                x, y = x_axis(start), y_axis(high)
                parts.append(
                    f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{x_axis(end) - x + seam:.1f}" '
                    f'height="{y_axis(low) - y + seam:.1f}" fill="{_colour(scale(value))}"/>'
                )
    parts.append("</g>")
    described = f"Heat map. {title}: {value_label}, over {x_label} and {y_label}."
    gradient = ", ".join(f"#{colour}" for colour in _MAP)
    key = (
        f'<p class="key"><span>{number(scale.low, 2)}</span>'
        f'<span class="ramp" style="background:linear-gradient(90deg, {gradient})"></span>'
        f"<span>{number(scale.high, 2)}</span><span>{escape(value_label)}</span></p>"
    )
    return card(title, _svg(described, parts), key, note)


def _colour(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_MAP) - 1)
    i = min(int(place), len(_MAP) - 2)
    pairs = zip(bytes.fromhex(_MAP[i]), bytes.fromhex(_MAP[i + 1]), strict=True)
    return "#" + bytes(round(a + (place - i) * (b - a)) for a, b in pairs).hex()


def shares(title: str, rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str], note: str = "") -> str:
    """Return a card with one bar a row, divided into named parts with their numbers.

    Example:
        >>> "75\u00a0%" in shares("variance", [("a", (1.0, 3.0))], ("within", "between"))
        True
    """
    body = []
    for label, values in rows:
        total = sum(values)
        if not (math.isfinite(total) and total > 0):
            body.append(f'<dt>{escape(label)}</dt><dd class="note">{number(total)}</dd>')
            continue
        pieces = "".join(
            f'<span class="c{i}" style="flex-grow:{value / total:.6f}"></span>' for i, value in enumerate(values)
        )
        said = " + ".join(f"{_data(value)} <small>({100 * value / total:.0f}\u00a0%)</small>" for value in values)
        body.append(
            f"<dt>{escape(label)}</dt>"
            f'<dd><span class="share" aria-hidden="true">{pieces}</span>{_data(total)} = {said}</dd>'
        )
    dots = ((f'<span class="dot c{i}" aria-hidden="true"></span>', part) for i, part in enumerate(parts))
    return card(title, f'<dl class="shares">{"".join(body)}</dl>', _legend(dots), note)


def _data(value: float) -> str:
    return f'<data value="{value!r}">{number(value)}</data>'


def _left(axis: Axis) -> float:
    """Return the place of the axis on the left: its labels fit beside it."""
    return 8 + max((_text_width(number(tick)) for tick in axis.ticks()), default=0)


def _text_width(text: str) -> float:
    """Return how wide a number is at most, in the widest of the usual fonts."""
    return 7.7 * len(text) + 2.5 * text.count("−")


def _frame(x_axis: Axis, y_axis: Axis, left: float, x_label: str, y_label: str) -> str:
    bottom, right = y_axis.start, x_axis.end
    parts = []
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(f'<path class="rule" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_axis.ticks():
        x, text = x_axis(tick), number(tick)
        half = _text_width(text) / 2
        x = min(max(x, half), _WIDTH - half - 1)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="4" y="14">{escape(y_label)}</text>')
    return "".join(parts)


def _svg(described: str, parts: Iterable[str]) -> str:
    said = escape(described)
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{said}">{"".join(parts)}</svg>'


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<li>{mark}<span>{escape(label)}</span></li>" for mark, label in entries)
    return f'<ul class="legend">{items}</ul>'


def _names(labels: Iterable[str]) -> str:
    return ", ".join(label for label in labels if label) or "one curve"

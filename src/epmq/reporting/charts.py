"""Charts as inline SVG: text that scales with the page, colours that follow light and dark, no script.

Every function takes plain numbers and returns one `<svg>` element. Marks have the class `mark`, and carry what they
show as a `<title>`, which browsers bring up under the pointer and screen readers read. Colours are classes `s0` to `s7`
(see `charts.css`), from a palette that the colour-blind can tell apart (Okabe and Ito); forms differ as well.

What all take: `x_title` and `y_title` say what x and y are; `show` gives the text of a value, which is y; `styles` the
number of each series' colour and form, by default its place in the order of series; with `log` values lie on a
logarithmic axis, and must be positive.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

# Units of the drawing; a page shows one at about this many pixels, a phone at a little less.
WIDTH = 420
LEFT, RIGHT, TOP = 46, 14, 12
# Where the lower axis of a drawing lies, and how high a row of `dots` is.
BASE, ROW = 202, 24

Point = tuple[float, float]
Series = dict[str, list[Point]]
LabelledSeries = dict[str, list[tuple[float, float, str]]]
Show = Callable[[float], str]
Styles = dict[str, int]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Axis:
    """Where values lie on a line of the drawing from `start` to `end`, and which of them are named.

    A `margin`, a share of the range of the values, is left free at either end.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False, margin: float = 0.06):
        self._scale: Callable[[float], float] = math.log10 if log else float
        low, high = self._scale(min(values)), self._scale(max(values))
        margin = margin * (high - low) or margin * max(abs(high), 1.0)
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end
        self.ticks = ticks(self.low, self.high)
        if log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            steps = (1,) if self.high - self.low > 2 else (1, 2, 5) if self.high - self.low > 0.5 else range(1, 10)
            round_numbers = [step * 10.0**decade for decade in decades for step in steps]
            within = [tick for tick in round_numbers if self.low <= math.log10(tick) <= self.high]
            self.ticks = within if len(within) > 1 else [10**tick for tick in ticks(self.low, self.high, 3)]

    def __call__(self, value: float) -> float:
        return self.start + (self._scale(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def dots(
    rows: dict[str, dict[str, float]], unit: str, show: Show, styles: Styles | None = None, log: bool = False
) -> str:
    """A row a task, a mark a model: `rows` are task → model → value in `unit`, and the series are the models."""
    styles = _styles([model for row in rows.values() for model in row], styles)
    left = min(130, 16 + 6 * max(len(task) for task in rows))
    axis = Axis([value for row in rows.values() for value in row.values()], left, WIDTH - RIGHT, log)
    bottom = TOP + ROW * len(rows)
    body = []
    for tick in axis.ticks:
        x = axis(tick)
        line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:.1f}" y2="{bottom:.1f}"/>'
        body += [line, _text(x, bottom + 14, show(tick), "middle", "axis")]
    for i, (task, row) in enumerate(rows.items()):
        y = TOP + ROW * (i + 0.5)
        body += [_across(left, y), _text(left - 6, y + 4, _cut(task, 20), "end")]
        for model, value in row.items():
            body.append(_mark(styles[model], axis(value), y, f"{task}, {model}: {show(value)}"))
    body.append(_text((left + WIDTH - RIGHT) / 2, bottom + 30, unit, "middle", "axis"))
    return _svg(body, styles, bottom + 46, f"{unit} by task")


def lines(
    series: Series, x_title: str, y_title: str, show: Show, styles: Styles | None = None, log: bool = False
) -> str:
    """Points joined by lines, a colour a series: name → (x, y)."""
    styles = _styles(series, styles)
    xs = sorted({x for points in series.values() for x, _ in points})
    x_axis = Axis(xs, LEFT, WIDTH - RIGHT)
    y_axis = Axis([y for points in series.values() for _, y in points], BASE, TOP, log)
    whole = [tick for tick in x_axis.ticks if xs[0] <= tick <= xs[-1] and tick == int(tick)]
    body = _grid(x_axis, y_axis, xs if len(xs) <= 8 else whole, show)
    for name, points in series.items():
        marks = [(x_axis(x), y_axis(y), f"{name}, {x_title} {x:g}: {show(y)}") for x, y in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in marks)
        body.append(f'<polyline class="line s{styles[name] % 8}" points="{path}"/>')
        body += [_mark(styles[name], *mark) for mark in marks]
    return _framed(body, styles, x_title, y_title)


def scatter(
    series: LabelledSeries, x_title: str, y_title: str, show: Show, styles: Styles | None = None, log: bool = False
) -> str:
    """Labelled points, a colour a series: name → (x, y, label)."""
    styles = _styles(series, styles)
    x_axis = Axis([x for points in series.values() for x, *_ in points], LEFT, WIDTH - RIGHT, margin=0.1)
    y_axis = Axis([y for points in series.values() for _, y, _ in points], BASE, TOP, log, margin=0.08)
    body = _grid(x_axis, y_axis, x_axis.ticks, show)
    labelled: list[Point] = []
    for name, points in series.items():
        for x, y, label in points:
            left, top = x_axis(x), y_axis(y)
            body.append(_mark(styles[name], left, top, f"{name}, {label}: {show(y)} at {x:.1f} {x_title}"))
            near_end = left > WIDTH - 80
            left, top = left + (-7 if near_end else 7), top + 4
            # a label that would lie on another one stays in the mark's title
            if all(abs(left - other_left) > 44 or abs(top - other_top) > 11 for other_left, other_top in labelled):
                labelled.append((left, top))
                body.append(_text(left, top, label, "end" if near_end else "start"))
    return _framed(body, styles, x_title, y_title)


def matrix(rows: dict[str, dict[int, str]], x_title: str, title: str, kinds: Sequence[str]) -> str:
    """A row a name, a mark at each whole number: `rows` are name → number → kind, and each kind has its own mark."""
    styles = _styles(kinds, None)
    most = max(x for row in rows.values() for x in row)
    left = min(150, 16 + 6 * max(len(name) for name in rows))
    bottom, step = TOP + ROW * len(rows), (WIDTH - RIGHT - left) / most
    body = []
    for x in range(1, most + 1):
        if most <= 16 or x == 1 or x % 4 == 0:
            body.append(_text(left + step * (x - 0.5), bottom + 14, str(x), "middle", "axis"))
    for i, (name, row) in enumerate(rows.items()):
        y = TOP + ROW * (i + 0.5)
        # what tells layers apart stands at the end of their names
        body += [_across(left, y), _text(left - 6, y + 4, _cut(name[::-1], 23)[::-1], "end")]
        body += [_mark(styles[kind], left + step * (x - 0.5), y, f"{name}, {x}: {kind}") for x, kind in row.items()]
    body.append(_text((left + WIDTH - RIGHT) / 2, bottom + 30, x_title, "middle", "axis"))
    return _svg(body, styles, bottom + 46, title)


def _styles(names: Iterable[str], styles: Styles | None) -> Styles:
    return {name: (styles or {}).get(name, i) for i, name in enumerate(dict.fromkeys(names))}


def _grid(x_axis: Axis, y_axis: Axis, xs: Iterable[float], show: Show) -> list[str]:
    """A line across for every tick of the upright axis, and the numbers of both."""
    body = []
    for tick in y_axis.ticks:
        body += [_across(LEFT, y_axis(tick)), _text(LEFT - 5, y_axis(tick) + 4, show(tick), "end", "axis")]
    return body + [_text(x_axis(x), BASE + 14, f"{x:g}", "middle", "axis") for x in xs]


def _framed(body: list[str], styles: Styles, x_title: str, y_title: str) -> str:
    """A drawing with its axes' names and a legend."""
    middle = (TOP + BASE) / 2
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, BASE + 30, x_title, "middle", "axis"))
    attributes = f'x="11" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 11 {middle:.1f})"'
    body.append(f'<text class="axis" {attributes}>{escape(y_title)}</text>')
    return _svg(body, styles, BASE + 46, f"{y_title} by {x_title}")


def _mark(style: int, x: float, y: float, title: str, css_class: str = "mark") -> str:
    """A circle, square, diamond or triangle: series differ in form as well as in colour."""
    shape = (
        f'circle cx="{x:.1f}" cy="{y:.1f}" r="4.0"',
        f'rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8.0" height="8.0"',
        f'path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"',
        f'path d="M{x:.1f} {y - 5:.1f}l5 9h-10z"',
    )[style % 4]
    element = shape.partition(" ")[0]
    return f'<{shape} class="{css_class} s{style % 8}"><title>{escape(title)}</title></{element}>'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _text(x: float, y: float, text: str, anchor: str, css_class: str = "") -> str:
    attribute = f' class="{css_class}"' if css_class else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attribute}>{escape(text)}</text>'


def _across(left: int, y: float) -> str:
    """A line of the grid, from `left` to the right end."""
    return f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _svg(body: list[str], styles: Styles, legend_top: float, title: str) -> str:
    """The whole drawing, with a legend of two columns."""
    legend = []
    for i, (name, style) in enumerate(styles.items()):
        x, y = (8, 8 + WIDTH / 2)[i % 2], legend_top + 16 * (i // 2)
        legend += [_mark(style, x + 4, y, name, "key"), _text(x + 14, y + 4, _cut(name, 34), "start")]
    height = legend_top + 16 * ((len(styles) + 1) // 2)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body + legend)}</svg>'
    )

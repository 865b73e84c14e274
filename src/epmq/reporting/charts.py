"""Charts as inline SVG: text that scales with the page, colours that follow light and dark, no script.

Every function takes plain numbers and returns one `<svg>` element. Marks have the class `mark`, and carry what they
show as a `<title>`, which browsers bring up under the pointer and screen readers read. Colours are classes `s0` to `s7`
(see `STYLE`), from a palette that the colour-blind can tell apart (Okabe and Ito); forms differ as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

# Units of the drawing; a page shows one at about this many pixels, a phone at a little less.
WIDTH = 420
LEFT, RIGHT, TOP = 46, 14, 12
# Where the lower axis of a drawing lies, and how high a row of `dots` is.
BASE, ROW = 202, 24
# Okabe and Ito's colours, in light and in dark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#9a7d00", "#56b4e9", "#666666", "#000000")
DARK = ("#56b4e9", "#f08a3c", "#2dc79b", "#e39cc3", "#f0e442", "#8fcdf3", "#aaaaaa", "#ffffff")
STYLE = (
    "svg{width:100%;height:auto;font:11px system-ui,sans-serif}svg text{fill:currentColor}"
    ".grid{stroke:currentColor;opacity:.15}.axis{opacity:.75}.line{fill:none;stroke-width:1.5}"
    + "".join(f".s{i}{{fill:{colour};stroke:{colour}}}" for i, colour in enumerate(COLOURS))
    + "@media(prefers-color-scheme:dark){"
    + "".join(f".s{i}{{fill:{colour};stroke:{colour}}}" for i, colour in enumerate(DARK))
    + "}"
    + "svg .line{fill:none}"
)

Point = tuple[float, float]
Series = dict[str, list[Point]]
Show = Callable[[float], str]
# Series → number of its colour and form; by their order where a series is not named.
Forms = dict[str, int]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def standalone(svg: str) -> str:
    """A drawing as a file of its own, such as docs show: with its colours in it."""
    plain = "svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}"
    return svg.replace(">", f"><style>{plain}{STYLE}</style>", 1) + "\n"


class Axis:
    """Where values lie on a line of the drawing, and which of them are named.

    Args:
        values: what must lie on it.
        start, end: places of the line's ends.
        log: by the logarithm; all values must be positive.
        margin: share of the range that is left free at either end.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False, margin: float = 0.06):
        self.bend: Callable[[float], float] = math.log10 if log else float
        low, high = self.bend(min(values)), self.bend(max(values))
        free = margin * (high - low) or margin * max(abs(high), 1.0)
        self.low, self.high, self.start, self.end = low - free, high + free, start, end
        self.ticks = ticks(self.low, self.high)
        if log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            steps = (1,) if self.high - self.low > 2 else (1, 2, 5) if self.high - self.low > 0.5 else range(1, 10)
            named = [step * 10.0**decade for decade in decades for step in steps]
            within = [tick for tick in named if self.low <= math.log10(tick) <= self.high]
            self.ticks = within if len(within) > 1 else [10**tick for tick in ticks(self.low, self.high, 3)]

    def __call__(self, value: float) -> float:
        return self.start + (self.bend(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def dots(
    rows: dict[str, dict[str, float]], unit: str, show: Show, forms: Forms | None = None, log: bool = False
) -> str:
    """A row a task, a mark a model.

    Args:
        rows: task → model → value.
        unit: what the values are.
        show: a value as text.
        forms: of the models.
        log: values on a logarithmic axis; all must be positive.
    """
    models = list(dict.fromkeys(model for row in rows.values() for model in row))
    look = _looks(models, forms)
    left = min(130, 16 + 6 * max(len(name) for name in rows))
    place = Axis([value for row in rows.values() for value in row.values()], left, WIDTH - RIGHT, log)
    end = TOP + ROW * len(rows)
    body = [_vertical(place(tick), TOP, end, show(tick)) for tick in place.ticks]
    for i, (task, row) in enumerate(rows.items()):
        y = TOP + ROW * (i + 0.5)
        body.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(left - 6, y + 4, _cut(task, 20), "end"))
        body += [_mark(look[model], place(value), y, f"{task}, {model}: {show(value)}") for model, value in row.items()]
    body.append(_text((left + WIDTH - RIGHT) / 2, end + 30, unit, "middle", "axis"))
    return _svg([*body, *_legend(look, end + 46)], end + 46 + _legend_height(look), f"{unit} by task")


def lines(series: Series, across: str, up: str, show: Show, forms: Forms | None = None, log: bool = False) -> str:
    """Points joined by lines, a colour a series.

    Args:
        series: name → (x, y) points.
        across, up: what x and y are.
        show: a y as text.
        forms: of the series.
        log: y on a logarithmic axis; all must be positive.
    """
    look = _looks(series, forms)
    xs = sorted({x for found in series.values() for x, _ in found})
    at = Axis(xs, LEFT, WIDTH - RIGHT)
    level = Axis([y for found in series.values() for _, y in found], BASE, TOP, log)
    body = [_horizontal(level(tick), show(tick)) for tick in level.ticks]
    shown = xs if len(xs) <= 8 else [tick for tick in at.ticks if xs[0] <= tick <= xs[-1] and tick == int(tick)]
    body += [_text(at(x), BASE + 14, f"{x:g}", "middle", "axis") for x in shown]
    for name, found in series.items():
        places = [(at(x), level(y)) for x, y in sorted(found)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body.append(f'<polyline class="line s{look[name] % 8}" points="{path}"/>')
        titles = [f"{name}, {across} {x:g}: {show(y)}" for x, y in sorted(found)]
        body += [_mark(look[name], *place, title) for place, title in zip(places, titles)]
    return _framed(body, look, across, up)


def scatter(
    series: dict[str, list[tuple[float, float, str]]],
    across: str,
    up: str,
    show: Show,
    forms: Forms | None = None,
    log: bool = False,
) -> str:
    """Labelled points, a colour a series.

    Args:
        series: name → (x, y, label).
        across, up: what x and y are.
        show: a y as text.
        forms, log: as in `lines`.
    """
    look = _looks(series, forms)
    points = [point for found in series.values() for point in found]
    at = Axis([x for x, *_ in points], LEFT, WIDTH - RIGHT, margin=0.1)
    level = Axis([y for _, y, _ in points], BASE, TOP, log, margin=0.08)
    body = [_horizontal(level(tick), show(tick)) for tick in level.ticks]
    body += [_text(at(tick), BASE + 14, f"{tick:g}", "middle", "axis") for tick in at.ticks]
    taken: list[Point] = []
    for name, found in series.items():
        for x, y, label in found:
            place = at(x), level(y)
            body.append(_mark(look[name], *place, f"{name}, {label}: {show(y)} at {x:.1f} {across}"))
            near_end = place[0] > WIDTH - 80
            spot = (place[0] + (-7 if near_end else 7), place[1] + 4)
            # a label that would lie on another one stays in the mark's title
            if all(abs(spot[0] - a) > 44 or abs(spot[1] - b) > 11 for a, b in taken):
                taken.append(spot)
                body.append(_text(*spot, label, "end" if near_end else "start"))
    return _framed(body, look, across, up)


def _looks(names: Iterable[str], forms: Forms | None) -> Forms:
    return {name: (forms or {}).get(name, i) for i, name in enumerate(names)}


def _framed(body: list[str], look: Forms, across: str, up: str) -> str:
    """A drawing with its axes' names and a legend."""
    middle = (TOP + BASE) / 2
    body += [
        _text((LEFT + WIDTH - RIGHT) / 2, BASE + 30, across, "middle", "axis"),
        f'<text class="axis" x="11" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 11 {middle:.1f})">'
        f"{escape(up)}</text>",
    ]
    return _svg([*body, *_legend(look, BASE + 46)], BASE + 46 + _legend_height(look), f"{up} by {across}")


def _mark(form: int, x: float, y: float, title: str) -> str:
    """A circle, square, diamond or triangle: series differ in form as well as in colour."""
    kind, r = form % 4, 4.0
    shape = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"'
        if kind == 0
        else f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"'
        if kind == 1
        else f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"'
        if kind == 2
        else f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z"'
    )
    return f'{shape} class="mark s{form % 8}"><title>{escape(title)}</title></{shape[1 : shape.index(" ")]}>'


def _legend(look: Forms, top: float) -> list[str]:
    found = []
    for i, (name, form) in enumerate(look.items()):
        x, y = (8, 8 + WIDTH / 2)[i % 2], top + 16 * (i // 2)
        key = _mark(form, x + 4, y, name).replace('class="mark ', 'class="key ')
        found += [key, _text(x + 14, y + 4, _cut(name, 34), "start")]
    return found


def _legend_height(look: Forms) -> int:
    return 16 * ((len(look) + 1) // 2)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    about = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{about}>{escape(text)}</text>'


def _horizontal(y: float, label: str) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(LEFT - 5, y + 4, label, "end", "axis")


def _vertical(x: float, top: float, bottom: float, label: str) -> str:
    line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
    return line + _text(x, bottom + 14, label, "middle", "axis")


def _svg(body: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )

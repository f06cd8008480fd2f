"""Horizontal bars of a table of figures, as HTML: what the directive `bars` draws. It needs no Sphinx."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from html import escape

import words

NOTHING = ("", "-", "—")
COLOURS = 4  # of Attnax's series, and of those of others
MOST_OPEN = 40  # bars; a plot of more is folded
SLOWER, LARGER = re.compile(r"(ms|s)\b|.*\b(second|speed)"), re.compile(r"MiB|GB")


class BarsError(ValueError):
    """A table that cannot be drawn as asked."""


@dataclasses.dataclass(frozen=True)
class Plot:
    """What is drawn, by the texts of the table. The bar of a range, such as "43-48 ms", ends at the larger number.

    Attributes:
        values: the headers of the columns that become bars, with commas between them.
        labels: the headers of the columns that name a row; by default the first column.
        unit: text beside the legend; "less is better" or "more is better" in it marks the groups in which Attnax loses.
        scale: "linear"; "log"; or "own", linear with the largest bar of every group as long as the space.
        by: "row", a group of bars for each row; or "column", for each column.
        number: which number of a cell such as "53.3 / 54.6" is drawn.
        attnax: the names of Attnax's bars, by default those that start with it; or "all", where nothing is beside it.
        without: the first labels of rows that are left out.
        full: the value of a bar as long as the space, of a linear scale; by default the largest, and not below it.
    """

    values: str
    labels: str = ""
    unit: str = ""
    scale: str = "linear"
    by: str = "row"
    number: int = 1
    attnax: str = ""
    without: str = ""
    full: float | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A cell: the text beside its bar, and the length of the bar; None for words, which have no bar."""

    text: str
    value: float | None = None


def read_cell(cell: str, number: int = 1) -> Figure:
    """The figure in a cell; a cell with digits that is no figure is an error."""
    match = re.fullmatch(words.CELL, cell)
    if match is None:
        if re.search(r"\d", cell):
            raise BarsError(f'bars: a cell must be a number, or words without digits; got "{cell}".')
        return Figure("" if cell in NOTHING else cell)
    amounts = [match.group(at, at + 1, at + 2) for at in (1, 4, 7) if match[at]]
    if number > len(amounts):
        raise BarsError(f'bars: number={number}, but a cell has {len(amounts)} of them: "{cell}".')
    text, *ends = amounts[number - 1]
    return Figure(text + (match[10] or ""), max(float(end.replace(",", "")) for end in ends if end))


def places(text: str, names: Sequence[str], what: str) -> list[int]:
    """The places of some names, with commas between them, in a list; a name may hold commas itself."""
    found, rest = [], text.strip()
    more = bool(rest)
    while more:
        fit = [name for name in names if name and f"{rest},".startswith(f"{name},")]
        if not fit:
            raise BarsError(f'bars: the table has no {what} "{rest}"; it has {", ".join(map(repr, names))}.')
        name = max(fit, key=len)
        if names.count(name) > 1:
            raise BarsError(f'bars: the table has {names.count(name)} {what}s "{name}".')
        found.append(names.index(name))
        rest = rest[len(name) :]
        more, rest = bool(rest), rest[1:].lstrip()
    return found


def groups_of(
    plot: Plot, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[str], list[list[Figure]]]:
    """The names of the groups, the names of the bars of a group, and the figures of each group."""
    labels = places(plot.labels, header, "column") or [0]
    values = places(plot.values, header, "column")
    left_out = places(plot.without, [row[labels[0]] for row in rows], "row")
    rows = [row for index, row in enumerate(rows) if index not in left_out]
    figures = [[read_cell(row[column], plot.number) for column in values] for row in rows]
    unit = plot.unit.partition(",")[0]
    columns = [header[column].removesuffix(f" {unit}").removesuffix(",") for column in values]
    names = [", ".join(_label(header[column], row[column]) for column in labels if row[column]) for row in rows]
    if plot.by == "row":
        return names, columns, figures
    return columns, names, [list(column) for column in zip(*figures, strict=True)]


def _label(header: str, cell: str) -> str:
    """A cell of a label; a number says what it counts."""
    return f"{header} {cell}".strip() if re.fullmatch(words.NUMBER, cell) else cell


def loses(plot: Plot, ours: Sequence[int], figures: Sequence[Figure]) -> bool | None:
    """Whether another bar of a group is better than the best of Attnax's; None if there is nothing to compare."""
    better = re.search(r"(less|more) is better", plot.unit)
    values = {i: x.value for i, x in enumerate(figures) if x.value is not None}
    mine = [value for i, value in values.items() if i in ours]
    others = [value for i, value in values.items() if i not in ours]
    if not (better and mine and others):
        return None
    return min(mine) > min(others) if better[1] == "less" else max(mine) < max(others)


def colours_of(plot: Plot, series: Sequence[str]) -> dict[int, str]:
    """For each bar of a group: "a0", "a1" ... if it is Attnax's, else "o0", "o1" ..."""
    everything = list(range(len(series)))
    attnax = [i for i in everything if series[i].lower().startswith("attnax")]
    ours = everything if plot.attnax == "all" else places(plot.attnax, series, "bar") or attnax
    if not ours:
        names = ", ".join(map(repr, series))
        raise BarsError(f'bars: no bar starts with "Attnax"; got {names}. Set attnax to names of these, or to "all".')
    theirs = [i for i in range(len(series)) if i not in ours]
    if max(len(ours), len(theirs)) > COLOURS:
        raise BarsError(f"bars: there are colours for {COLOURS} bars of Attnax and {COLOURS} others; got {series}.")
    return {i: f"{kind}{n}" for kind, those in (("a", ours), ("o", theirs)) for n, i in enumerate(those)}


@dataclasses.dataclass(frozen=True)
class Scale:
    """From values to lengths, which are parts of the space."""

    plot: Plot
    least: float
    largest: float

    @property
    def start(self) -> int:
        """The power of ten at which a logarithmic scale starts: the one below the least, whose bar has a length too."""
        return math.ceil(math.log10(self.least)) - 1

    def part(self, value: float, group: Sequence[Figure]) -> float:
        if self.plot.scale == "log":
            return (math.log10(value) - self.start) / (math.log10(self.largest) - self.start) if value else 0.0
        return value / (max(x.value or 0 for x in group) or 1 if self.plot.scale == "own" else self.largest)

    @property
    def words(self) -> list[str]:
        """What a reader must know."""
        if self.plot.scale == "own":
            return [f"each {self.plot.by} has its own scale"]
        if self.plot.scale == "log":
            return [f"logarithmic, from {10.0**self.start:g}"]
        return [] if self.plot.full is None else [f"the full width is {self.plot.full:g}"]


def _note(text: str) -> str:
    """A text as HTML, with numbers that are not broken."""
    parts = words.pieces(text)
    return "".join(f'<span class="numeral">{escape(part)}</span>' if whole else escape(part) for part, whole in parts)


def draw(plot: Plot, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The bars of a table, as HTML."""
    names, series, groups = groups_of(plot, header, rows)
    drawn = [x for group in groups for x in group if x.value is not None]
    positive = [x.value for x in drawn if x.value]
    if not positive:
        raise BarsError(f'bars: the columns "{plot.values}" have no number above 0.')
    largest = max(positive) if plot.full is None else plot.full
    if plot.full is not None and not (plot.scale == "linear" and largest >= max(positive)):
        raise BarsError(
            f"bars: full needs a linear scale, and at least the largest number, {max(positive):g}; "
            f"got full={plot.full:g} and scale={plot.scale}."
        )
    colours, scale = colours_of(plot, series), Scale(plot, min(positive), largest)
    ours = [i for i, colour in colours.items() if colour.startswith("a")]
    worse = "slower" if SLOWER.match(plot.unit) else "larger" if LARGER.match(plot.unit) else "worse"
    lost = [loses(plot, ours, group) for group in groups]
    body = []
    for name, group, loss in zip(names, groups, lost, strict=True):
        mark = f" <em>{worse}</em>" if loss else ""
        body.append(f'<div class="bars-group"><div class="bars-label">{escape(name)}{mark}</div><div>')
        for i, figure in enumerate(group):
            if figure.value is not None:
                bar = f'<i style="--part: {scale.part(figure.value, group):.4f}"></i>'
                body.append(f'<div class="bars-bar {colours[i]}">{bar}{escape(figure.text)}</div>')
            elif figure.text:
                body.append(f'<div class="bars-note">{escape(f"{series[i]}: {figure.text}")}</div>')
        body.append("</div></div>")
    compared = [loss for loss in lost if loss is not None]
    count = [f"Attnax is {worse} in {sum(compared)} of {len(compared)}"] if any(compared) else []
    about = "; ".join([plot.unit or ", ".join(series), *scale.words, *count])
    keys = [f'<span class="{colours[i]}"><i></i>{escape(name)}</span>' for i, name in enumerate(series)]
    folded = len(drawn) > MOST_OPEN
    legend = (keys if len(series) > 1 else []) + ([] if folded else [f'<span class="bars-note">{_note(about)}</span>'])
    kind, room = "bars" if plot.full is None else "bars bars-full", max(len(x.text) for x in drawn) + 1
    html = (
        f'<div class="{kind}" role="img" aria-label="Bars of the table above: {escape(about)}" '
        f'style="--room: {room}ch">'
        f'<div class="bars-legend">{"".join(legend)}</div>{"".join(body)}</div>'
    )
    return f'<details class="bars-folded"><summary>Bars: {_note(about)}</summary>{html}</details>' if folded else html

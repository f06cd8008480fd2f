"""The directive `bars`: the table before it as horizontal bars, made when the site is built.

`bar_plot.Plot` describes the options. A table that cannot be drawn is a warning, and so an error of `make docs`.
"""

from typing import Any, ClassVar

from bar_plot import BarsError, Plot, draw
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

logger = logging.getLogger(__name__)


class BarsPlace(nodes.General, nodes.Element):
    """The place of a plot, until its table is read."""


class Bars(SphinxDirective):
    """Draws the table that stands directly before it; several may follow one table."""

    option_spec: ClassVar = {
        "values": directives.unchanged_required,
        "labels": directives.unchanged_required,
        "unit": directives.unchanged_required,
        "scale": lambda text: directives.choice(text, ("linear", "log", "own")),
        "by": lambda text: directives.choice(text, ("row", "column")),
        "number": directives.positive_int,
        "attnax": directives.unchanged_required,
        "without": directives.unchanged_required,
        "full": float,
    }

    def run(self) -> list[nodes.Node]:
        """Keeps the place; the table may not be whole yet."""
        if "values" not in self.options:
            raise self.error('bars: "values" must name the columns that become bars.')
        place = BarsPlace(plot=Plot(**self.options))
        self.set_source_info(place)
        return [place]


def table_before(place: BarsPlace) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table before a plot."""
    at = place.parent.index(place) - 1
    while at >= 0 and place.parent[at].get("classes") == ["bars-place"]:
        at -= 1
    if at < 0 or not isinstance(place.parent[at], nodes.table):
        raise BarsError("bars: a table must stand directly before it.")
    table = place.parent[at]
    rows = [[" ".join(entry.astext().split()) for entry in row] for row in table.findall(nodes.row)]
    return rows[0], rows[1:]


class DrawBars(SphinxTransform):
    """Puts the bars in their places."""

    default_priority = 400

    def apply(self, **options: Any) -> None:
        """Draws all plots of a page, from the first to the last."""
        for place in list(self.document.findall(BarsPlace)):
            try:
                html = draw(place["plot"], *table_before(place))
            except BarsError as error:
                logger.warning("%s", error, location=place)
                html = ""
            place.replace_self(nodes.raw("", html, format="html", classes=["bars-place"]))


def setup(app: Sphinx) -> ExtensionMetadata:
    """Adds the directive."""
    app.add_directive("bars", Bars)
    app.add_transform(DrawBars)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The site loads nothing from outside: a script, style, picture or font with an address of another host is an error."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

LOADED_BY = {  # the attributes whose address a browser loads without a click
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
NOT_LOADED = {"canonical", "next", "prev", "search", "index", "author", "license"}  # of <link rel=...>
OUTSIDE = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)["']?\s*((?:https?:)?//[^"')\s]*)""", re.IGNORECASE)
IN_SCRIPT = re.compile(
    r"""(?:fetch|import|importScripts|Worker|open|sendBeacon)\s*\([^)]*?["'`]((?:https?:)?//[^"'`]+)|"""
    r"""\bfrom\s*["']((?:https?:)?//[^"']+)|\.src\s*=\s*["'`]((?:https?:)?//[^"'`]+)""",
)


class _Page(HTMLParser):
    """Collects the addresses of other hosts that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._inside = tag
        self.found += IN_STYLE.findall(values.get("style", ""))
        if tag == "link" and set(values.get("rel", "").split()) <= NOT_LOADED:
            return
        addresses = (values.get(name, "") for name in LOADED_BY.get(tag, ()))
        self.found += [address for address in addresses if OUTSIDE.match(address) or re.search(r",\s*https?:", address)]

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.found += IN_STYLE.findall(data)
        elif self._inside == "script":
            self.found += in_script(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def in_script(text: str) -> list[str]:
    """The addresses of other hosts that a script names where it loads something."""
    return [next(filter(None, found)) for found in IN_SCRIPT.findall(text)]


def loaded_from_outside(name: str, text: str) -> list[str]:
    """The addresses of other hosts that a browser would load for a file of the site.

    Args:
        name: of the file; its suffix says what the text is.
        text: the text of the file.
    """
    if name.endswith((".html", ".svg")):
        page = _Page()
        page.feed(text)
        return page.found
    if name.endswith(".css"):
        return IN_STYLE.findall(text)
    return in_script(text) if name.endswith((".js", ".mjs")) else []


def check_site(app: Sphinx, error: Exception | None) -> None:
    """Warns about each file of the built site that loads something from outside."""
    from sphinx.util import logging

    if error is not None or app.builder.format != "html":
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".svg", ".css", ".js", ".mjs"):
            for address in loaded_from_outside(path.name, path.read_text(encoding="utf-8")):
                place = path.relative_to(app.outdir)
                logging.getLogger(__name__).warning(
                    "%s loads %s; the site must load nothing from outside", place, address
                )


def setup(app: Sphinx) -> ExtensionMetadata:
    """Checks the site when it is built."""
    app.connect("build-finished", check_site)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

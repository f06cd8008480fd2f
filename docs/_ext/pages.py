"""What the build adds to pages: whole numbers, words for the pictures of a notebook, and a link to its file."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.typing import ExtensionMetadata
from words import alt_text, is_figure, pieces, source_of

ROOT = Path(__file__).parents[2]


class KeepNumbers(SphinxTransform):
    """Gives the class `numeral` to cells that are figures, and to numbers with a hyphen in other text."""

    default_priority = 870  # after the bars and the quotation marks

    def apply(self, **options: object) -> None:
        """Marks the numbers of a page."""
        for entry in self.document.findall(nodes.entry):
            if is_figure(entry.astext()):
                entry["classes"].append("numeral")
        texts = [text for text in self.document.findall(nodes.Text) if isinstance(text.parent, nodes.paragraph)]
        for text in texts:
            parts = list(pieces(text.astext()))
            if any(number for _, number in parts):
                new = [
                    nodes.inline("", part, classes=["numeral"]) if number else nodes.Text(part)
                    for part, number in parts
                ]
                text.parent.replace(text, new)


class NotebookPages(SphinxTransform):
    """Says what the pictures of a notebook show, and where the notebook is."""

    default_priority = 870

    def apply(self, **options: object) -> None:
        """Adds the alternative texts, and a line below the title."""
        path = Path(self.env.doc2path(self.env.docname))
        if path.suffix != ".ipynb":
            return
        for image in self.document.findall(nodes.image):
            if "alt" not in image:
                image["alt"] = self.words_for(image)
        link = nodes.reference("", path.name, refuri=source_of(path.relative_to(ROOT).as_posix(), ROOT))
        line = nodes.paragraph("", "This page is a notebook: ", link, nodes.Text("."), classes=["notebook-source"])
        title = next(iter(self.document.findall(nodes.title)))
        title.parent.insert(title.parent.index(title) + 1, line)

    def words_for(self, image: nodes.image) -> str:
        """The heading above a picture and the text before its cell."""
        node: nodes.Node = image
        while not isinstance(node.parent, nodes.section):
            node = node.parent
        at = node.parent.index(node)
        before = node.parent[at - 1]
        return alt_text(node.parent[0].astext(), before.astext() if isinstance(before, nodes.paragraph) else "")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Adds both transforms."""
    app.add_transform(KeepNumbers)
    app.add_transform(NotebookPages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

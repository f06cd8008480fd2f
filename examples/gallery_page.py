"""The page of the gallery: a table of what was measured, and each idea's code and picture."""

import argparse
import ast
import dataclasses
import inspect
import re
import runpy
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gallery_ideas import LENGTH, LONG, TILE, Idea, OfHeads
from matplotlib.figure import Figure

PLAIN = Path(__file__).parents[1] / "tests" / "examples" / "plain_ideas.py"


def draw(image: np.ndarray, path: Path) -> None:
    """A small picture of a matrix: white is 0, blue is positive, red negative."""
    figure = Figure(figsize=(2 * image.shape[1] / image.shape[0], 2), layout="constrained")
    axes = figure.add_subplot()
    most = np.quantile(abs(image), 0.99)
    axes.imshow(image, cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlabel="key", ylabel="query")
    figure.savefig(path, dpi=100)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of an idea."""

    one: Idea
    exact: tuple[float, float]
    tiles: tuple[int, int]
    cpu: str
    cuda: str
    caches: str

    @classmethod
    def of(cls, one: Idea, plain: Callable[..., Any]) -> "Row":
        """Measures an idea."""
        return cls(one, one.exactness(plain), one.tiles(), one.runs_on("cpu"), one.runs_on("cuda"), one.caches())

    @property
    def cells(self) -> list[str]:
        """The cells of the table."""
        visited, total = self.tiles
        title, share = self.one.title, f"{100 * visited / total:.0f}%" if self.cpu.startswith("tiles") else "all"
        return [
            title,
            str(self.one.num_lines),
            *(f"{x:.0e}" for x in self.exact),
            share,
            self.cpu,
            self.cuda,
            self.caches,
        ]


HEAD = ["idea", "lines", "values", "gradients", "tiles", "on a CPU", "lowered for cuda", "caches"]


def make_page(ideas: list[Idea], doc: str, arguments: list[str] | None = None) -> list[Row]:
    """Measures ideas and prints the table; with `--write`, writes the page and the pictures.

    With `--only`, the page keeps the figures of the other ideas.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write gallery.md and its pictures here")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in ideas], metavar="NAME")
    options = parser.parse_args(arguments)
    plain, rows = runpy.run_path(str(PLAIN)), []
    print(layout(HEAD))
    for one in ideas:
        if options.only is None or one.name in options.only:
            rows.append(Row.of(one, plain[one.name]))
            print(layout(rows[-1].cells), flush=True)
    if options.write is not None:
        (options.write / "gallery").mkdir(exist_ok=True)
        for row in rows:
            draw(row.one.picture(), options.write / "gallery" / f"{row.one.name}.png")
        path = options.write / "gallery.md"
        table = (read_table(path.read_text()) if path.exists() else {}) | {link(row.one): row.cells[1:] for row in rows}
        path.write_text(page([one for one in ideas if link(one) in table], table))
    return rows


def section(one: Idea) -> str:
    """The part of the page about the idea."""
    [brief, *more] = inspect.getdoc(one.code).split("\n\n")
    address = one.link if ":" in one.link else f"https://arxiv.org/abs/{one.link}"
    paper = f"[{one.paper}]({address})."
    subject = "Weights of values" if isinstance(one, OfHeads) else "Influence of tokens"
    picture = f'<img src="gallery/{one.name}.png" height="200" alt="{subject}: {one.title}">'
    if one.place is not None:
        more.append(f"In a model: {one.place.text.format(name=one.code.__name__)}.")
    parts = [" ".join(part.split()) for part in (f"{brief} {paper}", *more)]
    text = "\n\n".join(textwrap.fill(part, 128, break_long_words=False, break_on_hyphens=False) for part in parts)
    return f"## {one.title}\n\n{text}\n\n```python\n{one.source}\n```\n\n{picture}\n"


def layout(cells: list[str]) -> str:
    """A line of the printed table."""
    widths = 39, 6, 7, 10, 6, 34, 40, 0
    return "".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def read_table(text: str) -> dict[str, list[str]]:
    """The cells of the table of a page, by the link in the first one."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| [")]
    return {first: rest for first, *rest in lines}


def page(ideas: list[Idea], table: dict[str, list[str]]) -> str:
    """The text of docs/guides/gallery.md."""
    code = Path(inspect.getfile(ideas[0].code)).read_text()
    imports = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = "gallery_ideas", "gallery_page"
    lines = [ast.get_source_segment(code, node) for node in imports if getattr(node, "module", "") not in ours]
    rows = [HEAD, ["---"] * len(HEAD), *([link(one), *table[link(one)]] for one in ideas)]
    return INTRODUCTION.format(
        count=len(ideas),
        few=sum(one.num_lines < 10 for one in ideas),
        most=max(one.num_lines for one in ideas),
        tile=TILE,
        tiled=LENGTH,
        long=LONG,
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        imports="\n".join(lines),
        sections="\n".join(map(section, ideas)),
    )


def link(one: Idea) -> str:
    """A link to the section of an idea, as GitHub names it."""
    anchor = re.sub(r"[^\w\- ]", "", one.title.lower()).replace(" ", "-")
    return f"[{one.title}](#{anchor})"


INTRODUCTION = """# Gallery

{count} published ideas about attention, each in a few lines: {few} of them take fewer than 10, the longest takes
{most}. The code is that of [`attention_gallery.py`](../../examples/attention_gallery.py), which also measured all
figures and wrote this page: `python examples/attention_gallery.py --write docs/guides`.

- **lines**: of the function below, without blank lines, comments and docstrings.
- **values, gradients**: the greatest difference from a plain definition in float64, relative to the greatest number
  of an array. Gradients are those of all arrays that the idea takes. The definitions
  ([`plain_ideas.py`](../../tests/examples/plain_ideas.py)) use arrays of all pairs, and no kernel, mask or score mod of
  Attnax. Functions run in tiles of 16 x 16 there; models have two layers, and the gradients are those of all
  parameters.
- **tiles**: those of {tile} x {tile} pairs in which the masks of the idea let some pair attend, for {tiled} tokens;
  they are counted for each row and head, as kernels of GPUs go. A tile on a CPU holds several heads, and is computed
  if one of them needs it. An idea that leaves the mask to its caller has the share of a causal mask.
- **on a CPU**: what runs in the program of the value and all gradients for {long} tokens. Tiles need O(T + S) memory;
  "an array of all pairs" is one that the idea itself makes. "Standard only": the idea mixes pairs, which every tiled
  kernel refuses and `standard_attention` computes.
- **lowered for cuda**: the Pallas kernels in the same program for an H100, or XLA's own code. Nothing here ran on a
  GPU.
- **caches**: the kinds with which a model that has the idea generates the tokens of its forward pass; "-" where no
  model is tried.

{table}

The functions need these names:

```python
{imports}
```

`attend` is any kernel, and `**options` are those of a kernel, such as `mask`. The pictures show the weight of each
value in each result of one head, for 64 random queries: blue is positive, red negative. For an idea in a model they
show how much each hidden state depends on each token: the length of a gradient.

{sections}
## How to use one

```python
x = jnp.ones((1, 4, 64, 8))
sink_attention(x, x, x, jnp.zeros(4), mask=masks.causal()).shape  # (1, 4, 64, 8)
```
"""

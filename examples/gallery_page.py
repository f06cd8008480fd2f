"""What the gallery measures of an idea, and the page that it writes; attention_gallery.py has the ideas.

Every figure is measured when the page is written: the lines are those of the source, the tiles those of the masks that
the idea gave its kernel, and the places where it runs those of the programs that JAX lowers.
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import re
import runpy
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from matplotlib.figure import Figure

from attnax import flash_attention, masks
from attnax.masks import count_tiles, index_grid, resolve_masks, takes_mask_objects

ROOT = Path(__file__).parents[1]
PLAIN = ROOT / "tests" / "examples" / "plain_ideas.py"
SIZES = {"B": 2, "N": 4, "K": 2, "H": 8, "V": 6, "F": 16}
TILE = 64
LONG = 640  # a length that no other axis has, of ten tiles
IDEAS: list["Idea"] = []


@dataclasses.dataclass(frozen=True)
class Idea:
    """A published idea and its function.

    Attributes:
        title: of the idea.
        paper: authors and year.
        arxiv: the paper's number.
        function: the idea; its docstring says what it is.
        takes: the axes of each array that it takes.
        gets: further arguments for a length.
        prepares: the arguments that it takes, from the arrays.
    """

    title: str
    paper: str
    arxiv: str
    function: Callable[..., Any]
    takes: dict[str, str]
    gets: Callable[[int], dict[str, Any]]
    prepares: Callable[[dict[str, Any]], dict[str, Any]]

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function.__name__

    @property
    def source(self) -> str:
        """The code of the function, without its decorators and its docstring."""
        code = textwrap.dedent(inspect.getsource(self.function))
        tree = ast.parse(code).body[0]
        doc = tree.body[0]
        lines = code.splitlines()
        return "\n".join(
            lines[tree.lineno - 1 : doc.lineno - 1] + "\n".join(lines[doc.end_lineno :]).strip("\n").splitlines()
        )

    @property
    def num_lines(self) -> int:
        """Lines of the source, without blank ones and comments."""
        return sum(bool(line.strip()) and not line.strip().startswith("#") for line in self.source.splitlines())

    @property
    def kernel(self) -> Any:
        """The kernel that the idea uses by default."""
        return inspect.signature(self.function).parameters["attend"].default

    @property
    def options(self) -> dict[str, Any]:
        """A causal mask, for an idea that leaves the mask to its caller."""
        return {"mask": masks.causal()} if "options" in inspect.signature(self.function).parameters else {}

    def shapes(self, length: int, **sizes: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays; T queries, and a prefix or text of P tokens."""
        sizes = SIZES | {"T": length, "P": length // 2, "L": length // 8} | sizes
        sizes["M"] = 2 * sizes["N"]
        return {name: tuple(sizes.get(axis) or int(axis) for axis in axes) for name, axes in self.takes.items()}

    def draw(self, length: int, dtype: Any = np.float64, **sizes: int) -> dict[str, np.ndarray]:
        """Normal arrays, those of matrices scaled by their fan-in."""
        rng = np.random.default_rng(len(self.name))
        shapes = self.shapes(length, **sizes)
        return {
            name: (rng.normal(size=shape) / (shape[0] ** 0.5 if len(shape) == 2 else 1)).astype(dtype)
            for name, shape in shapes.items()
        }

    def run(self, arrays: dict[str, Any], length: int, **options: Any) -> Any:
        """The output for the arrays."""
        arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
        return self.function(**self.prepares(arrays), **self.gets(length), **self.options | options)


def idea(
    title: str,
    paper: str,
    arxiv: str,
    *,
    takes: dict[str, str],
    gets: Callable[[int], dict[str, Any]] = lambda length: {},
    prepares: Callable[[dict[str, Any]], dict[str, Any]] = lambda arrays: arrays,
) -> Callable[[Any], Any]:
    """Adds a function to the gallery."""

    def add(function: Any) -> Any:
        IDEAS.append(Idea(title, paper, arxiv, function, takes, gets, prepares))
        return function

    return add


def values_and_gradients(run: Callable[..., Any], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The output of `run(arrays)` as "out", and the gradient of each array for one cotangent."""
    out, pull = jax.vjp(jax.jit(run), jax.tree.map(jnp.asarray, arrays))
    [gradients] = pull(jnp.asarray(np.random.default_rng(1).normal(size=out.shape), out.dtype))
    return {"out": np.asarray(out)} | {name: np.asarray(x) for name, x in gradients.items()}


def greatest_difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, float]:
    """The greatest difference of values and of gradients, relative to the greatest number of each array."""
    differences = {name: abs(found[name] - x).max() / abs(x).max() for name, x in expected.items()}
    return differences.pop("out"), max(differences.values())


def exactness(one: Idea, plain: Callable[..., Any], length: int = 48) -> tuple[float, float]:
    """Differences of values and gradients from a plain definition, in float64 and tiles of 16."""
    with jax.enable_x64(True):
        kernel = {"attend": partial(flash_attention, block_size=16)} if one.kernel is flash_attention else {}
        arrays = one.draw(length)
        found = values_and_gradients(lambda arrays: one.run(arrays, length, **kernel), arrays)
        expected = values_and_gradients(lambda arrays: plain(**arrays, **one.gets(length)), arrays)
    return greatest_difference(found, expected)


def runs_in_tiles(one: Idea) -> str:
    """What computes the values and gradients on a CPU: tiles, with or without an array of all pairs, or all at once."""
    attend = partial(flash_attention, block_size=TILE)
    try:
        text = lower(one, "cpu", attend=attend)
    except NotImplementedError as error:
        if "one pair of query and key at a time" not in str(error):
            raise
        return "standard only"
    return "tiles, and an array of all pairs" if f"{LONG}x{LONG}" in text else "tiles"


def runs_on_cuda(one: Idea) -> str:
    """The GPU kernels in the program for an H100, or "XLA"."""
    names = sorted(set(re.findall(r"attnax_(\w+)", lower(one, "cuda"))))
    return ", ".join(names) if names else "XLA"


def lower(one: Idea, platform: str, **options: Any) -> str:
    """The program of the output and all gradients that JAX lowers for a platform, from shapes alone."""
    shapes = one.shapes(LONG, H=64, V=64)
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def loss(arrays: dict[str, Any]) -> Any:
        return one.run(arrays, LONG, **options).sum()

    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    mesh = AbstractMesh((1,), ("gpus",), (AxisType.Auto,), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh) if platform == "cuda" else contextlib.nullcontext():
        program = jax.jit(jax.value_and_grad(loss)).trace(arrays)
        return program.lower(lowering_platforms=(platform,)).as_text()


def visited_tiles(one: Idea, length: int = 512) -> tuple[int, int]:
    """Tiles in which some pair attends, and all tiles, of all rows and heads and of all calls of the kernel."""
    visited = total = 0

    @takes_mask_objects
    def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
        nonlocal visited, total
        shape = *query.shape[:3], key.shape[2]
        mask, _ = resolve_masks("visited_tiles", options.get("mask"), None, shape)
        keep = np.broadcast_to(True if mask is None else np.asarray(mask(*index_grid(*shape))), shape)
        for pairs in keep.reshape(-1, *shape[2:]):
            counts, _, _ = count_tiles(pairs, (TILE, TILE))
            visited += sum(counts) - counts.empty
            total += sum(counts)
        return one.kernel(query, key, value, **options)

    one.run(one.draw(length, np.float32), length, attend=attend)
    return visited, total


def weights(one: Idea, length: int = 64) -> np.ndarray:
    """The factor of each value in each output (T, S) of one head: the output, where the values are unit vectors."""
    arrays = one.draw(length, np.float32)
    names = [name for name in arrays if name.endswith("value")]
    ends = np.cumsum([arrays[name].shape[2] for name in names])
    for name, end in zip(names, ends, strict=True):
        rows, heads, count, _ = arrays[name].shape
        unit = np.eye(count, ends[-1], int(end) - count, dtype=np.float32)
        arrays[name] = np.broadcast_to(unit, (rows, heads, *unit.shape))
    return np.asarray(one.run(arrays, length))[0, 0]


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

    @classmethod
    def of(cls, one: Idea, plain: Callable[..., Any]) -> "Row":
        """Measures an idea."""
        return cls(one, exactness(one, plain), visited_tiles(one), runs_in_tiles(one), runs_on_cuda(one))

    @property
    def cells(self) -> list[str]:
        """The cells of the table."""
        visited, total = self.tiles
        title, share = self.one.title, f"{100 * visited / total:.0f}%" if self.cpu.startswith("tiles") else "all"
        return [title, str(self.one.num_lines), *(f"{x:.0e}" for x in self.exact), share, self.cpu, self.cuda]

    @property
    def section(self) -> str:
        """The part of the page about the idea."""
        one = self.one
        [brief, *more] = inspect.getdoc(one.function).split("\n\n")
        paper = f"[{one.paper}](https://arxiv.org/abs/{one.arxiv})."
        picture = f'<img src="gallery/{one.name}.png" height="200" alt="Weights of keys for queries: {one.title}">'
        text = "\n\n".join([f"{brief} {paper}", *more])
        return f"## {one.title}\n\n{text}\n\n```python\n{one.source}\n```\n\n{picture}\n"


HEAD = ["idea", "lines", "values", "gradients", "tiles", "on a CPU", "lowered for cuda"]


def make_page(ideas: list[Idea], doc: str, arguments: list[str] | None = None) -> list[Row]:
    """Measures every idea and prints the table; with `--write`, writes the page and the pictures."""
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
            draw(weights(row.one), options.write / "gallery" / f"{row.one.name}.png")
        (options.write / "gallery.md").write_text(page(rows))
    return rows


def layout(cells: list[str]) -> str:
    """A line of the printed table."""
    widths = 39, 6, 7, 10, 6, 34, 0
    return "".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def page(rows: list[Row]) -> str:
    """The text of docs/gallery.md."""
    code = Path(inspect.getfile(rows[0].one.function)).read_text()
    imports = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = [ast.get_source_segment(code, node) for node in imports if getattr(node, "module", "") != "gallery_page"]
    few = sum(row.one.num_lines < 10 for row in rows)
    table = [HEAD, ["---"] * len(HEAD), *([link(row.one), *row.cells[1:]] for row in rows)]
    return INTRODUCTION.format(
        count=len(rows),
        few=few,
        most=max(row.one.num_lines for row in rows),
        tile=TILE,
        tiled=512,
        long=LONG,
        table="\n".join(f"| {' | '.join(line)} |" for line in table),
        imports="\n".join(lines),
        sections="\n".join(row.section for row in rows),
    )


def link(one: Idea) -> str:
    """A link to the section of an idea, as GitHub names it."""
    anchor = re.sub(r"[^\w\- ]", "", one.title.lower()).replace(" ", "-")
    return f"[{one.title}](#{anchor})"


INTRODUCTION = """# Gallery

{count} published ideas about attention, each in a few lines: {few} of them take fewer than 10, the longest takes
{most}. The code is that of [`attention_gallery.py`](../examples/attention_gallery.py), which also measured all
figures and wrote this page: `python examples/attention_gallery.py --write docs`.

- **lines**: of the function below, without blank lines, comments and docstrings.
- **values, gradients**: the greatest difference from a plain definition in float64, relative to the greatest number
  of an array. Gradients are those of all arrays that the idea takes. The definitions
  ([`plain_ideas.py`](../tests/examples/plain_ideas.py)) use arrays of all pairs and no part of Attnax. Ideas in tiles
  run in tiles of 16 x 16 there.
- **tiles**: those of {tile} x {tile} pairs in which the masks of the idea let some pair attend, for {tiled} tokens;
  no kernel computes the others. An idea that leaves the mask to its caller has the share of a causal mask.
- **on a CPU**: what runs in the program of the value and all gradients for {long} tokens. Tiles need O(T + S) memory;
  "an array of all pairs" is one that the idea itself makes. "Standard only": the idea mixes pairs, which every tiled
  kernel refuses and `standard_attention` computes.
- **lowered for cuda**: the Pallas kernels in the same program for an H100, or XLA's own code. Nothing here ran on a
  GPU.

{table}

The functions need these names:

```python
{imports}
```

`attend` is any kernel, and `**options` are those of a kernel, such as `mask`. The pictures show the weight of each
value in each result of one head, for 64 random queries: blue is positive, red negative.

{sections}
## How to use one

```python
x = jnp.ones((1, 4, 64, 8))
sink_attention(x, x, x, jnp.zeros(4), mask=masks.causal()).shape  # (1, 4, 64, 8)
```
"""

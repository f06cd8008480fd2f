"""What a published idea is in the gallery, and what is measured of it; attention_gallery.py has the ideas.

Every figure is measured: lines are those of the source, tiles those of the masks that an idea gives its kernel, and the
places where it runs those of the programs that JAX lowers.
"""

import ast
import contextlib
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from attnax import EncoderBlock, MultiHeadAttention, TransformerConfig, TransformerLM, flash_attention, masks
from attnax.masks import count_tiles, index_grid, resolve_masks, takes_mask_objects

IDEAS: list["Idea"] = []
TILE = 64
LENGTH = 512  # of the masks whose tiles are counted
LONG = 2560  # of the programs: a number that no other axis has, and more than a tile

Arrays = dict[str, Any]


class Place(NamedTuple):
    """Where an idea stands in a model.

    Attributes:
        text: the code that puts it there, in words of the page, with {name} for the idea's.
        make: `(code, rngs, config) -> model`.
    """

    text: str
    make: Callable[[Any, nnx.Rngs, TransformerConfig], Any]


@dataclasses.dataclass(frozen=True)
class Idea:
    """A published idea and its code.

    Attributes:
        title: of the idea.
        paper: authors and year.
        link: the paper's number on arXiv, or an address.
        code: a function or a class; its docstring says what the idea is.
        place: in a model, if it has one.
    """

    title: str
    paper: str
    link: str
    code: Any
    place: Place | None

    @property
    def name(self) -> str:
        """The name of the function, or of the class in the letters of a function."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.code.__name__).lower()

    @property
    def source(self) -> str:
        """The code without its decorators and its docstring."""
        text = textwrap.dedent(inspect.getsource(self.code))
        tree = ast.parse(text).body[0]
        doc, lines = tree.body[0], text.splitlines()
        rest = "\n".join(lines[doc.end_lineno :]).strip("\n")
        return "\n".join([*lines[tree.lineno - 1 : doc.lineno - 1], rest])

    @property
    def num_lines(self) -> int:
        """Lines of the source, without blank ones and comments."""
        return sum(bool(line.strip()) and not line.strip().startswith("#") for line in self.source.splitlines())

    def exactness(self, plain: Callable[..., Any]) -> tuple[float, float]:
        """The greatest differences of values and gradients from a plain definition, in float64."""
        with jax.enable_x64(True):
            runs, arrays = self.both(plain)
            found, expected = (values_and_gradients(run, arrays) for run in runs)
        # The gradient of a head that the result does not need is 0.
        differences = {name: abs(found[name] - x).max() / (abs(x).max() or 1.0) for name, x in expected.items()}
        return float(differences.pop("out")), float(np.max([*differences.values()]))

    def runs_on(self, platform: str) -> str:
        """What computes the values and gradients in the program for a platform."""
        try:
            text = self.lower(platform)
        except NotImplementedError as error:
            if "one pair of query and key at a time" not in str(error):
                raise
            return "standard only"
        if platform == "cpu":
            return "tiles, and an array of all pairs" if f"{LONG}x{LONG}" in text else "tiles"
        return ", ".join(sorted(set(re.findall(r"attnax_(\w+)", text)))) or "XLA"

    def lower(self, platform: str) -> str:
        """The program of the value and all gradients, lowered for a platform from shapes alone."""
        gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
        mesh = AbstractMesh((1,), ("gpus",), (AxisType.Auto,), abstract_device=gpu)
        with jax.sharding.use_abstract_mesh(mesh) if platform == "cuda" else contextlib.nullcontext():
            loss, *arguments = self.loss(platform)
            return jax.jit(jax.value_and_grad(loss)).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()

    def make(self, dtype: str, *, abstract: bool = False) -> Any:
        """A model of two layers: its weights are drawn by NumPy, or shapes."""
        config = TransformerConfig(
            vocab_size=64, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, value_head_dim=6, num_layers=2, d_ff=24,
            max_len=LONG, pos_emb_type="none", norm_type="rms",
            use_bias=False, dropout_rate=0.0, dtype=dtype, param_dtype=dtype,
        )  # fmt: skip
        assert self.place is not None
        shapes = nnx.eval_shape(lambda: self.place.make(self.code, nnx.Rngs(0), config))
        if abstract:
            return shapes
        graphdef, state = nnx.split(shapes)
        rng = np.random.default_rng(0)

        def draw(leaf: Any) -> Any:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return jax.random.key(0) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
            return jnp.asarray(normal(rng, leaf.shape, leaf.dtype))

        return nnx.merge(graphdef, jax.tree.map(draw, state))

    def caches(self) -> str:
        """The kinds of caches with which a model generates the tokens of its forward pass; "-" without a place."""
        if self.place is None:
            return "-"
        model, prompt = self.make("float32"), np.random.default_rng(4).integers(64, size=(2, 5))
        run, kinds = nnx.jit(lambda model, ids: model(ids)), []
        for kind in ("contiguous", "ring", "paged"):
            written = model.generate(prompt, max_new_tokens=4, cache=kind).tokens
            logits = run(model, np.concatenate([prompt, written], axis=1))
            if (logits[:, 4:-1].argmax(2) == written).all():
                kinds.append(kind)
        return ", ".join(kinds) or "none"

    def both(self, plain: Callable[..., Any]) -> tuple[tuple[Callable[..., Any], Callable[..., Any]], Any]:
        """The idea and its plain definition as functions of arrays, and the arrays."""
        raise NotImplementedError

    def loss(self, platform: str) -> tuple[Any, ...]:
        """A loss of the idea for `LONG` tokens, and the shapes of its arguments."""
        raise NotImplementedError

    def tiles(self) -> tuple[int, int]:
        """Tiles in which some pair attends, and all tiles, of all rows, heads and calls of the kernel."""
        raise NotImplementedError

    def picture(self, length: int = 64) -> np.ndarray:
        """A matrix (T, S) to look at."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class OfHeads(Idea):
    """An idea that is a function of queries, keys and values.

    Attributes:
        takes: the axes of each array.
        gets: further arguments for a length.
        prepares: the arguments from the arrays.
    """

    takes: dict[str, str]
    gets: Callable[[int], Arrays]
    prepares: Callable[[Arrays], Arrays]

    @property
    def kernel(self) -> Any:
        """The kernel that the idea uses by default."""
        return inspect.signature(self.code).parameters["attend"].default

    def run(self, arrays: Arrays, length: int, **options: Any) -> Any:
        """The output; an idea that leaves the mask to its caller gets a causal one."""
        if "options" in inspect.signature(self.code).parameters:
            options["mask"] = masks.causal()
        arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
        return self.code(**self.prepares(arrays), **self.gets(length), **options)

    def shapes(self, length: int, **sizes: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays, with T queries, and a prefix or text of P tokens."""
        known = {"B": 2, "N": 4, "M": 8, "K": 2, "H": 8, "V": 6, "F": 16, "T": length, "P": length // 2}
        known |= {"L": length // 8} | sizes
        return {name: tuple(known.get(axis) or int(axis) for axis in axes) for name, axes in self.takes.items()}

    def draw(self, length: int, dtype: Any) -> Arrays:
        """Normal arrays, those of matrices divided by the root of their fan-in."""
        rng = np.random.default_rng(len(self.name))
        return {name: normal(rng, shape, dtype) for name, shape in self.shapes(length).items()}

    def both(self, plain: Callable[..., Any]) -> tuple[tuple[Callable[..., Any], Callable[..., Any]], Any]:
        length, options = 48, {}
        if self.kernel is flash_attention:
            options["attend"] = partial(flash_attention, block_size=16)
        runs = partial(self.run, length=length, **options), lambda arrays: plain(**arrays, **self.gets(length))
        return runs, self.draw(length, np.float64)

    def loss(self, platform: str) -> tuple[Any, ...]:
        shapes = self.shapes(LONG, H=64, V=64)
        options = {"attend": flash_attention} if platform == "cpu" else {}
        arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        return lambda arrays: self.run(arrays, LONG, **options).sum(), arrays

    def tiles(self) -> tuple[int, int]:
        visited = total = 0

        @takes_mask_objects
        def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
            nonlocal visited, total
            some, every = visited_tiles(options.get("mask"), (*query.shape[:3], key.shape[2]))
            visited, total = visited + some, total + every
            return self.kernel(query, key, value, **options)

        self.run(self.draw(LENGTH, np.float32), LENGTH, attend=attend)
        return visited, total

    def picture(self, length: int = 64) -> np.ndarray:
        """The factor of each value in each output of the first head: the output, where the values are unit vectors."""
        arrays = self.draw(length, np.float32)
        names = [name for name in arrays if name.endswith("value")]
        ends = np.cumsum([arrays[name].shape[2] for name in names])
        for name, end in zip(names, ends, strict=True):
            rows, heads, count, _ = arrays[name].shape
            unit = np.eye(count, ends[-1], int(end) - count, dtype=np.float32)
            arrays[name] = np.broadcast_to(unit, (rows, heads, *unit.shape))
        return np.asarray(self.run(arrays, length))[0, 0]


@dataclasses.dataclass(frozen=True)
class OfModel(Idea):
    """An idea that has a place in a model.

    Attributes:
        result: `(model, ids) -> array`, what is compared with the plain definition.
    """

    result: Callable[[Any, Any], Any]

    def both(self, plain: Callable[..., Any]) -> tuple[tuple[Callable[..., Any], Callable[..., Any]], Any]:
        graphdef, params, rest = nnx.split(self.make("float64"), nnx.Param, ...)
        ids = jnp.asarray(np.random.default_rng(2).integers(64, size=(2, 24)))

        def on_params(run: Callable[..., Any]) -> Callable[..., Any]:
            return lambda params: run(nnx.merge(graphdef, params["params"], rest), ids)

        return (on_params(self.result), on_params(plain)), {"params": params}

    def loss(self, platform: str) -> tuple[Any, ...]:
        graphdef, params, rest = nnx.split(self.make("float32", abstract=True), nnx.Param, ...)
        ids = jax.ShapeDtypeStruct((1, LONG), jnp.int32)
        return lambda params, rest, ids: self.result(nnx.merge(graphdef, params, rest), ids).sum(), params, rest, ids

    def tiles(self) -> tuple[int, int]:
        return visited_tiles(self.make("float32").decoder.self_mask, (1, 1, LENGTH, LENGTH))

    def picture(self, length: int = 64) -> np.ndarray:
        """How much each hidden state depends on the embedding of each token: the length of a gradient."""
        graphdef, params, rest = nnx.split(self.make("float32"), nnx.Param, ...)
        direction = jnp.asarray(np.random.default_rng(3).normal(size=16), jnp.float32)
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        leaves = [leaf for _, leaf in paths]
        [index] = [n for n, (path, _) in enumerate(paths) if "'tokens'" in jax.tree_util.keystr(path)]

        def run(table: Any) -> Any:
            changed = treedef.unflatten([*leaves[:index], table, *leaves[index + 1 :]])
            return nnx.merge(graphdef, changed, rest).run(jnp.arange(length)[None]).hidden[0] @ direction

        return np.linalg.norm(jax.jacrev(run)(leaves[index]), axis=2)


def idea(
    title: str,
    paper: str,
    link: str,
    *,
    takes: dict[str, str] | None = None,
    gets: Callable[[int], Arrays] = lambda length: {},
    prepares: Callable[[Arrays], Arrays] = lambda arrays: arrays,
    place: Place | None = None,
    result: Callable[[Any, Any], Any] = lambda model, ids: model.run(ids).hidden,
) -> Callable[[Any], Any]:
    """Adds a function of heads (`takes`), or a part of a model, to the gallery."""

    def add(code: Any) -> Any:
        if takes is not None:
            IDEAS.append(OfHeads(title, paper, link, code, place, takes, gets, prepares))
        else:
            IDEAS.append(OfModel(title, paper, link, code, place, result))
        return code

    return add


class PerHead(nnx.Module):
    """An attention function with a number for each head."""

    takes_mask_objects = True

    def __init__(self, code: Any, config: Any):
        self.code, self.numbers = code, nnx.Param(jnp.zeros((config.num_heads,), config.dtype))

    def __call__(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        return self.code(query, key, value, self.numbers[...], **options)


def with_blocks(make_block: Callable[..., Any], **fields: Any) -> Callable[..., Any]:
    """Makes a language model from `make_block(code, rngs, config)`, with some fields of the config changed."""
    return lambda code, rngs, config: TransformerLM(
        rngs, dataclasses.replace(config, **fields), make_block=partial(make_block, code)
    )


def in_layer(hook: str) -> Place:
    """An argument of MultiHeadAttention."""

    def make_block(code: Any, rngs: nnx.Rngs, config: Any) -> EncoderBlock:
        layer = MultiHeadAttention(rngs, config, **{hook: code(rngs, config)})
        return EncoderBlock(rngs, config, attention=layer)

    return Place(f"`MultiHeadAttention(rngs, config, {hook}={{name}}(rngs, config))`", with_blocks(make_block))


def in_block(**fields: Any) -> Place:
    """In place of MultiHeadAttention; `fields` of the config are the heads that a cache stores."""
    make = with_blocks(lambda code, rngs, config: EncoderBlock(rngs, config, attention=code(rngs, config)), **fields)
    return Place("`EncoderBlock(rngs, config, attention={name}(rngs, config))`", make)


AS_MODEL = Place("`{name}(rngs, config)`", lambda code, rngs, config: code(rngs, config))
AS_BLOCK = Place("`TransformerLM(rngs, config, make_block={name})`", with_blocks(lambda code, *given: code(*given)))
AS_KERNEL = Place(
    "`TransformerLM(rngs, config, attention_fn={name})`",
    lambda code, rngs, config: TransformerLM(rngs, config, attention_fn=code),
)
AS_KERNEL_WITH_NUMBERS = Place(
    "`EncoderBlock(rngs, config, attention_fn=...)`, with a module that holds the heads' numbers and calls `{name}`",
    with_blocks(lambda code, rngs, config: EncoderBlock(rngs, config, attention_fn=PerHead(code, config))),
)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A normal array; one of two axes is divided by the root of its fan-in."""
    return (rng.normal(size=shape) / (shape[0] ** 0.5 if len(shape) == 2 else 1)).astype(dtype)


def values_and_gradients(run: Callable[[Any], Any], arrays: Arrays) -> dict[str, np.ndarray]:
    """The output of `run(arrays)` as "out", and the gradient of each array for one cotangent, by its path."""
    out, pull = jax.vjp(jax.jit(run), jax.tree.map(jnp.asarray, arrays))
    [gradients] = pull(jnp.asarray(np.random.default_rng(1).normal(size=out.shape), out.dtype))
    return {"out": np.asarray(out)} | {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(gradients)
    }


def visited_tiles(mask: Any, shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """Tiles in which a mask lets some pair attend, and all tiles, of scores (B, N, T, S)."""
    mask, _ = resolve_masks("visited_tiles", mask, None, shape)
    keep = np.broadcast_to(True if mask is None else np.asarray(mask(*index_grid(*shape))), shape)
    counts = [count_tiles(pairs, (TILE, TILE))[0] for pairs in keep.reshape(-1, *shape[2:])]
    return sum(sum(count) - count.empty for count in counts), sum(map(sum, counts))

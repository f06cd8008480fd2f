"""Attention on the shards of a mesh: batch and heads may be cut.

With Explicit axes the type of an array states the cut, and under the mesh of a `Layout` its rules do. A kernel runs
under `jax.shard_map` on the shards of each device, and no array is gathered. Masks and score mods still see global
indices. With other Auto axes the cut is unknown while a program is traced and lowered, and `on_shards` chooses one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P, lax
from jax.sharding import AxisType, NamedSharding

from attnax.checks import is_concrete
from attnax.kernels.score_mods import SoftCap
from attnax.masks import Causal, Mask, SlidingWindow
from attnax.pytrees import pytree_dataclass
from attnax.sharding import current_mesh, cut_of
from attnax.typing import Array, Index, ScoreMod

__all__ = ["AutoCut", "Offset", "Shards", "auto_cut", "find_shards", "on_shards"]


@pytree_dataclass
class Offset:
    """The first row of the batch and the first head of a shard."""

    row: Array  # () int32
    head: Array  # () int32

    @classmethod
    def of(cls, batch: Any, heads: Any, query: Array) -> Offset:
        """That of a device inside of a `shard_map`, from the mesh axes that cut batch and heads and its own queries."""
        first = (_shard_index(names) * size for names, size in zip((batch, heads), query.shape, strict=False))
        return cls(*(jnp.asarray(x, jnp.int32) for x in first))

    def mask(self, mask: Mask | None) -> Mask | None:
        """The mask as a shard sees it; one that reads neither row nor head stays, so that engines know it."""
        return mask if mask is None or isinstance(mask, Causal | SlidingWindow) else ShardMask(mask, self)

    def score_mod(self, score_mod: ScoreMod | None) -> ScoreMod | None:
        """The score mod as a shard sees it, likewise."""
        return score_mod if score_mod is None or isinstance(score_mod, SoftCap) else ShardScoreMod(score_mod, self)

    def moved(self, b: Index, h: Index) -> tuple[Array, Array]:
        """The global row and head, for a row and a head of the shard."""
        return jnp.add(b, self.row), jnp.add(h, self.head)


@pytree_dataclass
class ShardMask(Mask):
    """A mask of global indices, read by a shard."""

    mask: Mask
    offset: Offset

    @property
    def is_opaque(self) -> bool:
        return self.mask.is_opaque

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return self.mask(*self.offset.moved(b, h), q, kv)

    def tile(self, b: Index, h: Index, q_range: Any, kv_range: Any) -> tuple[Any, Any]:
        return self.mask.tile(*self.offset.moved(b, h), q_range, kv_range)

    def keys_per_query(self, seq_kv: int) -> int | None:
        return self.mask.keys_per_query(seq_kv)


@pytree_dataclass
class ShardScoreMod:
    """A score mod of global indices, read by a shard."""

    score_mod: ScoreMod
    offset: Offset

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return self.score_mod(scores, *self.offset.moved(b, h), q, kv)


@dataclasses.dataclass(frozen=True)
class Shards:
    """The cut of query, key and value; `batch`, `heads` and `kv_heads` are entries of a `PartitionSpec`.

    Where heads are cut and `kv_heads` are not, the heads of a device share one head of the keys.
    """

    mesh: Any
    batch: Any
    heads: Any
    kv_heads: Any
    length: Any = None  # of queries and keys

    @property
    def is_auto(self) -> bool:
        """Whether the mesh is that of a layout, whose cut stands in no type."""
        return set(self.mesh.axis_types) == {AxisType.Auto}

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes that cut batch or heads."""
        return frozenset((*_names(self.batch), *_names(self.heads)))

    def local(self, x: Any, *, of_keys: bool = False) -> jax.ShapeDtypeStruct:
        """The shape and dtype of a device's shard of x."""
        heads = x.shape[1] // self._count(self.kv_heads if of_keys else self.heads)
        if of_keys and self._shares_keys:
            heads = 1
        length = x.shape[2] // self._count(self.length)
        return jax.ShapeDtypeStruct((x.shape[0] // self._count(self.batch), heads, length, *x.shape[3:]), x.dtype)

    def whole(self, tree: Any) -> Any:
        """Masks and score mods with all arrays uncut, also arrays in closures, partials and default arguments."""
        return self._whole(tree, ())

    def _whole(self, tree: Any, around: tuple[Any, ...]) -> Any:
        """`whole` inside the closures of the functions `around`; a recursive function is in its own closure."""
        return jax.tree.map(
            lambda x: self._whole_leaf(x, around), tree, is_leaf=lambda node: isinstance(node, functools.partial)
        )

    def _whole_leaf(self, x: Any, around: tuple[Any, ...]) -> Any:
        if isinstance(x, jax.Array):
            return self._cut(x, P())
        if isinstance(x, functools.partial):
            function, arguments, keywords = self._whole((x.func, x.args, x.keywords), around)
            return type(x)(function, *arguments, **keywords)
        is_seen = any(x is function for function in around)
        if is_seen or not isinstance(x, types.FunctionType) or types.CellType() in (x.__closure__ or ()):
            return x
        held = [cell.cell_contents for cell in x.__closure__ or ()], x.__defaults__, x.__kwdefaults__
        whole = self._whole(held, (*around, x))
        if all(new is old for new, old in zip(jax.tree.leaves(whole), jax.tree.leaves(held), strict=True)):
            return x
        contents, defaults, keywords = whole
        cells = tuple(map(types.CellType, contents)) if x.__closure__ else None
        made = types.FunctionType(x.__code__, x.__globals__, x.__name__, defaults, cells)
        made.__kwdefaults__ = keywords
        return made

    def run(self, attend: Callable[..., Any], query: Array, key: Array, value: Array, operands: Any) -> Any:
        """Runs `attend(offset, query, key, value, operands)` on each device; results have axes (B, N, ...)."""
        spec, of_keys = (P(self.batch, heads, self.length) for heads in (self.heads, self.kv_heads))

        num_heads, kv_heads = query.shape[1], key.shape[1]

        def local(query: Array, key: Array, value: Array, operands: Any) -> Any:
            offset = Offset.of(self.batch, self.heads, query)
            if self._shares_keys:
                first = offset.head // (num_heads // kv_heads)
                key, value = (lax.dynamic_slice_in_dim(x, first, 1, axis=1) for x in (key, value))
            return attend(offset, query, key, value, operands)

        run = jax.shard_map(
            local,
            mesh=None if self.is_auto else self.mesh,
            in_specs=(spec, of_keys, of_keys, P()),
            out_specs=spec,
            axis_names=self._manual,
            check_vma=False,  # masks and score mods were traced outside of the mesh, as not varying
        )
        arrays = self._cut(query, spec), self._cut(key, of_keys), self._cut(value, of_keys)
        return run(*arrays, self.whole(operands))

    @property
    def _shares_keys(self) -> bool:
        return bool(_names(self.heads)) and not _names(self.kv_heads)

    @property
    def _manual(self) -> set[str]:
        """The axes of the `shard_map`; outside of jit, JAX before 0.11 takes only all Explicit axes together."""
        if self.is_auto:  # kernels of a TPU run where no axis is left to XLA
            return set(self.mesh.axis_names)
        if jax.__version_info__ >= (0, 11):
            return set(self.axes)
        types = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return {name for name, kind in types if kind == AxisType.Explicit}

    def _count(self, names: Any) -> int:
        return math.prod(self.mesh.shape[name] for name in _names(names))

    def _cut(self, x: Array, spec: P) -> Array:
        """The array cut by `spec`, without communication if the array was cut less before."""
        have = jax.typeof(x).sharding
        if self.is_auto or _entries(have.spec, x.ndim) == _entries(spec, x.ndim):
            return x
        return jax.sharding.reshard(x, NamedSharding(self.mesh, spec))


def find_shards(caller: str, query: Array, key: Array, value: Array, *, rings: bool = False) -> Shards | None:
    """The cut of the operands by Explicit mesh axes, or by the layout around the program; None if nothing cuts them.

    Args:
        caller: the name in errors.
        query: (B, N, T, H).
        key: (B, K, S, H).
        value: (B, K, S, Hv).
        rings: whether a layout may cut the sequence, which takes a ring.

    Raises:
        NotImplementedError: an axis cuts a sequence, the width of heads, or heads that the keys lack.
    """
    mesh: Any = current_mesh()
    if mesh is not None:
        return _of_layout(mesh, query, key, rings=rings)
    cuts = {name: _cut_by(x) for name, x in (("query", query), ("key", key), ("value", value))}
    if not any(any(cut) for cut in cuts.values()):
        return None
    got = ", ".join(f"{name}: {P(*cut)}" for name, cut in cuts.items())
    if any(cut[2] or cut[3] for cut in cuts.values()):
        raise NotImplementedError(
            f"{caller}: mesh axes may cut batch and heads; got {got}. Where the sequence is cut use ring_attention in "
            "jax.shard_map; give each device whole heads."
        )
    batches, heads = ({cut[axis] for cut in cuts.values()} - {()} for axis in (0, 1))
    of_keys = {cuts[name][1] for name in ("key", "value")} - {()}
    if len(batches) > 1 or len(heads) > 1 or (of_keys and not cuts["query"][1]):
        raise NotImplementedError(
            f"{caller}: query, key and value must be cut alike; got {got}. Use jax.sharding.reshard."
        )
    cut_array = next(x for x, cut in zip((query, key, value), cuts.values(), strict=True) if any(cut))
    sharding: Any = cut_array.sharding if is_concrete(cut_array) else jax.typeof(cut_array).sharding
    mesh = sharding.mesh
    by_head = next(iter(heads), ())
    count = math.prod(mesh.shape[name] for name in by_head)
    if key.shape[1] % count and count % key.shape[1]:
        raise NotImplementedError(
            f"{caller}: the {key.shape[1]} heads of keys cannot be cut {count} times like the heads of the query; got "
            f"{got}. Cut the heads less, or repeat the keys."
        )
    cut_keys = by_head if key.shape[1] % count == 0 else ()
    return Shards(mesh, next(iter(batches), None), by_head or None, cut_keys or None)


def _of_layout(mesh: Any, query: Array, key: Array, *, rings: bool) -> Shards | None:
    """The cut by the rules of a layout; where these do not divide a size, it stays whole."""
    of_queries, length = (cut_of(mesh, x.shape[2], "length") for x in (query, key))
    if not of_queries or not rings:
        length = ()
    batch, heads = cut_of(mesh, query.shape[0], "batch"), cut_of(mesh, query.shape[1], "heads")
    kv_heads, count = key.shape[1], math.prod(mesh.shape[name] for name in heads)
    if kv_heads % count and count % kv_heads:
        heads = ()
    if not batch and not heads and not length:
        return None
    # An axis that no array mentions costs a sum of gradients over it; one of a single device may cut anything.
    batch += tuple(name for name, size in mesh.shape.items() if size == 1)
    cut_keys = heads if kv_heads % count == 0 else ()
    return Shards(mesh, batch or None, heads or None, cut_keys or None, length or None)


class AutoCut(NamedTuple):
    """The cut of a call by a mesh with Auto axes."""

    spec: P | None  # of axes (B, N or K); None without such a mesh
    batch: int  # of one shard
    kv_heads: int


def auto_cut(batch: int, kv_heads: int) -> AutoCut:
    """The cut that `on_shards` chooses for a call under the current mesh.

    The mesh axes in turn cut the batch if they divide it, else the heads of the keys if they divide these.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or set(mesh.axis_types) != {AxisType.Auto}:
        return AutoCut(None, batch, kv_heads)
    sizes, cut = [batch, kv_heads], tuple[list[str], list[str]](([], []))
    for name, size in mesh.shape.items():
        axis = next((axis for axis in (0, 1) if sizes[axis] % size == 0), None)
        if axis is not None:
            sizes[axis] //= size
            cut[axis].append(name)
    return AutoCut(P(*(tuple(names) or None for names in cut)), *sizes)


def on_shards(run: Callable[..., Any], query: Array, key: Array, *others: Array) -> Any:
    """`run(query, key, *others)`, in a `shard_map` if a mesh with Auto axes is around the call.

    Arrays and results of three and more axes begin with batch and heads. XLA moves arrays that are cut otherwise.
    """
    spec, arrays = auto_cut(*key.shape[:2]).spec, (query, key, *others)
    if spec is None:
        return run(*arrays)
    in_specs = tuple(spec if x.ndim > 2 else P() for x in arrays)
    # check_vma=False: the kernels of splash attention do not say over which axes they vary.
    return jax.shard_map(run, in_specs=in_specs, out_specs=spec, check_vma=False)(*arrays)


def _cut_by(x: Array) -> tuple[tuple[str, ...], ...]:
    """The Explicit mesh axes that cut each axis of an array."""
    sharding = jax.typeof(x).sharding
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    return tuple(
        tuple(name for name in _names(entry) if types[name] == AxisType.Explicit and sharding.mesh.shape[name] > 1)
        for entry in _entries(sharding.spec, x.ndim)
    )


def _entries(spec: Any, ndim: int) -> tuple[Any, ...]:
    return tuple(_names(entry) for entry in (*spec, *(None,) * (ndim - len(spec))))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _shard_index(names: Any) -> Any:
    return lax.axis_index(_names(names)) if names else 0

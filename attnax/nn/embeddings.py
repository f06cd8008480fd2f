"""Token ids and positions as vectors."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from attnax.checks import check_shape, is_concrete, wide_dtype
from attnax.config import TransformerConfig
from attnax.kernels.score_mods import relative_bias_mod
from attnax.nn.dropout import Dropout
from attnax.nn.linear import make_initializer, product, wide_gradient
from attnax.nn.norms import norm_of
from attnax.sharding import constrain, current_mesh, gather, partition, stream_axes
from attnax.typing import Array, ArrayLike, Float, Int, ScoreMod

__all__ = [
    "LearnedPositionalEmbedding",
    "PositionalEncoding",
    "RelativePositionBias",
    "TokenEmbedding",
    "TransformerEmbedding",
    "take_rows",
]

_TABLE = "vocab", "embed"  # the axes of a table of tokens


class TokenEmbedding(nnx.Module):
    """A row of a table for each token id; `attend` gives the logits where input and output share the table.

    Args:
        rngs: for the initial table.
        vocab_size: rows.
        d_model: width.
        embedding_init: initialiser `(key, shape, dtype)` of the table, by default normal with standard deviation
            1 / sqrt(d_model): vectors have unit length, and the logits of tied embeddings unit variance.
        dtype: of the result.
        param_dtype: of the table.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        vocab_size: int,
        d_model: int,
        *,
        embedding_init: Any = None,
        dtype: Any = None,
        param_dtype: Any = "float32",
    ):
        self.vocab_size, self.dtype = vocab_size, dtype or param_dtype
        init = make_initializer("normal", d_model**-0.5) if embedding_init is None else embedding_init
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, d_model), param_dtype), axes=_TABLE)

    def __call__(self, input_ids: Int[ArrayLike, "*L"]) -> Float[Array, "*L D"]:
        """The vectors of `input_ids`.

        Raises:
            ValueError: a concrete id outside the vocabulary; under jit its vector is NaN.
        """
        ids = _as_array(input_ids)
        _check_ids(ids, self.vocab_size, "TokenEmbedding", "token ids")
        return _rows_of(self.embedding[...], jnp.asarray(ids, jnp.int32)).astype(self.dtype)

    def check(self, input_ids: Int[ArrayLike, "*L"]) -> None:
        """Raises ValueError for ids that are not integers, and for concrete ids outside the vocabulary."""
        _check_ids(_as_array(input_ids), self.vocab_size, "TokenEmbedding", "token ids")

    def attend(self, x: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        """Products of x with every row, in float32, or in float64 for a float64 x."""
        table = self.embedding[...]
        if self.vocab_size > table.shape[1]:
            table = wide_gradient(table)
        table = gather(table.astype(x.dtype), *_TABLE)
        rows = x if current_mesh() is not None else x.reshape(-1, x.shape[-1])  # one matrix product, as in Linear
        last = (((rows.ndim - 1,), (1,)), ((), ()))
        logits = product(rows, table, last, preferred_element_type=wide_dtype(x.dtype))
        return logits.reshape(*x.shape[:-1], self.vocab_size)


class _PositionTable(nnx.Module):
    """Adds a vector for each position: a row of the subclass's table."""

    def __call__(
        self,
        x: Float[Array, "B T D"],
        start: int | Int[ArrayLike, ""] = 0,
        *,
        position_ids: Int[ArrayLike, "#B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """x plus the vectors of positions start ... start + T - 1, or of `position_ids`.

        Raises:
            ValueError: a concrete position past the table (under jit its vector is NaN), or arrays of other shapes.
        """
        table, name = self._table(x.dtype), type(self).__name__
        check_shape(name, "x", x, ("batch", "length", table.shape[1]))
        check_shape(name, "start", start, (), integers=True)
        if position_ids is None:
            positions: ArrayLike = start + np.arange(x.shape[1])[None, :]
        else:
            check_shape(name, "position_ids", position_ids, (1, x.shape[1]), x.shape[:2], integers=True)
            # Padding, at -1, gets position 0: no query attends it. Concrete positions stay concrete.
            positions = (np if is_concrete(position_ids) else jnp).maximum(position_ids, 0)
        return x + _look_up(table, positions, name, "positions").astype(x.dtype)

    def _table(self, dtype: Any) -> Array:
        """(positions, d_model), for vectors that are added in `dtype`."""
        raise NotImplementedError


class PositionalEncoding(_PositionTable):
    """Adds the sinusoids of Vaswani et al., section 3.5: sines in even features, cosines in odd ones.

    Args:
        max_len: number of positions.
        d_model: even width.
    """

    def __init__(self, max_len: int, d_model: int):
        if d_model % 2:
            raise ValueError(f"PositionalEncoding: d_model must be even; got d_model={d_model}.")
        self.max_len, self.d_model = max_len, d_model

    def _table(self, dtype: Any) -> Array:
        frequency = 10000.0 ** -(np.arange(0, self.d_model, 2, dtype=np.float64) / self.d_model)
        angles = np.arange(self.max_len, dtype=np.float64)[:, None] * frequency
        table = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(self.max_len, self.d_model)
        return jnp.asarray(table, wide_dtype(dtype))


class LearnedPositionalEmbedding(_PositionTable):
    """Adds a learned vector for each position.

    Args:
        rngs: for the initial table, normal with standard deviation 0.02.
        num_positions: rows of the table, without `offset`.
        d_model: width.
        offset: rows before the row of position 0.
        param_dtype: of the table.
    """

    def __init__(
        self, rngs: nnx.Rngs, *, num_positions: int, d_model: int, offset: int = 0, param_dtype: Any = "float32"
    ):
        self.offset, shape = offset, (offset + num_positions, d_model)
        self.embedding = nnx.Param(
            make_initializer("normal", 0.02)(rngs.params(), shape, param_dtype), axes=(None, None)
        )

    def _table(self, dtype: Any) -> Array:
        return self.embedding[...][self.offset :]


class TransformerEmbedding(nnx.Module):
    """Token embeddings, scaled, plus the token types and positions that a config adds, normalised, through dropout.

    Args:
        rngs: for the initial tables and the stored dropout stream.
        config: a TransformerConfig.
        own_tokens: whether the module has a table of token embeddings; if not, every call takes a table.
    """

    def __init__(self, rngs: nnx.Rngs, config: TransformerConfig, *, own_tokens: bool = True):
        init = None  # rows of unit length: "lecun_normal" with d_model as its fan
        if config.embedding_init != "lecun_normal":
            init = make_initializer(config.embedding_init, config.init_std)
        dtypes: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        table = partial(TokenEmbedding, rngs, d_model=config.d_model, **dtypes)
        self.tokens: Any = nnx.data(table(vocab_size=config.vocab_size, embedding_init=init) if own_tokens else None)
        self.positions: Any = nnx.data(None)
        if config.pos_emb_type == "sinusoidal":
            self.positions = nnx.data(PositionalEncoding(config.max_len, config.d_model))
        elif config.pos_emb_type == "learned":
            self.positions = nnx.data(
                LearnedPositionalEmbedding(
                    rngs,
                    num_positions=config.max_len,
                    d_model=config.d_model,
                    offset=config.position_offset,
                    param_dtype=config.param_dtype,
                )
            )
        init = make_initializer("normal", 0.02)
        self.types = nnx.data(
            table(vocab_size=config.num_token_types, embedding_init=init) if config.num_token_types else None
        )
        self.norm = nnx.data(norm_of(config, rngs) if config.embedding_norm else None)
        self.scale = config.embedding_scale
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)

    @jax.named_scope("embedding")
    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        tokens: TokenEmbedding | None = None,
        position_ids: Int[ArrayLike, "#B T"] | None = None,
        token_type_ids: Int[ArrayLike, "B T"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        """The vectors of `input_ids`, at positions 0 ... T - 1 or `position_ids`, of type 0 or `token_type_ids`.

        Args:
            input_ids: (batch, T).
            tokens: the table of token embeddings for a module without one.
            position_ids: (batch or 1, T).
            token_type_ids: (batch, T).
            deterministic: no dropout.
            rngs: of the dropout.

        Raises:
            ValueError: a concrete id or position past its table (under jit its vector is NaN), arrays of other shapes,
                token types without a table, or not exactly one table of token embeddings.
        """
        input_ids = _as_array(input_ids)
        check_shape("TransformerEmbedding", "input_ids", input_ids, ("batch", "length"))
        batch, length = input_ids.shape
        if position_ids is not None:
            check_shape("TransformerEmbedding", "position_ids", position_ids, (1, length), (batch, length))
        if token_type_ids is not None:
            token_type_ids = _as_array(token_type_ids)
            check_shape("TransformerEmbedding", "token_type_ids", token_type_ids, (batch, length))
        if (self.tokens is None) == (tokens is None):
            raise ValueError(
                "TransformerEmbedding: tokens must be given to a module without own_tokens, and to no other; "
                f"got own_tokens={self.tokens is not None}, tokens {'missing' if tokens is None else 'given'}."
            )
        if token_type_ids is not None and self.types is None:
            raise ValueError(
                "TransformerEmbedding: token_type_ids need num_token_types of the config; got num_token_types=0. "
                "Leave them out."
            )
        x = self.tokens(input_ids) if tokens is None else tokens(input_ids)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.types is not None:
            x = x + self.types(jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        if self.positions is not None:
            x = self.positions(x, position_ids=position_ids)
        if self.norm is not None:
            x = self.norm(x)
        return self.dropout(constrain(x, "batch", "length", None), deterministic=deterministic, rngs=rngs)


class RelativePositionBias(nnx.Module):
    """T5's learned bias of the scores by the bucket of `kv - q`, one table for a whole stack.

    Args:
        rngs: for the initial table, normal with standard deviation 1 / sqrt(d_model).
        config: a TransformerConfig.
        bidirectional: whether keys after the query have buckets of their own.

    References:
        C. Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2019,
        https://arxiv.org/abs/1910.10683.
    """

    def __init__(self, rngs: nnx.Rngs, config: TransformerConfig, *, bidirectional: bool):
        init = make_initializer("normal", config.d_model**-0.5)
        shape = (config.relative_buckets, config.num_heads)
        self.table = nnx.Param(init(rngs.params(), shape, config.param_dtype), axes=(None, None))
        self.max_distance, self.bidirectional = config.relative_max_distance, bidirectional
        self.score_mod()  # sizes that do not fit together are refused here rather than in the first call

    def score_mod(self) -> ScoreMod:
        """A score mod that adds the bias."""
        return relative_bias_mod(self.table[...], max_distance=self.max_distance, bidirectional=self.bidirectional)


def take_rows(table: Array, index: Array, **options: Any) -> Array:
    """`table.at[index].get(**options)`, sharded like the index: each device holds the whole table."""
    table, cut = jnp.asarray(table), jax.typeof(index).sharding
    if any(cut.spec):
        table = jax.sharding.reshard(table, jax.NamedSharding(cut.mesh, jax.P()))
        options["out_sharding"] = jax.NamedSharding(cut.mesh, jax.P(*cut.spec, *(None,) * (table.ndim - 1)))
    return table.at[index].get(**options)


def _as_array(ids: Any) -> ArrayLike:
    """Token ids as they are, or lists of numbers as an array, as models take them."""
    return ids if isinstance(ids, jax.Array | np.ndarray) else jnp.asarray(ids)


def _rows_of(table: Array, ids: Array) -> Array:
    """Rows of a table of tokens. A layout may cut its rows and its columns, and the ids."""
    mesh = current_mesh()
    if mesh is None:
        return _take(table, ids)
    of_table = of_vocab, of_width = partition(mesh, table.shape, _TABLE)
    of_ids = partition(mesh, ids.shape, stream_axes(ids.ndim + 1)[:-1])

    def local(table: Array, ids: Array) -> Array:
        if of_width is not None:  # its transpose scatters the gradients
            table = lax.all_gather(table, of_width, axis=1, tiled=True)
        if of_vocab is None:
            return _take(table, ids)
        size = table.shape[0]
        here = ids - lax.axis_index(of_vocab) * size
        is_here = (here >= 0) & (here < size)
        rows = jnp.where(is_here[..., None], _take(table, jnp.where(is_here, here, 0)), 0)
        known = (ids >= 0) & (ids < size * lax.axis_size(of_vocab))
        return jnp.where(known[..., None], lax.psum(rows, of_vocab), jnp.nan)

    return jax.shard_map(local, in_specs=(of_table, of_ids), out_specs=of_ids, check_vma=False)(table, ids)


def _take(table: Array, ids: Array) -> Array:
    # A negative index would count from the end. An index past the end gets the fill value.
    return take_rows(table, jnp.where(ids < 0, table.shape[0], ids), mode="fill", fill_value=jnp.nan)


def _look_up(table: Array, ids: ArrayLike, caller: str, what: str) -> Array:
    """Rows of the table. A concrete index outside of the table raises; a traced one gives NaN."""
    _check_ids(ids, table.shape[0], caller, what)
    return _take(table, jnp.asarray(ids, jnp.int32))


def _check_ids(ids: ArrayLike, size: int, caller: str, what: str) -> None:
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{caller}: {what} must be integers; got dtype={ids.dtype}.")
    if is_concrete(ids) and ids.size:
        known = np.asarray(ids)  # NumPy, because inside a jit even operations on known arrays are traced
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= size:
            raise ValueError(f"{caller}: {what} must be at least 0 and below {size}; got {low if low < 0 else high}.")

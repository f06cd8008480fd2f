"""A request: the arguments of a model's `generate`, checked and as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from attnax.checks import check_options, is_concrete
from attnax.generation.samplers import Sampler
from attnax.generation.text import Text
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Int

__all__ = ["Request", "RequestOptions", "longest", "make_request", "padded_length", "place_like", "row_keys"]


@pytree_dataclass
class Request:
    """The prompts to continue, and how.

    Attributes:
        ids: (batch, T) prompt.
        position_ids: (batch, T), each token's index within its row's text, -1 for padding.
        key: one typed key, one for each prompt, or one for each row; None where nothing is drawn.
        max_new_tokens: tokens to write at most.
        sampler: draws tokens; its arrays have a number for each row of the result.
        stops: (K, n), the sequences of tokens that end a row, filled with -1 on the left.
        fill: the token after the end.
        context: as in `Tokens`.
        earlier: the texts that the caches hold already, but for the last token of each row; of one row, or one for
            each prompt.
        num_samples: rows of the result for each prompt.
        prefill_chunk: tokens of a row that the model reads at once; None reads the whole prompt at once.
        earlier_length: room of the longest earlier text.
    """

    ids: Int[ArrayLike, "B T"]
    position_ids: Int[ArrayLike, "B T"]
    key: Array | None
    max_new_tokens: Int[ArrayLike, ""]
    sampler: Sampler
    stops: Int[ArrayLike, "K n"]
    fill: Int[ArrayLike, ""]
    context: Any = None
    earlier: Text | None = None
    num_samples: int = dataclasses.field(default=1, metadata={"static": True})
    prefill_chunk: int | None = dataclasses.field(default=None, metadata={"static": True})
    earlier_length: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def num_rows(self) -> int:
        """Rows of the result."""
        return self.ids.shape[0] * self.num_samples

    def row_keys(self) -> Array | None:
        """A key for each row, None where nothing is drawn.

        A token at position p is drawn with `fold_in(key, p)`, so a row's text depends on its key and prompt, not on
        other rows.
        """
        return None if self.key is None else row_keys(self.key, self.ids.shape[0], self.num_samples)

    @property
    def whole_length(self) -> int:
        """The tokens of a row of `as_one_prompt`, padding included."""
        length = self.ids.shape[1]
        return length if self.earlier is None else padded_length(self.earlier_length + length)

    @property
    def reads_at_once(self) -> bool:
        """Whether the model reads the prompt in one call, into empty caches."""
        return self.earlier is None and (self.prefill_chunk is None or self.whole_length <= self.prefill_chunk)

    def text(self, room: int) -> Text:
        """The text of each prompt with room for `room` tokens more, rounded up: few lengths share the loop."""
        size = padded_length(self.earlier_length + self.ids.shape[1] + room)
        if self.earlier is None:
            return Text.of_prompt(self.ids, self.position_ids, size)
        return self.earlier.with_prompt(self.ids, self.position_ids, size)

    def as_one_prompt(self) -> Request:
        """The request for a model that has not read the earlier text: that text begins the prompt."""
        if self.earlier is None:
            return self
        text = self.text(0)
        index = jnp.arange(text.ids.shape[1], dtype=jnp.int32)[None]
        position_ids = jnp.where(index < text.lengths[:, None], index, -1)
        return dataclasses.replace(self, ids=text.ids, position_ids=position_ids, earlier=None, earlier_length=0)

    def after_prompt(self) -> Request:
        """The request without all that the prompt needs: equal shapes for prompts of every length."""
        ids, position_ids = self.ids[:, :0], self.position_ids[:, :0]
        rest: dict[str, Any] = {"earlier": None, "prefill_chunk": None, "earlier_length": 0}
        return dataclasses.replace(self, ids=ids, position_ids=position_ids, key=None, context=None, **rest)


class RequestOptions(TypedDict, total=False):
    """The options of `make_request`, as `TransformerLM.generate` describes them."""

    sampler: Sampler | None
    key: Array | None
    padding_mask: Bool[ArrayLike, "B T"] | None
    end_token: int | Sequence[int] | None
    stop_sequences: Sequence[Sequence[int]]
    num_samples: int


def make_request(
    prompt_ids: Int[ArrayLike, "B T"],
    *,
    vocab_size: int,
    max_new_tokens: int,
    pad_token: int = 0,
    context: Any = None,
    pad_to: int | None = None,
    earlier: Text | None = None,
    prefill_chunk: int | None = None,
    caller: str = "make_request",
    **options: Unpack[RequestOptions],
) -> Request:
    """The arguments of a model's `generate`, checked; errors name the `caller`.

    JAX computes nothing here unless the prompt, its padding or an earlier text is traced. Then rows without a token and
    ids outside of the vocabulary are not refused; models read such ids as NaN. With `pad_to` the prompt gets padding on
    the right up to that length.

    A sampler's number for each row is (batch,) or, with several samples, (batch * num_samples,). With an `earlier`
    text, prompts may be empty.

    Raises:
        ValueError: arguments out of range, a row without a token, sampling without a key, a sampler of other rows, or a
            traced number of tokens or samples, end token or stop sequence.
        NotImplementedError: a traced prompt that Explicit mesh axes shard.
    """
    check_options("make_request", options, RequestOptions)
    num_samples, padding_mask = options.get("num_samples", 1), options.get("padding_mask")
    end_token, stop_sequences = options.get("end_token"), options.get("stop_sequences", ())
    _check_prompt(caller, prompt_ids, earlier)
    static = {"max_new_tokens": max_new_tokens, "num_samples": num_samples}
    for name, value in (static | {"end_token": end_token, "stop_sequences": stop_sequences}).items():
        if not all(map(is_concrete, jax.tree.leaves(value))):
            raise ValueError(
                f"{caller}: {name} must be known, since sizes depend on it; got a traced array. "
                "Make it static under jit."
            )
    for name, count in static.items():
        if count < 1:
            raise ValueError(f"{caller}: {name} must be at least 1; got {name}={count}.")
    if prompt_ids.shape[1]:
        _check_tokens(caller, "token ids", prompt_ids, vocab_size)
    ends, stops = _stops(caller, end_token, stop_sequences, vocab_size)
    xp = np if all(map(is_concrete, jax.tree.leaves((prompt_ids, padding_mask, earlier)))) else jnp
    ids, real = xp.asarray(prompt_ids, np.int32), _real_tokens(caller, xp, prompt_ids.shape, padding_mask, earlier)
    sampler = options.get("sampler") or Sampler()
    sampler = sampler.as_arrays(vocab_size).repeat_rows(ids.shape[0], num_samples)
    missing = ((0, 0), (0, max(0, (pad_to or 0) - ids.shape[1])))
    first = 0 if earlier is None else xp.asarray(earlier.lengths)[:, None]
    positions = xp.where(real, first + xp.cumsum(real, axis=1, dtype=np.int32) - 1, -1).astype(np.int32)
    return Request(
        ids=place_like(prompt_ids, xp.pad(ids, missing)),
        position_ids=place_like(prompt_ids, xp.pad(positions, missing, constant_values=-1)),
        key=_sampling_key(caller, sampler, options.get("key"), ids.shape[0], num_samples),
        max_new_tokens=np.asarray(max_new_tokens, np.int32),
        sampler=sampler,
        stops=stops,
        fill=np.asarray(ends[0] if ends else pad_token, np.int32),
        context=context,
        earlier=earlier,
        num_samples=num_samples,
        prefill_chunk=prefill_chunk,
        earlier_length=0 if earlier is None else padded_length(longest(earlier)),
    )


def longest(text: Text) -> int:
    """The tokens of the longest row; where lengths are traced, the room of the rows."""
    return int(np.asarray(text.lengths).max()) if is_concrete(text.lengths) else text.ids.shape[1]


def place_like(given: Any, made: ArrayLike) -> ArrayLike:
    """`made`, an array computed from `given`, on the devices of `given`.

    On a mesh with Explicit axes every device gets the whole array, since caches are not sharded. Without a mesh around
    the call (`jax.set_mesh`) its axes become Auto: caches that the program makes are on no mesh, which JAX refuses.
    """
    if not (isinstance(given, jax.Array) and is_concrete(given) and given.committed):
        return made
    sharding = given.sharding
    if isinstance(sharding, jax.NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        mesh = sharding.mesh
        if jax.sharding.get_abstract_mesh().empty:
            mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
        sharding = jax.NamedSharding(mesh, jax.P())
    return jax.device_put(made, sharding)


def padded_length(length: int) -> int:
    """`length` rounded up to one of a few lengths, so that a few programs serve all.

    The lengths are 1, powers of 2 from 32 to 512, and then four lengths up to each next power of 2.
    """
    if length == 1:
        return 1
    power = max(32, 1 << (length - 1).bit_length())
    step = power // 8
    return power if power <= 512 else -(-length // step) * step


def row_keys(key: Array, batch: int, num_samples: int = 1) -> Array:
    """One key for each row: `key` itself if it holds that many, else `fold_in(key, row)`.

    With several samples, `key` may hold one key for each prompt; the samples then draw with `fold_in(key, sample)`.

    Raises:
        ValueError: not a typed key, or another number of keys.
    """
    _check_keys("row_keys", key, batch, num_samples)
    if key.shape == (batch * num_samples,):
        return key
    if key.shape:
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        return fold(key, jnp.arange(num_samples)).reshape(-1)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch * num_samples))


def _check_prompt(caller: str, prompt_ids: ArrayLike, earlier: Text | None) -> None:
    """Raises ValueError or NotImplementedError for a prompt of another shape, or a prompt that a mesh shards."""
    if prompt_ids.ndim != 2 or 0 in (prompt_ids.shape if earlier is None else prompt_ids.shape[:1]):
        raise ValueError(
            f"{caller}: prompt_ids must be (batch, length) with at least one row and at least one token; "
            f"got {prompt_ids.shape}. Give token ids, [[1, 2, 3]] for one prompt; a tokenizer makes them of text."
        )
    if not is_concrete(prompt_ids) and any(jax.typeof(prompt_ids).sharding.spec):
        raise NotImplementedError(
            f"{caller}: mesh axes that are Explicit may not cut a traced prompt; got {jax.typeof(prompt_ids)}. "
            "Give each device all of it, jax.sharding.reshard(prompt_ids, jax.P()), or its rows in jax.shard_map."
        )


def _real_tokens(
    caller: str, xp: Any, shape: tuple[int, ...], padding_mask: ArrayLike | None, earlier: Text | None
) -> Any:
    """True for the real tokens of a prompt, in NumPy or JAX (`xp`)."""
    real = xp.ones(shape, bool) if padding_mask is None else xp.asarray(padding_mask)
    is_empty = earlier is None and is_concrete(real) and not np.asarray(real).any(-1).all()
    if real.shape != shape or real.dtype != bool or is_empty:
        raise ValueError(
            f"{caller}: padding_mask must be boolean {shape} with a real token in every row; "
            f"got shape={real.shape}, dtype={real.dtype}."
        )
    return real


def _sampling_key(caller: str, sampler: Sampler, key: Array | None, batch: int, num_samples: int) -> Array | None:
    """The key of the draws; None where nothing is drawn."""
    if key is not None:
        _check_keys(caller, key, batch, num_samples)
    elif sampler.temperature is not None:
        raise ValueError(
            f"{caller}: sampling needs a key; got temperature={sampler.temperature}, key=None. "
            "Pass key=jax.random.key(seed)."
        )
    return None if sampler.temperature is None else key


def _check_keys(caller: str, key: Array, batch: int, num_samples: int) -> None:
    rows = batch * num_samples
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (batch,), (rows,)):
        raise ValueError(
            f"{caller}: key must be one typed key (jax.random.key(seed)) or one a row, here {rows}; "
            f"got shape={key.shape}, dtype={key.dtype}."
        )


def _stops(
    caller: str, end_token: int | Sequence[int] | None, stop_sequences: Sequence[Sequence[int]], vocab_size: int
) -> tuple[list[int], np.ndarray]:
    """The end tokens, and the `Request.stops` of end tokens and stop sequences."""
    ends: list[int] = [] if end_token is None else np.atleast_1d(np.asarray(end_token)).tolist()
    if not all(isinstance(sequence, Sequence | np.ndarray) for sequence in stop_sequences):
        raise ValueError(
            f"{caller}: stop_sequences must be sequences of tokens; got {stop_sequences!r}. Use end_token."
        )
    sequences = [[end] for end in ends] + [list(sequence) for sequence in stop_sequences]
    longest = max(map(len, sequences), default=0)
    stops = np.full((len(sequences), longest), -1, np.int32)
    for row, sequence in zip(stops, sequences, strict=True):
        _check_tokens(caller, "stop sequences and end tokens", sequence, vocab_size)
        row[longest - len(sequence) :] = sequence
    return ends, stops


def _check_tokens(caller: str, name: str, ids: Any, vocab_size: int) -> None:
    ids = ids if hasattr(ids, "dtype") else np.asarray(ids)
    if ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{caller}: {name} must be whole numbers, at least one; got {ids}.")
    if not is_concrete(ids):
        return
    ids = np.asarray(ids)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{caller}: {name} must be at least 0 and below {vocab_size}; got {low if low < 0 else high}.")

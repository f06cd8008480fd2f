"""Checks the arguments of a model that writes, makes its caches and starts a loop of `attnax.generation`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np

from attnax import generation
from attnax.cache import SPARE_SLOTS, CacheKind, EmptyCache, init_decoder_kv_caches_from_config
from attnax.checks import is_concrete
from attnax.config import AttentionType, TransformerConfig
from attnax.generation.beam import Beams, EarlyStopping
from attnax.generation.candidates import CUTS
from attnax.generation.loop import Generation, Step, Tokens
from attnax.generation.request import Request, RequestOptions, make_request, padded_length
from attnax.generation.samplers import Sampler
from attnax.masks import Mask
from attnax.paged_cache import init_paged_kv_caches_from_config
from attnax.typing import Array, ArrayLike

__all__ = ["WriteOptions", "Writer", "beam_search", "generate", "stream"]

_PAGE = 16  # tokens of a page


class Writer(NamedTuple):
    """A model that is ready to write.

    Attributes:
        step: the model as a function.
        state: its parameters.
        config: of the decoder.
        context: arrays that each row attends beside its text; may be Planned.
        self_mask: mask of the text.
    """

    step: Step
    state: Any
    config: TransformerConfig
    context: Any = None
    self_mask: Mask | None = None


def prompt_or_positions(tokens: Tokens, cache: Any) -> dict[str, Any]:
    """The options of a decoder for `tokens`: the padding of a prompt that enters empty caches, else positions."""
    if cache[0].is_empty:
        return {"padding_mask": tokens.position_ids >= 0}
    return {"position_ids": tokens.position_ids}


class WriteOptions(RequestOptions, total=False):
    """The options of a model's `generate`, which `TransformerLM.generate` describes."""

    cache: CacheKind | None
    cache_dtype: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The empty caches of a model, which a program makes; plans of equal sizes are equal."""

    config: TransformerConfig
    kind: CacheKind
    batch_size: int
    max_len: int
    dtype: str | None
    pool_rows: int  # rows that share a pool of pages

    def make(self, state: Any, /) -> tuple[EmptyCache, ...]:
        """One cache a layer."""
        sizes: dict[str, Any] = {"batch_size": self.batch_size, "max_len": self.max_len, "dtype": self.dtype}
        if self.kind == "paged":
            num_blocks = self.pool_rows * -(-self.max_len // _PAGE)
            caches = init_paged_kv_caches_from_config(self.config, **sizes, block_size=_PAGE, num_blocks=num_blocks)
        else:
            caches = init_decoder_kv_caches_from_config(self.config, **sizes, ring=self.kind == "ring")
        return tuple(map(EmptyCache, caches))


def generate(
    writer: Writer,
    prompt_ids: ArrayLike,
    draft: Writer | None,
    *,
    max_new_tokens: int,
    num_draft_tokens: int,
    **options: Unpack[WriteOptions],
) -> Generation:
    """`TransformerLM.generate` for any writer."""
    if draft is None:
        request, cache, room = _prepare(writer, prompt_ids, max_new_tokens, **options)
        written, _ = generation.generate(writer.step, writer.state, request, cache, max_new_tokens=room)
        return _shorten(written, max_new_tokens)
    _check_draft(writer, draft, num_draft_tokens, options)
    options["cache"] = options.get("cache") or "ring"
    request, cache, room = _prepare(writer, prompt_ids, max_new_tokens, spare=num_draft_tokens, **options)
    _, draft_cache, _ = _prepare(draft, prompt_ids, max_new_tokens, spare=num_draft_tokens, **options)
    written, _, _ = generation.generate_with_draft(
        writer.step,
        writer.state,
        request,
        cache,
        generation.Draft(draft.step, draft.state, draft.context),
        draft_cache,
        max_new_tokens=room,
        num_draft_tokens=num_draft_tokens,
    )
    return _shorten(written, max_new_tokens)


def _check_draft(writer: Writer, draft: Writer, num_draft_tokens: int, options: WriteOptions) -> None:
    """Raises ValueError or NotImplementedError for a draft that cannot be used."""
    sizes = writer.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"generate: a draft must have the vocabulary of the model; got vocab_size={sizes[1]}, not {sizes[0]}."
        )
    if not 1 <= num_draft_tokens <= SPARE_SLOTS:
        raise ValueError(
            f"generate: num_draft_tokens must be at least 1 and at most {SPARE_SLOTS}; "
            f"got num_draft_tokens={num_draft_tokens}."
        )
    if options.get("cache") == "contiguous":
        raise ValueError(
            "generate: with a draft a cache must use the slots of rejected tokens again; got cache='contiguous'. "
            "Use 'ring' or 'paged'."
        )
    for config in (writer.config, draft.config):
        if any(config.layer(index).attention_type == AttentionType.LINEAR for index in range(config.num_layers)):
            raise NotImplementedError(
                "generate: the sums of linear attention cannot take drafted tokens back; got "
                "attention_type=linear with a draft. Generate without one."
            )


def stream(
    writer: Writer, prompt_ids: ArrayLike, *, max_new_tokens: int, **options: Unpack[WriteOptions]
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, (rows,) at a time."""
    unknown = sorted(options.keys() - WriteOptions.__annotations__.keys())
    if unknown:
        raise ValueError(f"stream: takes the options of generate, but no draft; got {', '.join(unknown)}.")
    request, cache, room = _prepare(writer, prompt_ids, max_new_tokens, **options)
    return generation.stream(writer.step, writer.state, request, cache, max_new_tokens=room)


def beam_search(
    writer: Writer,
    prompt_ids: ArrayLike,
    *,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    **options: Unpack[WriteOptions],
) -> Beams:
    """`TransformerLM.beam_search` for any writer."""
    if not 1 <= num_beams <= writer.config.vocab_size:
        raise ValueError(
            f"beam_search: num_beams must be at least 1 and at most vocab_size={writer.config.vocab_size}; "
            f"got num_beams={num_beams}."
        )
    if early_stopping not in get_args(EarlyStopping):
        raise ValueError(
            f"beam_search: early_stopping must be one of {', '.join(get_args(EarlyStopping))}; "
            f"got early_stopping={early_stopping!r}."
        )
    if not np.isfinite(length_penalty):
        raise ValueError(f"beam_search: length_penalty must be finite; got length_penalty={length_penalty}.")
    sampler = options.get("sampler") or Sampler()
    cuts = {name: getattr(sampler, name) for name in CUTS if getattr(sampler, name) is not None}
    if np.any(0.0 if sampler.temperature is None else sampler.temperature) or cuts:
        raise ValueError(
            f"beam_search: nothing is drawn, so temperature must be 0 and each of {', '.join(CUTS)} None; "
            f"got temperature={sampler.temperature}{''.join(f', {name}={value}' for name, value in cuts.items())}."
        )
    request, cache, room = _prepare(writer, prompt_ids, max_new_tokens, num_beams=num_beams, **options)
    found = generation.beam_search(
        writer.step,
        writer.state,
        request,
        cache,
        num_beams=num_beams,
        max_new_tokens=room,
        length_penalty=np.float32(length_penalty),
        early_stopping=early_stopping,
    )
    return _shorten(found, max_new_tokens)


def _prepare(
    writer: Writer,
    prompt_ids: ArrayLike,
    max_new_tokens: int,
    *,
    spare: int = 0,
    num_beams: int = 1,
    cache: CacheKind | None = None,
    cache_dtype: Any = None,
    **options: Unpack[RequestOptions],
) -> tuple[Request, CachePlan, int]:
    """The request, its caches and the room of the result; sizes are rounded up, so that few programs serve all."""
    config = writer.config
    if not hasattr(prompt_ids, "shape"):
        try:
            prompt_ids = np.asarray(prompt_ids)
        except ValueError as error:
            raise ValueError(
                "generate: prompt_ids must be of one length; got lists of several. Pad them, left or right, and mark "
                "the real tokens in padding_mask."
            ) from error
    length = max(1, prompt_ids.shape[1] if prompt_ids.ndim == 2 else 1)
    # A mask that holds arrays has a fixed number of positions; prompt and new tokens get no room beyond it.
    is_fixed = writer.self_mask is not None and writer.self_mask.num_positions is not None
    length = length if is_fixed else padded_length(length)
    request = make_request(
        prompt_ids,
        vocab_size=config.vocab_size,
        max_new_tokens=max_new_tokens,
        pad_token=config.pad_token_id,
        context=writer.context,
        pad_to=length,
        **options,
    )
    (batch, prompt_length), cache = prompt_ids.shape, cache or "contiguous"
    if cache not in get_args(CacheKind):
        raise ValueError(f"generate: cache must be one of {', '.join(get_args(CacheKind))}; got cache={cache!r}.")
    has_table = config.pos_emb_type in ("learned", "sinusoidal")
    if has_table and prompt_length + max_new_tokens > config.max_len + 1:
        raise ValueError(
            f"generate: prompt and new tokens must fit into the {config.max_len} positions of the model; "
            f"got {prompt_length} + {max_new_tokens}."
        )
    room = max_new_tokens if is_fixed else padded_length(max(64, max_new_tokens))
    slots = length + room + spare
    if not is_fixed:  # padding after a prompt takes no slot, so a long total is padded only once
        slots = padded_length(slots if slots <= 1024 else prompt_length + max(64, max_new_tokens) + spare)
    dtype = None if cache_dtype is None else jnp.dtype(cache_dtype).name
    plan = CachePlan(config, cache, batch, slots, dtype, num_beams * request.num_rows)
    return request, plan, room


Written = TypeVar("Written", Generation, Beams)


def _shorten(written: Written, max_new_tokens: int) -> Written:
    """The result without the room beyond `max_new_tokens`, sliced outside of JAX, which would compile each slice."""

    def cut(x: Array) -> Array:
        if not is_concrete(x) or not x.is_fully_addressable:
            return x[..., :max_new_tokens]
        return jax.device_put(np.ascontiguousarray(np.asarray(x)[..., :max_new_tokens]), x.sharding)

    if written.tokens.shape[-1] == max_new_tokens:
        return written
    if isinstance(written, Beams):
        return written._replace(tokens=cut(written.tokens))
    return written._replace(tokens=cut(written.tokens), log_probs=cut(written.log_probs))

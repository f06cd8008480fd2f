"""Checks the arguments of a model that writes, makes its caches and starts a loop of `attnax.generation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, Unpack, get_args

import jax
import numpy as np
from jax.sharding import AxisType

from attnax import generation
from attnax.cache import SPARE_SLOTS, CacheFunction, CacheKind, KVLayerCache, RingKVCache, cache_kinds
from attnax.checks import is_concrete
from attnax.config import AttentionType, TransformerConfig
from attnax.generation.beam import Beams, EarlyStopping
from attnax.generation.candidates import CUTS
from attnax.generation.loop import Generation, Stream
from attnax.generation.prompt import TextCaches
from attnax.generation.request import Request, RequestOptions, longest, make_request
from attnax.generation.samplers import Sampler
from attnax.generation.step import Step, Tokens
from attnax.masks import Mask
from attnax.models.call_masks import MaskOptions, State, check_covers, is_causal, masks_of_call
from attnax.models.planned_caches import CachePlan, CallSizes, Continued, check_caches
from attnax.typing import Array, ArrayLike, MaskMod, ScoreMod

__all__ = [
    "PREFILL_CHUNK",
    "PromptOptions",
    "WriteOptions",
    "Writer",
    "beam_search",
    "check_mesh",
    "generate",
    "prefill",
    "stream",
]

PREFILL_CHUNK = 512  # tokens of a row that a model with a causal mask reads at once


class Writer(NamedTuple):
    """A model that is ready to write.

    Attributes:
        caller: the method that a user called, for errors.
        step: the model as a function of a `State`.
        state: its parameters, and the masks of a call.
        config: of the decoder.
        context: arrays that each row attends beside its text, and the index of its prompt; may be Planned. None for
            the index alone.
        self_mask: mask of the text.
        scalar_heads: of the token scalars of each layer, 0 for none.
    """

    caller: str
    step: Step
    state: State
    config: TransformerConfig
    context: Any = None
    self_mask: Mask | None = None
    scalar_heads: tuple[int, ...] = ()


def check_mesh(caller: str, params: Any) -> None:
    """Raises ValueError if parameters lie on a mesh with Explicit axes, and the call is not under a mesh."""
    if not jax.sharding.get_abstract_mesh().empty:
        return
    for x in jax.tree.leaves(params):
        mesh = getattr(x.sharding, "mesh", None) if isinstance(x, jax.Array) and is_concrete(x) else None
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                f"{caller}: parameters on a mesh with Explicit axes need a call under that mesh, where caches lie; "
                f"got parameters on {mesh}, and no mesh around the call. Write `with jax.set_mesh(mesh):` around it."
            )


def prompt_or_positions(tokens: Tokens, cache: Any) -> dict[str, Any]:
    """The options of a decoder for `tokens`: the padding of a prompt that enters empty caches, else positions."""
    if cache[0].is_empty:
        return {"padding_mask": tokens.position_ids >= 0}
    return {"position_ids": tokens.position_ids}


class WriteOptions(RequestOptions, MaskOptions, total=False):
    """The options of a model's `generate`, which `TransformerLM.generate` describes."""

    cache: CacheKind | CacheFunction | None
    cache_dtype: Any


class PromptOptions(WriteOptions, total=False):
    """The options of a model that continues prompts: those of `WriteOptions`, and how it reads the prompts."""

    caches: TextCaches | None
    prefill_chunk: int | None


def generate(
    writer: Writer,
    prompt_ids: ArrayLike | None,
    draft: Writer | None,
    *,
    max_new_tokens: int,
    num_draft_tokens: int,
    return_caches: bool = False,
    **options: Unpack[PromptOptions],
) -> Generation:
    """`TransformerLM.generate` for any writer."""
    if draft is None:
        call = _prepare(writer, prompt_ids, max_new_tokens, **options)
        written, caches = generation.generate(*call.arguments, max_new_tokens=call.room)
    else:
        _check_draft(writer, draft, num_draft_tokens)
        if options.get("caches") is None:
            options["cache"] = options.get("cache") or "ring"
        call = _prepare(writer, prompt_ids, max_new_tokens, spare=num_draft_tokens, **options)
        draft = _under_masks(draft, call.request.ids.shape[0], options)
        _check_covers(draft, call.request, call.sizes)
        whole = jax.eval_shape(Request.as_one_prompt, call.request)  # only its sizes: the program makes the arrays
        kind = options.get("cache") or "ring"
        sizes = call.sizes._replace(config=draft.config, scalar_heads=draft.scalar_heads)
        planned = sizes.empty_caches(whole, kind, options.get("cache_dtype"))
        _check_takes_back(num_draft_tokens, call.caches, planned)
        written, caches, _ = generation.generate_with_draft(
            *call.arguments,
            generation.Draft(draft.step, draft.state, draft.context),
            planned,
            max_new_tokens=call.room,
            num_draft_tokens=num_draft_tokens,
        )
    written = _shorten(written, max_new_tokens)
    return written._replace(caches=caches) if return_caches else written


def _check_draft(writer: Writer, draft: Writer, num_draft_tokens: int) -> None:
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
    for config in (writer.config, draft.config):
        if any(config.layer(index).attention_type == AttentionType.LINEAR for index in range(config.num_layers)):
            raise NotImplementedError(
                "generate: the sums of linear attention cannot take drafted tokens back; got "
                "attention_type=linear with a draft. Generate without one."
            )


def _check_takes_back(num_draft_tokens: int, *planned: CachePlan | Continued) -> None:
    """Raises ValueError for a cache in which rejected tokens would keep their slots, or would have taken others'."""
    for caches in planned:
        layers = caches.layers if isinstance(caches, Continued) else jax.eval_shape(caches.make, None)
        for cache in map(_innermost, cache_kinds(layers)):
            held = f"a {type(cache).__name__} in caches"
            got = held if isinstance(caches, Continued) else f"cache={caches.kind!r}"
            if isinstance(cache, KVLayerCache):
                raise ValueError(
                    f"generate: with a draft a cache must use the slots of rejected tokens again; got {got}. Use "
                    "cache='ring' or 'paged'."
                )
            has_window = isinstance(cache, RingKVCache) and cache.window is not None
            if has_window and (spare := cache.ring_size - cache.window) < num_draft_tokens:
                raise ValueError(
                    f"generate: with a draft a ring must have num_draft_tokens={num_draft_tokens} slots beside its "
                    f"window and its sinks; got {spare} from {got}. Make it longer, or draft fewer tokens."
                )


def _innermost(cache: Any) -> Any:
    """The cache inside of others."""
    return _innermost(cache.cache) if hasattr(cache, "cache") else cache


def stream(
    writer: Writer, prompt_ids: ArrayLike | None, *, max_new_tokens: int, **options: Unpack[PromptOptions]
) -> Stream:
    """The tokens of `generate`, (rows,) at a time."""
    unknown = sorted(options.keys() - PromptOptions.__annotations__.keys())
    if unknown:
        raise ValueError(
            "stream: takes the options of generate but a draft and return_caches, in place of which it has stop(); "
            f"got {', '.join(unknown)}."
        )
    call = _prepare(writer, prompt_ids, max_new_tokens, **options)
    return Stream(*call.arguments, max_new_tokens=call.room)


def prefill(writer: Writer, prompt_ids: ArrayLike, **options: Unpack[PromptOptions]) -> TextCaches:
    """`TransformerLM.prefill` for any writer."""
    call = _prepare(writer, prompt_ids, 1, **options)
    if call.sizes.prompt == 0:
        raise ValueError(f"prefill: prompt_ids must hold tokens; got prompt_ids={prompt_ids}.")
    return generation.prefill(*call.arguments)


def beam_search(
    writer: Writer,
    prompt_ids: ArrayLike | None,
    *,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    **options: Unpack[PromptOptions],
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
    call = _prepare(writer, prompt_ids, max_new_tokens, num_beams=num_beams, **options)
    found = generation.beam_search(
        *call.arguments,
        num_beams=num_beams,
        max_new_tokens=call.room,
        length_penalty=np.float32(length_penalty),
        early_stopping=early_stopping,
    )
    return _shorten(found, max_new_tokens)


class _Call(NamedTuple):
    """What a loop of `attnax.generation` takes."""

    writer: Writer
    request: Request
    caches: CachePlan | Continued
    sizes: CallSizes

    @property
    def arguments(self) -> tuple[Step, State, Request, CachePlan | Continued]:
        """The first arguments of every loop."""
        return self.writer.step, self.writer.state, self.request, self.caches

    @property
    def room(self) -> int:
        """Of the result, in tokens."""
        return self.sizes.room


def _prepare(
    writer: Writer,
    prompt_ids: ArrayLike | None,
    max_new_tokens: int,
    *,
    spare: int = 0,
    num_beams: int = 1,
    cache: CacheKind | CacheFunction | None = None,
    cache_dtype: Any = None,
    caches: TextCaches | None = None,
    prefill_chunk: int | None = None,
    mask: Mask | MaskMod | ArrayLike | None = None,
    self_mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    **options: Unpack[RequestOptions],
) -> _Call:
    """The arguments, checked, and the caches."""
    caller, config = writer.caller, writer.config
    prompt_ids = _as_array(caller, prompt_ids, caches)
    batch, length = prompt_ids.shape if prompt_ids.ndim == 2 else (None, 1)  # `make_request` refuses another shape
    writer = _under_masks(writer, batch or 1, {"mask": mask, "self_mask": self_mask, "score_mod": score_mod})
    _check_cache(caller, cache)
    if prefill_chunk is None:
        prefill_chunk = PREFILL_CHUNK if is_causal(writer.self_mask) else None  # a later chunk holds later tokens
    elif prefill_chunk < 1:
        raise ValueError(f"{caller}: prefill_chunk must be at least 1; got prefill_chunk={prefill_chunk}.")
    earlier = None
    if caches is not None:
        check_caches(caller, caches, config, batch)
        _check_no_kind(caller, cache, cache_dtype)
        earlier = caches.text
    rows = (batch or 1) * options.get("num_samples", 1) * num_beams
    held, is_known = (0, True) if earlier is None else (longest(earlier), is_concrete(earlier.lengths))
    sizes = CallSizes(caller, config, held, is_known, length, max_new_tokens, spare, rows, writer.scalar_heads)
    request = make_request(
        prompt_ids,
        vocab_size=config.vocab_size,
        max_new_tokens=max_new_tokens,
        pad_token=config.pad_token_id,
        context=writer.context,
        pad_to=sizes.padded_prompt,
        earlier=earlier,
        prefill_chunk=prefill_chunk,
        caller=caller,
        **options,
    )
    _check_covers(writer, request, sizes)
    if caches is None:
        planned = sizes.empty_caches(request, cache or "contiguous", cache_dtype)
        return _Call(writer, request, planned, sizes)
    return _Call(writer, request, sizes.held_caches(request, caches), sizes)


def _under_masks(writer: Writer, batch: int, options: Mapping[str, Any]) -> Writer:
    """The writer with its state and its mask under the masks among the options; ValueError if they do not fit."""
    mask, masks = masks_of_call(writer.caller, writer.self_mask, options)
    context = writer.context
    if masks is not None:
        masks.check(writer.caller, batch, writer.config.num_heads)
        context = np.arange(batch, dtype=np.int32) if context is None else context
    return writer._replace(state=writer.state._replace(masks=masks), context=context, self_mask=mask)


def _check_cache(caller: str, cache: CacheKind | CacheFunction | None) -> None:
    if not callable(cache) and cache not in (None, *get_args(CacheKind)):
        raise ValueError(
            f"{caller}: cache must be one of {', '.join(get_args(CacheKind))}, or a function that makes the cache of a "
            f"layer; got cache={cache!r}."
        )


def _check_no_kind(caller: str, cache: CacheKind | CacheFunction | None, cache_dtype: Any) -> None:
    if cache is not None or cache_dtype is not None:
        raise ValueError(
            f"{caller}: caches have a kind and a dtype already; got caches with cache={cache!r}, "
            f"cache_dtype={cache_dtype!r}. Leave these out."
        )


def _check_covers(writer: Writer, request: Request, sizes: CallSizes) -> None:
    """Raises ValueError unless the arrays of the call's masks cover the text."""
    lengths = {"earlier": sizes.earlier, "prompt": sizes.prompt, "new": sizes.new}
    check_covers(writer.caller, writer.state.masks, request, **lengths)


def _as_array(caller: str, prompt_ids: Any, caches: TextCaches | None) -> ArrayLike:
    """The prompts as an array; without prompts, empty ones behind the text of the caches."""
    if prompt_ids is None and isinstance(caches, TextCaches):
        return np.zeros((caches.text.lengths.shape[0], 0), np.int32)
    if isinstance(prompt_ids, jax.Array | np.ndarray):
        return prompt_ids
    try:
        return np.asarray(prompt_ids)
    except ValueError as error:
        raise ValueError(
            f"{caller}: prompt_ids must be of one length; got lists of several. Pad them, left or right, and mark "
            "the real tokens in padding_mask."
        ) from error


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

"""How a model writes: arguments checked, caches made, and one of the loops of `attnax.generation` started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, get_args

import jax.numpy as jnp
import numpy as np

from attnax import generation
from attnax.cache import SPARE_SLOTS, init_decoder_kv_caches_from_config
from attnax.config import AttentionType, TransformerConfig
from attnax.generation.beam import Beams, EarlyStopping
from attnax.generation.loop import Generation, Step
from attnax.generation.request import Request, make_request
from attnax.generation.samplers import Sampler
from attnax.paged_cache import init_paged_kv_caches_from_config
from attnax.typing import Array, ArrayLike

__all__ = ["CacheKind", "WriteOptions", "Writer", "beam_search", "generate", "stream"]

CacheKind = Literal["contiguous", "ring", "paged"]


class Writer(NamedTuple):
    """A model that is ready to write.

    Attributes:
        step: the model as a function.
        state: its parameters.
        config: of what decodes.
        context: what each row attends beside its text.
    """

    step: Step
    state: Any
    config: TransformerConfig
    context: Any = None


class WriteOptions(TypedDict, total=False):
    """The keywords of a model's `generate` that its `stream` takes too."""

    sampler: Sampler | None
    key: Array | None
    padding_mask: ArrayLike | None
    end_token: int | Sequence[int] | None
    stop_sequences: Sequence[Sequence[int]]
    num_samples: int
    cache: CacheKind | None
    cache_dtype: Any


def generate(
    writer: Writer,
    prompt_ids: ArrayLike,
    draft: Writer | None,
    *,
    max_new_tokens: int,
    num_draft_tokens: int,
    **options: Unpack[WriteOptions],
) -> Generation:
    """What `TransformerLM.generate` promises, for any writer."""
    if draft is None:
        request, cache = _prepare(writer, prompt_ids, max_new_tokens, **options)
        written, _ = generation.generate(writer.step, writer.state, request, cache, max_new_tokens=max_new_tokens)
        return written
    _check_draft(writer, draft, num_draft_tokens, options)
    options["cache"] = options.get("cache") or "ring"
    request, cache = _prepare(writer, prompt_ids, max_new_tokens, spare=num_draft_tokens, **options)
    _, draft_cache = _prepare(draft, prompt_ids, max_new_tokens, spare=num_draft_tokens, **options)
    written, _, _ = generation.generate_with_draft(
        writer.step,
        writer.state,
        request,
        cache,
        generation.Draft(draft.step, draft.state, draft.context),
        draft_cache,
        max_new_tokens=max_new_tokens,
        num_draft_tokens=num_draft_tokens,
    )
    return written


def stream(
    writer: Writer, prompt_ids: ArrayLike, *, max_new_tokens: int, **options: Unpack[WriteOptions]
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, (rows,) at a time."""
    unknown = sorted(options.keys() - WriteOptions.__annotations__.keys())
    if unknown:
        raise ValueError(f"stream: takes the options of generate, but no draft; got {', '.join(unknown)}.")
    request, cache = _prepare(writer, prompt_ids, max_new_tokens, **options)
    return generation.stream(writer.step, writer.state, request, cache, max_new_tokens=max_new_tokens)


def beam_search(
    writer: Writer,
    prompt_ids: ArrayLike,
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    **options: Unpack[WriteOptions],
) -> Beams:
    """What `TransformerLM.beam_search` promises, for any writer."""
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
    cuts = {name: getattr(sampler, name) for name in ("top_k", "top_p", "min_p") if getattr(sampler, name) is not None}
    if float(sampler.temperature) != 0.0 or cuts:
        raise ValueError(
            "beam_search: nothing is drawn, so temperature must be 0 and nothing be cut; "
            f"got temperature={sampler.temperature}{''.join(f', {name}={value}' for name, value in cuts.items())}."
        )
    request, cache = _prepare(writer, prompt_ids, max_new_tokens, num_beams=num_beams, **options)
    return generation.beam_search(
        writer.step,
        writer.state,
        request,
        cache,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        length_penalty=jnp.float32(length_penalty),
        early_stopping=early_stopping,
    )


def _prepare(
    writer: Writer,
    prompt_ids: ArrayLike,
    max_new_tokens: int,
    *,
    spare: int = 0,
    num_beams: int = 1,
    cache: CacheKind | None = None,
    cache_dtype: Any = None,
    **options: Any,
) -> tuple[Request, Any]:
    config, prompt_ids = writer.config, jnp.asarray(prompt_ids)
    request = make_request(
        prompt_ids,
        vocab_size=config.vocab_size,
        max_new_tokens=max_new_tokens,
        pad_token=config.pad_token_id,
        context=writer.context,
        **options,
    )
    (batch, length), cache = prompt_ids.shape, cache or "contiguous"
    if cache not in get_args(CacheKind):
        raise ValueError(f"generate: cache must be one of {', '.join(get_args(CacheKind))}; got cache={cache!r}.")
    _check_table(config, length, max_new_tokens)
    sizes: dict[str, Any] = {"batch_size": batch, "max_len": length + max_new_tokens + spare, "dtype": cache_dtype}
    if cache != "paged":
        return request, init_decoder_kv_caches_from_config(config, **sizes, ring=cache == "ring")
    rows = num_beams * request.keys.shape[0]  # of the pool, which the rows of a prompt then share out
    pages = -(-sizes["max_len"] // _BLOCK)
    return request, init_paged_kv_caches_from_config(config, **sizes, block_size=_BLOCK, num_blocks=rows * pages)


_BLOCK = 16  # tokens of a page


def _check_table(config: TransformerConfig, length: int, max_new_tokens: int) -> None:
    """Raises ValueError if a generation would run past a learned or sinusoidal table."""
    if config.pos_emb_type in ("learned", "sinusoidal") and length + max_new_tokens > config.max_len + 1:
        raise ValueError(
            f"generate: prompt and new tokens must fit into the {config.max_len} positions of the model; "
            f"got {length} + {max_new_tokens}."
        )


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
            "generate: with a draft tokens are taken back, whose slots a contiguous cache would not use again; got "
            "cache='contiguous'. Use 'ring' or 'paged'."
        )
    for config in (writer.config, draft.config):
        if any(config.layer(index).attention_type == AttentionType.LINEAR for index in range(config.num_layers)):
            raise NotImplementedError(
                "generate: the sums of linear attention cannot take drafted tokens back; got "
                "attention_type=linear with a draft. Generate without one."
            )

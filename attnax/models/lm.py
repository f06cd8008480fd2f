"""The decoder-only language model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.cache import CacheFunction, CacheKind, LayerCache
from attnax.config import TransformerConfig, resolve_config
from attnax.generation.beam import Beams, EarlyStopping
from attnax.generation.loop import Generation, Stream
from attnax.generation.prompt import TextCaches
from attnax.generation.samplers import Sampler
from attnax.generation.step import Tokens
from attnax.masks import Mask
from attnax.models.call_masks import State
from attnax.models.planned_caches import scalar_heads
from attnax.models.transformer import CachedOptions, TokenHead, TokenOptions, TransformerDecoder
from attnax.models.writing import (
    PromptOptions,
    Writer,
    beam_search,
    check_mesh,
    generate,
    prefill,
    prompt_or_positions,
    stream,
)
from attnax.nn._parts import MakeBlock, Parts
from attnax.nn._run import overrides_call, run_of, runs
from attnax.nn.blocks import Output
from attnax.nn.probe import Probe, with_probe
from attnax.typing import Array, ArrayLike, AttentionFn, Bool, Float, Int, MaskMod, ScoreMod

__all__ = ["TransformerLM"]


class TransformerLM(nnx.Module):
    """A `TransformerDecoder` and its head: logits of the next token at every position.

    Called as `TransformerLM(rngs, config)` or with the fields of TransformerConfig as keywords.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a TransformerConfig.
        self_mask: mask of self-attention, by default `causal()`.
        make_block: as in `TransformerDecoder`.
        attention_fn: as in `TransformerDecoder`.
        **fields: fields of TransformerConfig; an unknown field or a value out of range raises ValueError.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import TransformerLM
        >>> lm = TransformerLM(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=16, max_len=32)
        >>> lm(jnp.zeros((1, 5), int)).shape
        (1, 5, 11)
        >>> lm.generate(jnp.zeros((1, 5), int), max_new_tokens=3).tokens.shape
        (1, 3)
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: TransformerConfig | None = None,
        *,
        self_mask: Mask | MaskMod | None = None,
        make_block: MakeBlock | None = None,
        attention_fn: AttentionFn | None = None,
        **fields: Any,
    ):
        self.config = config = resolve_config(TransformerConfig, config, fields)
        parts: Parts = {"make_block": make_block, "attention_fn": attention_fn}
        self.decoder = TransformerDecoder(rngs, config, self_mask=self_mask, **parts)
        self.head = TokenHead(rngs, config)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        self_mask: Mask | MaskMod | ArrayLike | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None = None,
        deterministic: bool | None = None,
        position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
        score_mod: ScoreMod | None = None,
        layer_kv_caches: Sequence[LayerCache] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], Sequence[Any]]:
        """float32 logits (batch, T, vocab_size); with caches, the pair (logits, new caches).

        Arguments are as in `TransformerDecoder`.
        """
        options: CachedOptions = {"mask": mask, "self_mask": self_mask, "padding_mask": padding_mask}
        options |= {"position_ids": position_ids, "score_mod": score_mod, "caches": layer_kv_caches}
        options |= {"deterministic": deterministic, "rngs": rngs}
        out = self.run(input_ids, **options)
        return out.logits if out.caches is None else (out.logits, out.caches)

    def run(
        self, input_ids: Int[ArrayLike, "B T"], *, probe: Probe | None = None, **options: Unpack[CachedOptions]
    ) -> Output:
        """`TransformerDecoder.run`, and the logits of its hidden states."""
        out = run_of(self.decoder)(input_ids, **with_probe(probe), **options)
        return out._replace(logits=self.logits(out.hidden))

    def logits(self, hidden: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        """float32 logits of the decoder's hidden states."""
        return self.head(hidden, self.decoder.embed.tokens)

    def log_probs(self, input_ids: Int[ArrayLike, "B T"], **options: Unpack[TokenOptions]) -> Float[Array, "B T V"]:
        """Log-probabilities of the token after each position; options as in a call without caches."""
        logits: Any = self(input_ids, **options)
        return jax.nn.log_softmax(logits)

    def generate(
        self,
        prompt_ids: Int[ArrayLike, "B T"] | None,
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        key: Array | None = None,
        mask: Mask | MaskMod | ArrayLike | None = None,
        self_mask: Mask | MaskMod | ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | None = None,
        end_token: int | Sequence[int] | None = None,
        stop_sequences: Sequence[Sequence[int]] = (),
        num_samples: int = 1,
        draft: TransformerLM | None = None,
        num_draft_tokens: int = 4,
        cache: CacheKind | CacheFunction | None = None,
        cache_dtype: Any = None,
        caches: TextCaches | None = None,
        return_caches: bool = False,
        prefill_chunk: int | None = None,
    ) -> Generation:
        """Continues each prompt, in two compiled programs that serve prompts of several lengths.

        Args:
            prompt_ids: (batch, T). If Explicit axes of a mesh shard the prompts, every device generates all rows. None
                goes on with the texts of `caches`.
            max_new_tokens: tokens to write at most.
            sampler: how tokens are drawn; by default each is the likeliest. Its numbers may be arrays, with one for
                each prompt or for each row of the result.
            key: one typed key, or one for each row; needed with a temperature. A row's text depends only on its own key
                and prompt.
            mask: narrows the model's own mask: a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array of
                (batch or 1, heads or 1, L, L) for the positions of prompt and new tokens. Indices are positions of each
                row's text, padding not counted; `b` is the row of the prompt, also for samples and beams. Arrays that
                a mask holds are inputs of the programs; those that a plain function captures are constants, and a
                function that is new in each call compiles anew.
            self_mask: the same, in place of the model's own mask.
            score_mod: applied to the scores of every layer, at the same positions. A pytree that holds arrays, such as
                `additive_bias_mod(bias)` or `jax.tree_util.Partial(function, array)`, is an input of the programs.
            padding_mask: True for real tokens; padding may stand left or right.
            end_token: a token that ends a row, or several.
            stop_sequences: sequences of tokens that end a row once written in full.
            num_samples: rows of the result for each prompt, which is read once.
            draft: a small model of the same vocabulary, which drafts tokens that this model reads at once. With fewer
                steps, the tokens at temperature 0, and their distribution at other temperatures, stay the same. The
                draft reads the texts of `caches` itself.
            num_draft_tokens: tokens drafted each time.
            cache: "contiguous", "ring" (rows of different lengths waste no slots) or "paged"; by default "contiguous",
                or "ring" with a draft. Or a function `(*, batch_size, num_kv_heads, head_dim, value_head_dim, max_len,
                dtype) -> LayerCache` that makes the empty cache of a layer, such as a ring with sinks.
            cache_dtype: of keys and values, by default the config's dtype; "int8" needs a quarter of float32's memory.
            caches: of an earlier call of this model: its texts, which prompts follow, are not read again. The tokens
                are those of a prompt that holds everything, unless a token attends later ones, or masks differ: what
                earlier tokens attended stays as the earlier call had it. The caches have one row
                for all prompts or a row for each, and stay as they are.
            return_caches: the result has the `caches` of its rows, for a later call.
            prefill_chunk: tokens of a row that the model reads at once, by default 512. A longer prompt enters in
                chunks: beside the caches, it needs the memory of a chunk and of copies of one layer's keys and values.
                No token attends a later chunk, so a model whose `self_mask` is not `causal()` or `causal() & mask`
                reads a prompt at once by default.

        Returns:
            Generation of batch * num_samples rows: tokens, lengths, the model's log-probabilities, steps, caches.

        Raises:
            ValueError: arguments out of range, more positions than a learned or sinusoidal table has, or caches of
                another model or of other rows.
        """
        if draft is not None and not isinstance(draft, TransformerLM):
            raise ValueError(f"generate: a draft must be a TransformerLM too; got {type(draft).__name__}.")
        options: PromptOptions = {"sampler": sampler, "key": key, "padding_mask": padding_mask, "end_token": end_token}
        options |= {"stop_sequences": stop_sequences, "num_samples": num_samples, "prefill_chunk": prefill_chunk}
        options |= {"cache": cache, "cache_dtype": cache_dtype, "caches": caches}
        options |= {"mask": mask, "self_mask": self_mask, "score_mod": score_mod}
        return generate(
            self._writer("generate"),
            prompt_ids,
            None if draft is None else draft._writer("generate"),
            max_new_tokens=max_new_tokens,
            num_draft_tokens=num_draft_tokens,
            return_caches=return_caches,
            **options,
        )

    def stream(
        self, prompt_ids: Int[ArrayLike, "B T"] | None, *, max_new_tokens: int, **options: Unpack[PromptOptions]
    ) -> Stream:
        """Yields the tokens of `generate` as they are drawn, (rows,) at a time; its options, but no draft.

        `stop()` of the result ends it, and returns the caches of the texts so far.
        """
        return stream(self._writer("stream"), prompt_ids, max_new_tokens=max_new_tokens, **options)

    def prefill(
        self,
        prompt_ids: Int[ArrayLike, "B T"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        self_mask: Mask | MaskMod | ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | None = None,
        cache: CacheKind | CacheFunction | None = None,
        cache_dtype: Any = None,
        caches: TextCaches | None = None,
        prefill_chunk: int | None = None,
    ) -> TextCaches:
        """Reads prompts and writes nothing: the caches that `generate(caches=...)` goes on from.

        Arguments and errors are as in `generate`. Prompts must hold tokens.
        """
        options: PromptOptions = {"padding_mask": padding_mask, "cache": cache, "cache_dtype": cache_dtype}
        options |= {"caches": caches, "prefill_chunk": prefill_chunk}
        options |= {"mask": mask, "self_mask": self_mask, "score_mod": score_mod}
        return prefill(self._writer("prefill"), prompt_ids, **options)

    def beam_search(
        self,
        prompt_ids: Int[ArrayLike, "B T"] | None,
        *,
        num_beams: int,
        max_new_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = "heuristic",
        sampler: Sampler | None = None,
        mask: Mask | MaskMod | ArrayLike | None = None,
        self_mask: Mask | MaskMod | ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | None = None,
        end_token: int | Sequence[int] | None = None,
        stop_sequences: Sequence[Sequence[int]] = (),
        cache: CacheKind | CacheFunction | None = None,
        cache_dtype: Any = None,
        caches: TextCaches | None = None,
        prefill_chunk: int | None = None,
    ) -> Beams:
        """The `num_beams` best texts found after each prompt, the best first.

        Arguments and errors are as in `generate`, and:

        - `num_beams`: running texts of each prompt.
        - `length_penalty`: a text's score is its log-probability / length ** length_penalty; above 0 longer texts gain.
        - `early_stopping`: "first" stops with num_beams ended texts, "heuristic" when no running text scores better at
          its present length, "never" when no running text can score better at any length.
        - `sampler`: only its penalties apply, to log-probabilities.
        """
        options: PromptOptions = {"sampler": sampler, "padding_mask": padding_mask, "end_token": end_token}
        options |= {"stop_sequences": stop_sequences, "cache": cache, "cache_dtype": cache_dtype}
        options |= {"caches": caches, "prefill_chunk": prefill_chunk}
        options |= {"mask": mask, "self_mask": self_mask, "score_mod": score_mod}
        return beam_search(
            self._writer("beam_search"),
            prompt_ids,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            **options,
        )

    def _writer(self, caller: str) -> Writer:
        if inspect.ismethod(vars(self).get("run")):
            raise NotImplementedError(
                f"{caller}: a method assigned to model.run is bound to the parameters that the model has now, and a "
                "program would keep them; got model.run. Override run in a subclass."
            )
        graphdef, state = nnx.split(self)
        check_mesh(caller, state)
        heads = scalar_heads(self.decoder.stack)
        mask = self.decoder.self_mask
        return Writer(caller, _Step(graphdef), State(state), self.config, self_mask=mask, scalar_heads=heads)


@dataclasses.dataclass(frozen=True)
class _Step:
    """The model as a function of its state; equal for models of equal structure."""

    graphdef: nnx.GraphDef[TransformerLM]

    def __call__(self, state: State, tokens: Tokens, cache: Any) -> tuple[Array, Any]:
        model = nnx.merge(self.graphdef, state.params)
        options = prompt_or_positions(tokens, cache) | state.mask_options(tokens, tokens.context)
        if overrides_call(model):
            logits, caches = _called(model, tokens.ids, options | {"layer_kv_caches": cache})
        elif not runs(model, _RUN):
            options |= {"caches": cache, "deterministic": True}
            advice = f"TransformerLM: {type(model).__name__}.run must take input_ids, {_names(options)}; {{}}."
            _check_takes(type(model).run, (model, tokens.ids), options, advice)
            out = model.run(tokens.ids, **options)
            if out.logits is None:
                raise NotImplementedError(
                    f"TransformerLM: {type(model).__name__}.run must return an Output with logits; got logits=None. "
                    "Return out._replace(logits=self.logits(out.hidden))."
                )
            logits, caches = out.logits, out.caches
        else:  # only the wanted tokens go through the head
            out = run_of(model.decoder)(tokens.ids, caches=cache, deterministic=True, **options)
            return model.logits(jnp.take_along_axis(out.hidden, tokens.wanted[..., None], axis=1)), out.caches
        return jnp.take_along_axis(logits, tokens.wanted[..., None], axis=1), caches


_RUN = TransformerLM.run  # a function that is assigned to the class later counts as an override


def _called(model: TransformerLM, ids: Array, options: dict[str, Any]) -> tuple[Array, Any]:
    """(logits, caches) of the `__call__` that a subclass overrides.

    Raises:
        NotImplementedError: that `__call__` takes no caches, or does not return (logits, caches).
    """
    options = {"deterministic": True, **options}
    advice = (
        f"TransformerLM: {type(model).__name__}.__call__ must take input_ids, {_names(options)}, and return (logits, "
        "caches); {}. Or override run, which generation then calls."
    )
    _check_takes(type(model).__call__, (model, ids), options, advice)
    result = model(ids, **options)
    if not isinstance(result, tuple) or len(result) != 2 or jnp.shape(result[0])[:2] != ids.shape:
        raise NotImplementedError(advice.format(f"got {type(result).__name__}"))
    logits, caches = result
    return logits, tuple(caches) if isinstance(caches, list) else caches  # a loop carries one type


def _names(options: Mapping[str, Any]) -> str:
    """Of the options of generation's calls: the prompt has its padding, new tokens have their positions."""
    return ", ".join(sorted({*options, "padding_mask", "position_ids"}))


def _check_takes(method: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], advice: str) -> None:
    """Raises NotImplementedError if a user's method lacks an option."""
    try:
        inspect.signature(method).bind(*arguments, **options)
    except TypeError as error:
        raise NotImplementedError(advice.format(f"got a signature that does not: {error}")) from None

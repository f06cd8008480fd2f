"""The masked language model."""

from __future__ import annotations

import dataclasses
from typing import Any, Unpack

import jax
from flax import nnx

from attnax.config import TransformerConfig, resolve_config
from attnax.masks import Mask
from attnax.models.transformer import EncoderOptions, TokenHead, TransformerEncoder
from attnax.nn._parts import MakeBlock
from attnax.nn._run import SelfAttentionOptions, run_of
from attnax.nn.blocks import Output
from attnax.nn.feedforward import ACTIVATIONS
from attnax.nn.linear import Linear
from attnax.nn.norms import norm_of
from attnax.nn.probe import Probe, with_probe
from attnax.typing import Array, ArrayLike, AttentionFn, Bool, Float, Int, MaskMod, ScoreMod

__all__ = ["MaskedLM"]


class MaskedOptions(SelfAttentionOptions, total=False):
    """The options of `MaskedLM`: `EncoderOptions` without `caches`."""

    mask: Mask | MaskMod | ArrayLike | None
    self_mask: Mask | MaskMod | ArrayLike | None
    padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None
    position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None
    token_type_ids: Int[ArrayLike, "B T"] | None


class MaskedLM(nnx.Module):
    """A `TransformerEncoder` and BERT's head, head(norm(act(linear(x)))): logits of the token at every position.

    Called as `MaskedLM(rngs, config)` or with the fields of TransformerConfig as keywords. Training predicts the
    original tokens of a text in which some tokens are replaced.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a TransformerConfig; act is its ff_activation without the gate.
        make_block: as in `TransformerEncoder`.
        attention_fn: as in `TransformerEncoder`.
        **fields: fields of TransformerConfig; an unknown field or a value out of range raises ValueError.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax.models import MaskedLM
        >>> lm = MaskedLM(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=16)
        >>> lm(jnp.zeros((1, 5), int)).shape
        (1, 5, 11)

    References:
        J. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018,
        https://arxiv.org/abs/1810.04805.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: TransformerConfig | None = None,
        *,
        make_block: MakeBlock | None = None,
        attention_fn: AttentionFn | None = None,
        **fields: Any,
    ):
        self.config = config = resolve_config(TransformerConfig, config, fields)
        self.encoder = TransformerEncoder(rngs, config, make_block=make_block, attention_fn=attention_fn)
        with_bias = dataclasses.replace(config, use_bias=("head",))
        self.transform = Linear(rngs, with_bias, config.d_model, config.d_model, bias="head", axes=("embed", None))
        self.norm = norm_of(config, rngs)
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
        token_type_ids: Int[ArrayLike, "B T"] | None = None,
        score_mod: ScoreMod | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits (batch, T, vocab_size); arguments are as in `TransformerEncoder`."""
        options: MaskedOptions = {"mask": mask, "self_mask": self_mask, "padding_mask": padding_mask}
        options |= {"position_ids": position_ids, "score_mod": score_mod}
        options |= {"token_type_ids": token_type_ids, "deterministic": deterministic, "rngs": rngs}
        return self.run(input_ids, **options).logits

    def run(
        self, input_ids: Int[ArrayLike, "B T"], *, probe: Probe | None = None, **options: Unpack[EncoderOptions]
    ) -> Output:
        """`TransformerEncoder.run`, and the logits of its hidden states."""
        out = run_of(self.encoder)(input_ids, **with_probe(probe), **options)
        return out._replace(logits=self.logits(out.hidden))

    def logits(self, hidden: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        """float32 logits of the encoder's hidden states."""
        return self.head(self.features(hidden), self.encoder.embed.tokens)

    def features(self, hidden: Float[Array, "*L D"]) -> Float[Array, "*L D"]:
        """norm(act(linear(hidden))), which the head projects to logits."""
        activation, _ = ACTIVATIONS[self.config.ff_activation]
        return self.norm(activation(self.transform(hidden)))

    def log_probs(self, input_ids: Int[ArrayLike, "B T"], **options: Unpack[MaskedOptions]) -> Float[Array, "B T V"]:
        """Log-probabilities of the token at each position; options as in a call."""
        return jax.nn.log_softmax(self(input_ids, **options))

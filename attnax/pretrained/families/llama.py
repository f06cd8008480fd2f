"""Llama 2 and 3, and the facts that most later decoders share with it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from attnax.config import TransformerConfig
from attnax.models.lm import TransformerLM
from attnax.pretrained.family import Family
from attnax.pretrained.fields import GATED, PROJECTIONS, Field, biases, choice, flag, pad_token, real, whole
from attnax.pretrained.rope_fields import rope
from attnax.pretrained.rules import Rule, attention, embedding, linear, norm, within

__all__ = ["LLAMA"]

FIELDS = (
    whole("vocab_size", "vocab_size"),
    whole("hidden_size", "d_model"),
    whole("num_hidden_layers", "num_layers"),
    whole("num_attention_heads", "num_heads"),
    whole("num_key_value_heads", "num_kv_heads", None),
    whole("intermediate_size", "d_ff"),
    whole("max_position_embeddings", "max_len", 2048),
    real("rms_norm_eps", "norm_eps", 1e-6),
    pad_token(),
)
"""Fields of every decoder like Llama."""

HEAD_DIM = whole("head_dim", "head_dim", None)
GATED_SILU = choice("hidden_act", "ff_activation", GATED, "silu")
UNTIED = flag("tie_word_embeddings", "tie_embeddings", False)
ATTENTION_BIAS = biases(attention_bias=(False, PROJECTIONS))

ATTENTION = attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED_FEED_FORWARD = (
    *linear("mlp.gate_proj", "feed_forward.gate"),
    *linear("mlp.up_proj", "feed_forward.up"),
    *linear("mlp.down_proj", "feed_forward.down"),
)
NORMS = (
    *norm("input_layernorm", "around_attention.norm_in"),
    *norm("post_attention_layernorm", "around_feed_forward.norm_in"),
)
HEAD = (
    *embedding("{base}embed_tokens", "decoder.embed.tokens"),
    *norm("{base}norm", "decoder.norm"),
    Rule("lm_head.weight", ("head.projection.kernel",), "O I -> I O"),
)


def in_layers(*groups: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of every layer."""
    return within("{base}layers.{layer}", "decoder.stack.blocks.{layer}", *groups)


RULES = (*in_layers(ATTENTION, GATED_FEED_FORWARD, NORMS), *HEAD)
QK_NORMS = in_layers(
    norm("self_attn.q_norm", "attention.query_norm"),
    norm("self_attn.k_norm", "attention.key_norm"),
)
"""Norms of queries and keys, which Llama does not have."""


def experts(mixture: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """The router and the experts of each layer, each expert in tensors of its own."""
    return in_layers(
        within(
            mixture,
            "feed_forward",
            (
                Rule("gate.weight", ("router",), "O I -> I O"),
                Rule(f"experts.{{expert}}.{gate}.weight", ("gate",), "E F D -> E D F"),
                Rule(f"experts.{{expert}}.{up}.weight", ("up",), "E F D -> E D F"),
                Rule(f"experts.{{expert}}.{down}.weight", ("down",), "E D F -> E F D"),
            ),
        )
    )


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    aliases=("LlamaModel", "LLaMAForCausalLM"),
    model=TransformerLM,
    config=TransformerConfig,
    constants={"norm_type": "rms", "pos_emb_type": "rope", "dropout_rate": 0.0},
    fields=(
        *FIELDS,
        HEAD_DIM,
        GATED_SILU,
        UNTIED,
        biases(attention_bias=(False, PROJECTIONS), mlp_bias=(False, ("feed_forward",))),
        rope(),
    ),
    harmless=("pretraining_tp",),
    bases=("model.", ""),
    rules=RULES,
    buffers=("rotary_emb.inv_freq",),
)


def decoder(
    model_type: str,
    classes: str,
    *fields: Field,
    like: Family = LLAMA,
    constants: Mapping[str, Any] | None = None,
    harmless: tuple[str, ...] = (),
    **changes: Any,
) -> Family:
    """The family `like` with other fields, more constants and other changes of its attributes.

    `classes` is the common prefix of the family's class names in transformers.
    """
    facts = {
        "model_type": model_type,
        "architecture": f"{classes}ForCausalLM",
        "aliases": (f"{classes}Model",),
        "fields": fields,
        "constants": {**like.constants, **(constants or {})},
        "harmless": harmless,
    }
    return dataclasses.replace(like, **facts | changes)

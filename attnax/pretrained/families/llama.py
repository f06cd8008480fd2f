"""Llama 2 and 3, and what most later decoders share with it."""

from attnax.config import TransformerConfig
from attnax.models.lm import TransformerLM
from attnax.pretrained.family import Family, Rule, embedding, linear, norm, within
from attnax.pretrained.fields import GATED, biases, choice, flag, pad_token, real, rope, whole

__all__ = ["ATTENTION", "FIELDS", "GATED_FEED_FORWARD", "HEAD", "LLAMA", "NORMS", "QK_NORMS", "RULES", "experts"]

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
"""Fields of every decoder like it."""

ATTENTION = (
    *linear("self_attn.q_proj", "attention.query"),
    *linear("self_attn.k_proj", "attention.key"),
    *linear("self_attn.v_proj", "attention.value"),
    *linear("self_attn.o_proj", "attention.out"),
)
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
RULES = (
    *within("{base}layers.{layer}", "decoder.stack.blocks.{layer}", ATTENTION, GATED_FEED_FORWARD, NORMS),
    *HEAD,
)
QK_NORMS = within(
    "{base}layers.{layer}.self_attn",
    "decoder.stack.blocks.{layer}.attention",
    norm("q_norm", "query_norm"),
    norm("k_norm", "key_norm"),
)
"""Norms of queries and keys, which Llama has not."""


def experts(mixture: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """The router and the experts of each layer, whose tensors are apart."""
    return within(
        "{base}layers.{layer}." + mixture,
        "decoder.stack.blocks.{layer}.feed_forward",
        (
            Rule("gate.weight", ("router",), "O I -> I O"),
            Rule(f"experts.{{expert}}.{gate}.weight", ("gate",), "E F D -> E D F"),
            Rule(f"experts.{{expert}}.{up}.weight", ("up",), "E F D -> E D F"),
            Rule(f"experts.{{expert}}.{down}.weight", ("down",), "E D F -> E F D"),
        ),
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
        whole("head_dim", "head_dim", None),
        choice("hidden_act", "ff_activation", GATED, "silu"),
        flag("tie_word_embeddings", "tie_embeddings", False),
        biases(attention_bias=(False, ("query", "key", "value", "out")), mlp_bias=(False, ("feed_forward",))),
        rope(),
    ),
    harmless=("pretraining_tp",),
    bases=("model.", ""),
    rules=RULES,
    buffers=("rotary_emb.inv_freq",),
)

"""GPT-NeoX and Pythia."""

from attnax.pretrained.families import llama
from attnax.pretrained.fields import PLAIN, PROJECTIONS, biases, choice, flag, real, without
from attnax.pretrained.rope_fields import rope
from attnax.pretrained.rules import Rule, embedding, linear, norm

__all__ = ["GPT_NEOX"]

GPT_NEOX = llama.decoder(
    "gpt_neox",
    "GPTNeoX",
    *without(llama.FIELDS, "num_key_value_heads", "rms_norm_eps"),
    real("layer_norm_eps", "norm_eps", 1e-5),
    choice("hidden_act", "ff_activation", PLAIN, "gelu"),
    llama.UNTIED,
    flag("use_parallel_residual", "parallel_residual", True),
    biases(always=("feed_forward", "norm"), attention_bias=(True, PROJECTIONS)),
    rope(base="rotary_emb_base", fraction=("rotary_pct", 0.25)),
    constants={"norm_type": "layer"},
    bases=("gpt_neox.", ""),
    rules=(
        *embedding("{base}embed_in", "decoder.embed.tokens"),
        *llama.in_layers(
            norm("input_layernorm", "around_attention.norm_in"),
            norm("post_attention_layernorm", "around_feed_forward.norm_in"),
            linear(
                "attention.query_key_value",
                *("attention.query", "attention.key", "attention.value"),
                weight="(N 3 H) I -> I (3 N H)",
                bias="(N 3 H) -> (3 N H)",
            ),
            linear("attention.dense", "attention.out"),
            linear("mlp.dense_h_to_4h", "feed_forward.up"),
            linear("mlp.dense_4h_to_h", "feed_forward.down"),
        ),
        *norm("{base}final_layer_norm", "decoder.norm"),
        Rule("embed_out.weight", ("head.projection.kernel",), "O I -> I O"),
    ),
    buffers=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
    tied=("embed_out.weight",),
)

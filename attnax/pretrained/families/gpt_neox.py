"""GPT-NeoX and Pythia."""

import dataclasses

from attnax.pretrained.families.llama import FIELDS, LLAMA
from attnax.pretrained.family import Rule, embedding, linear, norm, within
from attnax.pretrained.fields import PLAIN, biases, choice, flag, real, rope

__all__ = ["GPT_NEOX"]

GPT_NEOX = dataclasses.replace(
    LLAMA,
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    aliases=("GPTNeoXModel",),
    constants={**LLAMA.constants, "norm_type": "layer"},
    fields=(
        *(field for field in FIELDS if field.keys not in (("num_key_value_heads",), ("rms_norm_eps",))),
        real("layer_norm_eps", "norm_eps", 1e-5),
        choice("hidden_act", "ff_activation", PLAIN, "gelu"),
        flag("tie_word_embeddings", "tie_embeddings", False),
        flag("use_parallel_residual", "parallel_residual", True),
        biases(always=("feed_forward", "norm"), attention_bias=(True, ("query", "key", "value", "out"))),
        rope(base="rotary_emb_base", fraction=("rotary_pct", 0.25)),
    ),
    harmless=(),
    bases=("gpt_neox.", ""),
    rules=(
        *embedding("{base}embed_in", "decoder.embed.tokens"),
        *within(
            "{base}layers.{layer}",
            "decoder.stack.blocks.{layer}",
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

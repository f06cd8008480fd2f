"""Phi-3 with a short context: Llama in which several projections share a matrix."""

from attnax.pretrained.families import llama
from attnax.pretrained.fields import biases, only, whole
from attnax.pretrained.rope_fields import rope
from attnax.pretrained.rules import linear

__all__ = ["PHI3"]

PHI3 = llama.decoder(
    "phi3",
    "Phi3",
    *(*llama.FIELDS, llama.GATED_SILU, llama.UNTIED, biases()),
    whole("sliding_window", "attention_window", None),
    rope(fraction=("partial_rotary_factor", 1.0), kinds=("default",)),
    only("attention_bias", False),
    harmless=("resid_pdrop", "embd_pdrop"),
    rules=(
        *llama.in_layers(
            linear("self_attn.qkv_proj", "attention.query", "attention.key", "attention.value"),
            linear("self_attn.o_proj", "attention.out"),
            linear("mlp.gate_up_proj", "feed_forward.gate", "feed_forward.up"),
            linear("mlp.down_proj", "feed_forward.down"),
            llama.NORMS,
        ),
        *llama.HEAD,
    ),
)

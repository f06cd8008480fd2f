"""gpt-oss: experts with biases, a clipped gate, and sinks."""

from attnax.pretrained.families import llama
from attnax.pretrained.fields import PROJECTIONS, biases, only, whole
from attnax.pretrained.layer_fields import alternate_layers, windows
from attnax.pretrained.rope_fields import rope
from attnax.pretrained.rules import Rule

__all__ = ["GPT_OSS"]

_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}

GPT_OSS = llama.decoder(
    "gpt_oss",
    "GptOss",
    *llama.FIELDS,
    whole("head_dim", "head_dim", 64),
    windows(alternate_layers, 128),
    whole("num_local_experts", "num_experts", 128, least=1),
    whole("num_experts_per_tok", "top_k", 4),
    only("hidden_act", "silu"),
    only("swiglu_alpha", 1.702),
    only("swiglu_limit", 7.0),
    llama.UNTIED,
    biases(always=("feed_forward", "router"), attention_bias=(True, PROJECTIONS)),
    rope(150000.0, scaling=_ROPE),
    constants={"attention_sinks": True, "ff_activation": "swiglu_clipped"},
    harmless=("output_router_logits", "router_aux_loss_coef", "initial_context_length", "experts_per_token"),
    rules=(
        *llama.in_layers(
            llama.ATTENTION,
            llama.NORMS,
            (
                Rule("self_attn.sinks", ("attention.sinks",)),
                Rule("mlp.router.weight", ("feed_forward.router",), "O I -> I O"),
                Rule("mlp.router.bias", ("feed_forward.router_bias",)),
                Rule("mlp.experts.gate_up_proj", ("feed_forward.gate", "feed_forward.up"), "E D (F 2) -> E D (2 F)"),
                Rule(
                    "mlp.experts.gate_up_proj_bias",
                    ("feed_forward.gate_bias", "feed_forward.up_bias"),
                    "E (F 2) -> E (2 F)",
                ),
                Rule("mlp.experts.down_proj", ("feed_forward.down",)),
                Rule("mlp.experts.down_proj_bias", ("feed_forward.down_bias",)),
            ),
        ),
        *llama.HEAD,
    ),
)

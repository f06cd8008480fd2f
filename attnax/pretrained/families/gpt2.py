"""GPT-2."""

from collections.abc import Mapping
from typing import Any

from attnax.config import TransformerConfig
from attnax.models.lm import TransformerLM
from attnax.pretrained.family import Family
from attnax.pretrained.fields import PLAIN, Field, choice, flag, only, pad_token, read_all, real, whole
from attnax.pretrained.rules import Rule, embedding, linear, norm, within

__all__ = ["GPT2"]

_CONV = "I O -> I O"  # of the projections, which are not transposed


def _inner() -> Field:
    """The hidden width, by default 4 * n_embd."""
    numbers = whole("n_inner", "d_ff", None), whole("n_embd", "d_model")

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        found = read_all(numbers, given)
        return {"d_ff": 4 * found["d_model"] if found["d_ff"] is None else found["d_ff"]}

    return Field(("n_inner", "n_embd"), read, lambda config: {"n_inner": config.d_ff})


def _scale() -> Field:
    """Whether scores are divided by the square root of the width of a head."""

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        scaled = flag("scale_attn_weights", "scaled", True).read(given)["scaled"]
        return {"attention_scale": None if scaled else 1.0}

    return Field(("scale_attn_weights",), read, lambda config: {"scale_attn_weights": config.attention_scale != 1.0})


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    aliases=("GPT2Model", "GPT2DoubleHeadsModel"),
    model=TransformerLM,
    config=TransformerConfig,
    constants={"norm_type": "layer", "pos_emb_type": "learned", "dropout_rate": 0.0},
    fields=(
        whole("vocab_size", "vocab_size"),
        whole("n_positions", "max_len", 1024),
        whole("n_embd", "d_model"),
        whole("n_layer", "num_layers"),
        whole("n_head", "num_heads"),
        _inner(),
        choice("activation_function", "ff_activation", {"gelu_new": "gelu_tanh", **PLAIN}, "gelu_new"),
        real("layer_norm_epsilon", "norm_eps", 1e-5),
        flag("tie_word_embeddings", "tie_embeddings", True),
        _scale(),
        only("scale_attn_by_inverse_layer_idx", False),
        pad_token(),
    ),
    harmless=(
        *("n_ctx", "reorder_and_upcast_attn", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    ),
    bases=("transformer.", ""),
    rules=(
        *embedding("{base}wte", "decoder.embed.tokens"),
        *embedding("{base}wpe", "decoder.embed.positions"),
        *within(
            "{base}h.{layer}",
            "decoder.stack.blocks.{layer}",
            norm("ln_1", "around_attention.norm_in"),
            linear("attn.c_attn", "attention.query", "attention.key", "attention.value", weight=_CONV),
            linear("attn.c_proj", "attention.out", weight=_CONV),
            norm("ln_2", "around_feed_forward.norm_in"),
            linear("mlp.c_fc", "feed_forward.up", weight=_CONV),
            linear("mlp.c_proj", "feed_forward.down", weight=_CONV),
        ),
        *norm("{base}ln_f", "decoder.norm"),
        Rule("lm_head.weight", ("head.projection.kernel",), "O I -> I O"),
    ),
    # The head that chooses between texts is not read.
    buffers=(
        *("attn.bias", "attn.masked_bias"),
        *("multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"),
    ),
)

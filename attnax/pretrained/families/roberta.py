"""RoBERTa and XLM-RoBERTa: BERT in which position 0 is the row after the row of the padding token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from attnax.config import TransformerConfig
from attnax.pretrained.families.bert import BERT_MASKED, FIELDS, HARMLESS, RULES, encoder_of
from attnax.pretrained.fields import PLAIN, Field, choice, only, read_all, whole
from attnax.pretrained.rules import Rule, linear, norm

__all__ = ["ROBERTA", "ROBERTA_MASKED", "XLM_ROBERTA", "XLM_ROBERTA_MASKED"]


def _positions() -> Field:
    """The longest text and the padding token; the rows up to the padding token's row are no positions."""
    numbers = whole("max_position_embeddings", "rows", 512), whole("pad_token_id", "pad_token_id", 1)

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        found = read_all(numbers, given)
        offset = found["pad_token_id"] + 1
        return {"pad_token_id": offset - 1, "position_offset": offset, "max_len": found["rows"] - offset}

    def write(config: TransformerConfig) -> dict[str, Any]:
        return {
            "pad_token_id": config.position_offset - 1,
            "max_position_embeddings": config.position_offset + config.max_len,
        }

    return Field(("max_position_embeddings", "pad_token_id"), read, write)


ROBERTA_MASKED = dataclasses.replace(
    BERT_MASKED,
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    aliases=(),
    constants={**BERT_MASKED.constants, "ff_activation": "gelu"},
    fields=(
        *FIELDS,
        only("hidden_act", "gelu"),  # the only activation that the head has
        _positions(),
        only("tie_word_embeddings", True),
    ),
    harmless=HARMLESS,
    bases=("roberta.", ""),
    rules=(
        *RULES,
        *linear("lm_head.dense", "transform"),
        *norm("lm_head.layer_norm", "norm"),
        Rule("lm_head.bias", ("head.bias",)),
    ),
    buffers=("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias", "lm_head.decoder.bias"),
    tied=("lm_head.decoder.weight",),
)
ROBERTA = encoder_of(
    dataclasses.replace(
        ROBERTA_MASKED, fields=(*FIELDS, choice("hidden_act", "ff_activation", PLAIN, "gelu"), _positions())
    ),
    "RobertaModel",
)
XLM_ROBERTA_MASKED = dataclasses.replace(ROBERTA_MASKED, model_type="xlm-roberta", architecture="XLMRobertaForMaskedLM")
XLM_ROBERTA = dataclasses.replace(ROBERTA, model_type="xlm-roberta", architecture="XLMRobertaModel")

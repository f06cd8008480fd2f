"""The families of published models."""

from attnax.pretrained.families.bert import BERT, BERT_MASKED
from attnax.pretrained.families.distilbert import DISTILBERT, DISTILBERT_MASKED
from attnax.pretrained.families.gemma import GEMMA, GEMMA2, GEMMA3
from attnax.pretrained.families.gpt2 import GPT2
from attnax.pretrained.families.gpt_neox import GPT_NEOX
from attnax.pretrained.families.gpt_oss import GPT_OSS
from attnax.pretrained.families.llama import LLAMA
from attnax.pretrained.families.mistral import MISTRAL, MIXTRAL
from attnax.pretrained.families.olmo2 import OLMO2
from attnax.pretrained.families.phi3 import PHI3
from attnax.pretrained.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from attnax.pretrained.families.roberta import ROBERTA, ROBERTA_MASKED, XLM_ROBERTA, XLM_ROBERTA_MASKED
from attnax.pretrained.families.t5 import MT5, MT5_ENCODER, T5, T5_ENCODER
from attnax.pretrained.families.vit import DINOV2, DINOV2_REGISTERS, VIT, VIT_CLASSES

__all__ = ["FAMILIES"]

FAMILIES = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OLMO2, PHI3, GPT2, GPT_NEOX, MIXTRAL, QWEN3_MOE, GPT_OSS),
    *(BERT, BERT_MASKED, ROBERTA, ROBERTA_MASKED, XLM_ROBERTA, XLM_ROBERTA_MASKED, DISTILBERT, DISTILBERT_MASKED),
    *(VIT, VIT_CLASSES, DINOV2, DINOV2_REGISTERS),
    *(T5, T5_ENCODER, MT5, MT5_ENCODER),
)
"""`save_pretrained` tries the families in this order."""

"""The families of published models, one file each."""

from attnax.pretrained.families.bert import BERT, BERT_MASKED
from attnax.pretrained.families.distilbert import DISTILBERT, DISTILBERT_MASKED
from attnax.pretrained.families.gpt2 import GPT2
from attnax.pretrained.families.llama import LLAMA
from attnax.pretrained.families.roberta import ROBERTA, ROBERTA_MASKED

__all__ = ["FAMILIES"]

FAMILIES = (
    LLAMA,
    GPT2,
    BERT,
    BERT_MASKED,
    ROBERTA,
    ROBERTA_MASKED,
    DISTILBERT,
    DISTILBERT_MASKED,
)
"""In the order in which a family is looked for that a model can be written as."""

"""The families of published models, one file each."""

from attnax.pretrained.families.gpt2 import GPT2
from attnax.pretrained.families.llama import LLAMA

__all__ = ["FAMILIES"]

FAMILIES = (LLAMA, GPT2)
"""In the order in which a family is looked for that a model can be written as."""

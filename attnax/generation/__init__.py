"""Text generation with any model that is a function `(state, tokens, cache) -> (logits, cache)`."""

from attnax.generation.beam import Beams, beam_search
from attnax.generation.loop import Generation, Stream, generate
from attnax.generation.prompt import TextCaches, prefill
from attnax.generation.request import Request, make_request
from attnax.generation.rules import TokenRules
from attnax.generation.samplers import Sampler
from attnax.generation.speculative import Draft, generate_with_draft
from attnax.generation.step import Step, Tokens
from attnax.generation.text import Text

__all__ = [
    "Beams",
    "Draft",
    "Generation",
    "Request",
    "Sampler",
    "Step",
    "Stream",
    "Text",
    "TextCaches",
    "TokenRules",
    "Tokens",
    "beam_search",
    "generate",
    "generate_with_draft",
    "make_request",
    "prefill",
]

"""Text generation with any model that is a function `(state, tokens, cache) -> (logits, cache)`."""

from attnax.generation.beam import Beams, beam_search
from attnax.generation.loop import Generation, Step, Tokens, generate, stream
from attnax.generation.request import Request, make_request
from attnax.generation.rules import TokenRules
from attnax.generation.samplers import Sampler
from attnax.generation.speculative import Draft, generate_with_draft
from attnax.generation.text import Text

__all__ = [
    "Beams",
    "Draft",
    "Generation",
    "Request",
    "Sampler",
    "Step",
    "Text",
    "TokenRules",
    "Tokens",
    "beam_search",
    "generate",
    "generate_with_draft",
    "make_request",
    "stream",
]

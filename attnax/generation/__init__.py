"""Writing text with a model that is only a function `(state, ids, position_ids, cache) -> (logits, cache)`."""

from attnax.generation.loop import Generation, Request, Step, generate, stream
from attnax.generation.samplers import Sampler

__all__ = ["Generation", "Request", "Sampler", "Step", "generate", "stream"]

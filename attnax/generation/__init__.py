"""Writing text with a model that is only a function `(state, ids, position_ids, cache) -> (logits, cache)`."""

from attnax.generation.loop import Generation, Step, generate, stream
from attnax.generation.samplers import Sampler

__all__ = ["Generation", "Sampler", "Step", "generate", "stream"]

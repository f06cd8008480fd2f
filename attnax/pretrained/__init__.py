"""Published checkpoints: folders of `config.json` and `*.safetensors`, read into models and written from them."""

from attnax.pretrained.errors import CheckpointError
from attnax.pretrained.generation_config import GenerationSettings, load_generation_config
from attnax.pretrained.models import load_pretrained, save_pretrained

__all__ = [
    "CheckpointError",
    "GenerationSettings",
    "load_generation_config",
    "load_pretrained",
    "save_pretrained",
]

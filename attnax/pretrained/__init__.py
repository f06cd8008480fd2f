"""Published checkpoints: folders of `config.json` and `*.safetensors`, read into models and written from them."""

from attnax.pretrained.errors import CheckpointError
from attnax.pretrained.models import load_pretrained, save_pretrained

__all__ = ["CheckpointError", "load_pretrained", "save_pretrained"]

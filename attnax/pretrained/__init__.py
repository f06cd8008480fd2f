"""Published checkpoints: folders of `config.json` and `*.safetensors`, read into models and written from them."""

from attnax.pretrained.errors import CheckpointError

__all__ = ["CheckpointError"]

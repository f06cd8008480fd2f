"""Published checkpoints: folders of `config.json` and `*.safetensors`, read into models and written from them.

Caches have files of their own. Names are loaded when first used.
"""

from __future__ import annotations

from attnax.lazy import lazy_imports

with lazy_imports(globals()):
    from attnax.pretrained.caches import load_caches as load_caches
    from attnax.pretrained.caches import save_caches as save_caches
    from attnax.pretrained.errors import CheckpointError as CheckpointError
    from attnax.pretrained.generation_config import GenerationSettings as GenerationSettings
    from attnax.pretrained.generation_config import load_generation_config as load_generation_config
    from attnax.pretrained.models import load_pretrained as load_pretrained
    from attnax.pretrained.models import save_pretrained as save_pretrained

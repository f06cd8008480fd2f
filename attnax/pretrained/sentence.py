"""What a folder of sentence-transformers has beside the encoder: how its hidden states become one vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attnax.models.sentence import SentenceEncoder
from attnax.models.transformer import TransformerEncoder
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.json_object import read_list, read_object

__all__ = ["read_pooling", "write_pooling"]

MODULES = "modules.json"
_POOLING = "1_Pooling"
_TYPES = ("Transformer", "Pooling", "Normalize")
_POOLS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def read_pooling(folder: Path) -> dict[str, Any] | None:
    """The arguments of `SentenceEncoder` beside the encoder, or None where the folder has no `modules.json`.

    Raises:
        CheckpointError: modules other than Transformer, Pooling (the mean or the first token) and Normalize, in order.
    """
    if not (folder / MODULES).exists():
        return None
    modules = read_list(folder / MODULES)
    types = [str(module.get("type")).rpartition(".")[2] if isinstance(module, dict) else None for module in modules]
    paths = [module.get("path") if isinstance(module, dict) else None for module in modules]
    if types not in (list(_TYPES), list(_TYPES[:2])) or paths[:2] != ["", _POOLING]:
        raise CheckpointError(
            folder / MODULES,
            f"its modules must be {', '.join(_TYPES)}, where the last may be missing and the second is in {_POOLING}; "
            f"got {quoted(types)}.",
        )
    config = read_object(folder / _POOLING / "config.json")
    modes = [key for key, value in config.items() if key.startswith("pooling_mode") and value]
    if len(modes) != 1 or modes[0] not in _POOLS:
        raise CheckpointError(
            folder / _POOLING / "config.json", f"one of {', '.join(_POOLS)} must be true; got {quoted(modes)}."
        )
    return {"pool": _POOLS[modes[0]], "normalize": len(types) == len(_TYPES)}


def write_pooling(model: SentenceEncoder, folder: Path) -> None:
    """Writes what `read_pooling` reads."""
    types = _TYPES if model.normalize else _TYPES[:2]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(types)
    ]
    (folder / MODULES).write_text(json.dumps(modules, indent=2) + "\n", "utf-8")
    for module in modules[1:]:
        (folder / str(module["path"])).mkdir(exist_ok=True)
    assert isinstance(model.encoder, TransformerEncoder)
    pooling = {"word_embedding_dimension": model.encoder.config.d_model}
    pooling |= {key: pool == model.pool for key, pool in _POOLS.items()}
    (folder / _POOLING / "config.json").write_text(json.dumps(pooling, indent=2) + "\n", "utf-8")

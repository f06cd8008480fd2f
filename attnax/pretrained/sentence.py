"""What a folder of sentence-transformers has beside the encoder: how its hidden states become one vector."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnax.config import TransformerConfig
from attnax.models.sentence import SentenceEncoder
from attnax.models.transformer import TransformerEncoder
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.json_object import read_list, read_object
from attnax.pretrained.tokenizer_file import refusals_as

if TYPE_CHECKING:
    import tokenizers

__all__ = ["MODULES", "fit_tokenizer", "read_pooling", "write_pooling"]

MODULES = "modules.json"
_POOLING = "1_Pooling"
_TYPES = ("Transformer", "Pooling", "Normalize")
_FLAGS = {  # of versions before 6, which have no pooling_mode
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLING_KEYS = {"pooling_mode", "include_prompt", "embedding_dimension", "word_embedding_dimension"}
_TRANSFORMERS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}


def read_pooling(folder: Path) -> dict[str, Any] | None:
    """The arguments of `SentenceEncoder` beside the encoder, or None where the folder has no `modules.json`.

    Raises:
        CheckpointError: modules other than Transformer, Pooling (the mean or the first token) and Normalize, in order,
            or of which the files say more than is understood.
    """
    where = folder / MODULES
    if not where.exists():
        return None
    modules = [module if isinstance(module, dict) else {} for module in read_list(where)]
    types = [_type(module.get("type")) for module in modules]
    paths = [module.get("path") for module in modules]
    if types not in (list(_TYPES), list(_TYPES[:2])) or paths[:2] != ["", _POOLING]:
        raise CheckpointError(
            where,
            f"its modules must be {', '.join(_TYPES)} of sentence-transformers, of which the last may be missing, the "
            f"first in the folder itself and the second in {_POOLING}; got {quoted(types)} in {quoted(paths)}.",
        )
    _check_module(_transformer_file(folder), "token_embeddings")
    _check_module(folder / "2_Normalize" / "config.json", "sentence_embedding")
    return {"pool": _read_pool(folder / _POOLING / "config.json"), "normalize": len(types) == len(_TYPES)}


def _type(name: Any) -> Any:
    """Such as Pooling; code of others keeps its whole name."""
    is_theirs = isinstance(name, str) and name.startswith("sentence_transformers.")
    return name.rpartition(".")[2] if is_theirs else name


def _transformer_file(folder: Path) -> Path:
    """What sentence-transformers has to say of the encoder, by one of several names; there may be none."""
    files = [folder / f"sentence_{kind}_config.json" for kind in _TRANSFORMERS]
    return next((file for file in files if file.exists()), files[0])


def _check_module(file: Path, output: str) -> None:
    """Raises CheckpointError where the file of a module says that it does what is not done here; there may be none."""
    said: Mapping[str, Any] = read_object(file) if file.exists() else {}
    modalities = said.get("modality_config")
    known = {
        "transformer_task": "feature-extraction",
        "modality_config": {**modalities, "text": _FORWARD} if isinstance(modalities, dict) else {"text": _FORWARD},
        "module_input_name": output,
        "module_output_name": output,
    }
    problems = [
        f"{key} must be {expected!r}, which is all that is supported; got {key}={quoted(said[key])}."
        for key, expected in known.items()
        if said.get(key, expected) != expected
    ]
    if problems:
        raise CheckpointError(file, problems)


def _read_pool(file: Path) -> str:
    """The pool of SentenceEncoder that the file of a Pooling says."""
    said = read_object(file)
    modes = said.get("pooling_mode", [mode for key, mode in _FLAGS.items() if said.get(key)] or "mean")
    modes = modes if isinstance(modes, list) else [modes]
    unknown = sorted(said.keys() - _FLAGS.keys() - _POOLING_KEYS)
    problems = [f"{key}={quoted(said[key])} is no field of a Pooling that is known here." for key in unknown]
    if modes not in (["mean"], ["cls"]):
        problems.append(f"pooling_mode must be 'mean' or 'cls'; got {quoted(modes)}.")
    if said.get("include_prompt", True) is not True:
        problems.append(f"include_prompt must be true; got include_prompt={quoted(said['include_prompt'])}.")
    if problems:
        raise CheckpointError(file, problems)
    return str(modes[0])


def fit_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, config: TransformerConfig) -> None:
    """Makes the tokenizer read texts as sentence-transformers does: how much of them, and whether in small letters."""
    from tokenizers import normalizers

    file, settings = _transformer_file(folder), folder / "tokenizer_config.json"
    said: Mapping[str, Any] = read_object(file) if file.exists() else {}
    length = said.get("max_seq_length")
    if length is None and settings.exists():
        length = read_object(settings).get("model_max_length")
    limits = [] if config.pos_emb_type == "relative" else [config.max_len]
    limits += [length] if type(length) is int and 0 < length < 2**31 else []  # a huge one is none
    with refusals_as(lambda reason: CheckpointError(file, f"max_seq_length does not fit the tokenizer ({reason}).")):
        if limits:
            tokenizer.enable_truncation(min(limits))
    if tokenizer.padding is not None:  # to the longest of a batch, not to a length
        tokenizer.enable_padding(**tokenizer.padding | {"length": None})
    if said.get("do_lower_case"):
        parts = [normalizers.Lowercase(), *([] if tokenizer.normalizer is None else [tokenizer.normalizer])]
        tokenizer.normalizer = normalizers.Sequence(parts)


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
    pooling |= {key: pool == model.pool for key, pool in _FLAGS.items()}
    (folder / _POOLING / "config.json").write_text(json.dumps(pooling, indent=2) + "\n", "utf-8")

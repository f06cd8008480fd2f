"""The files of sentence-transformers that describe how the hidden states of an encoder become one vector."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnax.config import Pool, TransformerConfig
from attnax.models.sentence import SentenceEncoder
from attnax.models.transformer import TransformerEncoder
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.json_object import read_list, read_object
from attnax.pretrained.tokenizer_file import refusals_as

if TYPE_CHECKING:
    import tokenizers

__all__ = ["MODULES", "Pooling", "fit_tokenizer", "read_pooling", "write_pooling"]

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


@dataclasses.dataclass(frozen=True)
class Pooling:
    """The options that make a `SentenceEncoder` of an encoder.

    Attributes:
        pool: of the `SentenceEncoder`.
        normalize: of the `SentenceEncoder`.
        file: with the settings of the encoder; may be missing.
        settings: the content of the file.
    """

    pool: Pool
    normalize: bool
    file: Path
    settings: Mapping[str, Any]


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling of a folder, or None if it has no `modules.json`.

    Raises:
        CheckpointError: modules other than Transformer, Pooling (the mean or the first token) and Normalize, in this
            order, or an unknown key or value in a file of a module.
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
    files = [folder / f"sentence_{kind}_config.json" for kind in _TRANSFORMERS]
    file, normalize = next(filter(Path.exists, files), files[0]), folder / "2_Normalize" / "config.json"
    settings = _read_if_there(file)
    _check_module(file, settings, "token_embeddings")
    _check_module(normalize, _read_if_there(normalize), "sentence_embedding")
    pool = _read_pool(folder / _POOLING / "config.json")
    return Pooling(pool, len(types) == len(_TYPES), file, settings)


def _type(name: Any) -> Any:
    """The last part of a type, such as "Pooling"; a type outside of sentence-transformers keeps its whole name."""
    is_known = isinstance(name, str) and name.startswith("sentence_transformers.")
    return name.rpartition(".")[2] if is_known else name


def _read_if_there(file: Path) -> Mapping[str, Any]:
    return read_object(file) if file.exists() else {}


def _check_module(file: Path, given: Mapping[str, Any], output: str) -> None:
    """Raises CheckpointError if the file of a module describes another computation than the supported one."""
    modalities = given.get("modality_config")
    known = {
        "transformer_task": "feature-extraction",
        "modality_config": {**modalities, "text": _FORWARD} if isinstance(modalities, dict) else {"text": _FORWARD},
        "module_input_name": output,
        "module_output_name": output,
    }
    problems = [
        f"{key} must be {expected!r}, which is all that is supported; got {key}={quoted(given[key])}."
        for key, expected in known.items()
        if given.get(key, expected) != expected
    ]
    if problems:
        raise CheckpointError(file, problems)


def _read_pool(file: Path) -> Pool:
    """The `pool` of a SentenceEncoder, from the file of a Pooling."""
    given = read_object(file)
    modes = given.get("pooling_mode", [mode for key, mode in _FLAGS.items() if given.get(key)] or "mean")
    modes = modes if isinstance(modes, list) else [modes]
    unknown = sorted(given.keys() - _FLAGS.keys() - _POOLING_KEYS)
    problems = [f"{key}={quoted(given[key])} is no field of a Pooling that is known here." for key in unknown]
    if modes not in (["mean"], ["cls"]):
        problems.append(f"pooling_mode must be 'mean' or 'cls'; got {quoted(modes)}.")
    if given.get("include_prompt", True) is not True:
        problems.append(f"include_prompt must be true; got include_prompt={quoted(given['include_prompt'])}.")
    if problems:
        raise CheckpointError(file, problems)
    return "mean" if modes == ["mean"] else "cls"


def fit_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, pooling: Pooling, config: TransformerConfig) -> None:
    """Sets truncation, padding and lower case as sentence-transformers does."""
    from tokenizers import normalizers

    length = pooling.settings.get("max_seq_length")
    if length is None:
        length = _read_if_there(folder / "tokenizer_config.json").get("model_max_length")
    limits = [] if config.pos_emb_type == "relative" else [config.max_len]
    limits += [length] if type(length) is int and 0 < length < 2**31 else []  # a huge length stands for no limit
    with refusals_as(
        lambda reason: CheckpointError(pooling.file, f"max_seq_length does not fit the tokenizer ({reason}).")
    ):
        if limits:
            tokenizer.enable_truncation(min(limits))
    if tokenizer.padding is not None:  # to the longest text of a batch, not to a fixed length
        tokenizer.enable_padding(**tokenizer.padding | {"length": None})
    if pooling.settings.get("do_lower_case"):
        parts = [normalizers.Lowercase(), *([] if tokenizer.normalizer is None else [tokenizer.normalizer])]
        tokenizer.normalizer = normalizers.Sequence(parts)


def write_pooling(model: SentenceEncoder, folder: Path) -> None:
    """Writes the files that `read_pooling` reads."""
    types = _TYPES if model.normalize else _TYPES[:2]
    paths = ["", _POOLING, "2_Normalize"][: len(types)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(types, paths, strict=True))
    ]
    (folder / MODULES).write_text(json.dumps(modules, indent=2) + "\n", "utf-8")
    for path in paths:
        (folder / path).mkdir(exist_ok=True)
    assert isinstance(model.encoder, TransformerEncoder)
    pooling = {"word_embedding_dimension": model.encoder.config.d_model}
    pooling |= {key: pool == model.pool for key, pool in _FLAGS.items()}
    (folder / _POOLING / "config.json").write_text(json.dumps(pooling, indent=2) + "\n", "utf-8")

"""The model of a published checkpoint, which writes text."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from attnax.config import Dtype
from attnax.errors import InputError
from attnax.models import Transformer, TransformerLM
from attnax.models.sentence import SentenceEncoder
from attnax.pretrained.foreign import ADAPTER
from attnax.pretrained.generation_config import read_generation_config
from attnax.pretrained.inspect import inspect_folder
from attnax.pretrained.json_object import read_object
from attnax.pretrained.models import load_inspected
from attnax.pretrained.sentence import MODULES
from attnax.text.model import TextModel, Translator
from attnax.text.published_codec import PublishedCodec

__all__ = ["is_published", "open_published"]


def is_published(folder: Path) -> bool:
    """Whether the folder is a published checkpoint, complete or not, rather than a run folder.

    Raises:
        InputError: the folder is neither, or its config.json is not one object of JSON of at most 16 MiB.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}.")
    if any(folder.glob("*.safetensors")) or (folder / ADAPTER).exists():
        return True
    config = folder / "config.json"
    if not config.exists():
        raise InputError(f"{folder} is neither a run folder nor a published checkpoint: it has no config.json.")
    return "model_type" in read_object(config)


def open_published(folder: Path, dtype: Dtype | None = None, *, ignore: Collection[str] = ()) -> TextModel:
    """The model of a published checkpoint, with its codec and its settings. Each file is read once.

    Args:
        folder: of the checkpoint.
        dtype: of parameters and computation, by default the dtype of the tensors.
        ignore: keys of config.json to ignore.

    Raises:
        InputError: the checkpoint cannot be loaded, writes no text, or has no tokenizer.json.
    """
    seen = inspect_folder(folder, dtype, ignore)
    kind = seen.require_family().model
    if kind not in (TransformerLM, Transformer):
        kind = SentenceEncoder if (folder / MODULES).is_file() else kind
        raise InputError(
            f"{folder} holds a {kind.__name__}, which writes no text; generate takes a TransformerLM or a Transformer."
        )
    if not (folder / "tokenizer.json").exists():
        raise InputError(
            f"{folder} has no tokenizer.json. Where there is another tokenizer, transformers makes one: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder). One of the tokenizers library is saved by "
            "its own save('.../tokenizer.json')."
        )
    settings = read_generation_config(folder, seen.config_json)
    model, tokenizer = load_inspected(seen)
    assert tokenizer is not None
    ends, start = settings.eos_token_id, settings.bos_token_id
    if not isinstance(model, Transformer):
        return TextModel(folder, model, PublishedCodec(tokenizer, ends, start), settings=settings)
    first = settings.start_token
    if first is None:
        raise InputError(f"{folder / 'config.json'} must have a decoder_start_token_id, with which a text starts.")
    codec = PublishedCodec(tokenizer, ends, start, whole=True)
    return Translator(folder, model, codec, first, settings=settings)

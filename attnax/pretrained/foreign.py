"""Folders that do not hold the plain tensors of a model: the errors name their format, and how to get a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.json_object import read_object

__all__ = ["ADAPTER", "QUANTISATION", "find_adapter", "find_quantised", "no_tensors", "transformers_class"]

ADAPTER = "adapter_config.json"
QUANTISATION = ("quantization_config", "quantization", "compression_config")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9]{0,79}")
_PEFT_CLASSES = {
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_FULL_SIZE = {  # the object with which transformers undoes a quantisation, by its method
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(dequantize=True)",
}
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|weight_packed|weight_scale|weight_scale_inv|SCB|absmax|quant_map)$|_(blocks|scales)$"
)


def transformers_class(config_json: Mapping[str, Any]) -> str:
    """The class in transformers that reads a checkpoint with this config.json, its head included."""
    architectures = config_json.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return first if isinstance(first, str) and _CLASS.fullmatch(first) else "AutoModelForCausalLM"


def find_adapter(folder: Path) -> CheckpointError | None:
    """The error for a folder with an adapter, or None. transformers would load the base model and add the adapter."""
    if not (folder / ADAPTER).exists():
        return None
    try:
        config = read_object(folder / ADAPTER)
    except CheckpointError as error:
        return error
    kind, base = quoted(config.get("peft_type")), quoted(config.get("base_model_name_or_path"))
    name = _PEFT_CLASSES.get(str(config.get("task_type")), "AutoPeftModelForCausalLM")
    return CheckpointError(
        folder,
        f"it is an adapter (peft_type={kind}) of the model {base}, not a model. Merge them with PyTorch and peft, and "
        f"load the merged model: from peft import {name}; "
        f"{name}.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(new_folder). Where the folder "
        f"holds the merged model already, remove {ADAPTER}.",
    )


def find_quantised(where: Path, config_json: Mapping[str, Any], names: Iterable[str]) -> CheckpointError | None:
    """The error for tensors that are quantised according to config.json or to their names, or None."""
    given = next((config_json[key] for key in QUANTISATION if config_json.get(key)), None)
    example = next(filter(_QUANTISED.search, names), None)
    if given is None and example is None:
        return None
    config = given if isinstance(given, dict) else {}
    method = config.get("quant_method")
    if isinstance(method, str):
        reason = quoted(method)[1:-1]
    elif config.get("load_in_4bit") or config.get("load_in_8bit"):
        reason = method = "bitsandbytes"
    elif "quantization" in config_json:
        reason = "mlx"
    elif given is not None:
        reason = f"quantization_config={quoted(given)}"
    else:
        reason = f"it has {quoted(example)}"
    problem = f"it is quantised ({reason}), and only tensors of plain numbers are read. Take the model it was made from"
    name, path = transformers_class(config_json), repr(str(where.parent))
    if method in _FULL_SIZE:
        names = f"{name}, {_FULL_SIZE[method].partition('(')[0]}"
        model = f"{name}.from_pretrained({path}, quantization_config={_FULL_SIZE[method]})"
    elif method == "bitsandbytes":
        names, model = name, f"{name}.from_pretrained({path}).dequantize()"
    else:
        return CheckpointError(where, problem + ".")
    how = f"from transformers import {names}; {model}.save_pretrained(new_folder)"
    return CheckpointError(where, f"{problem}, or have transformers write it in full: {how}.")


def no_tensors(where: object, names: Iterable[str], config_json: Mapping[str, Any], wanted: str) -> CheckpointError:
    """The error for a folder in which no file of tensors can be read, with advice.

    Args:
        where: the folder, or its name on the hub.
        names: of its files.
        config_json: the content of its config.json.
        wanted: the files that it must hold.
    """
    found, name = sorted(names), transformers_class(config_json)
    convert = f"from transformers import {name}; {name}.from_pretrained({str(where)!r}"
    pickles = [file for file in found if file.endswith(_PICKLES)]
    known = [file for file in pickles if file.startswith("pytorch_model")]  # the only names that transformers reads
    if pickles:
        file = (known or pickles)[0]
        how = f"transformers: {convert}).save_pretrained(new_folder). Copy tokenizer.json" if known else "its own tool"
        return CheckpointError(
            where,
            f"only .safetensors files are read; got {file}, of a format whose files can run code. Where you trust it, "
            f"convert it with {how}.",
        )
    for file in found:
        if file.endswith(".gguf"):
            return CheckpointError(
                where,
                f"only .safetensors files are read; got {file}. Take the model that it was made from, or have "
                f"transformers write it in full: {convert}, gguf_file={file!r}).save_pretrained(new_folder).",
            )
    others = [file for file in found if file.endswith((".safetensors", ".h5", ".msgpack"))]
    return CheckpointError(where, f"it must hold {wanted}{f'; got {others[0]}' if others else ''}.")

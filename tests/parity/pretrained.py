"""Tiny checkpoints of Hugging Face transformers and its results with them, stored for tests/pretrained.

    python tests/parity/pretrained.py --check    # needs torch and transformers; `make parity` installs them
    python tests/parity/pretrained.py --write [NAME ...]

Each folder of tests/goldens/pretrained is a checkpoint in transformers' format, and `outputs.npz`:

    ids, real           tokens (rows, length), and a mask of real tokens; the first row has no padding
    outputs             logits or hidden states of the real tokens
    tokens, log_probs   of a language model: its text after each row at temperature 0, and its log-probabilities
    images              of a vision model, (rows, height, width, channels)
    positions_HxW       of a vision model with square images: its table of positions for images of H times W pixels
    target_ids          of an encoder-decoder: target tokens (rows, length) of `outputs`, without padding

If a case asks for `gradients`, `gradients.safetensors` holds the gradient of the mean of all squared outputs.

`--check` makes all files again and compares them. Attnax reads and writes each checkpoint, and transformers reads the
result. transformers also reads the checkpoint with keys that Attnax ignores. Vision models of the published sizes are
compared on images of other sizes.

NumPy draws the weights, so torch's random numbers may change without new files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from pretrained_cases import CASES, Case
from safetensors.numpy import load_file, save_file

from attnax.models import with_image_size
from attnax.pretrained import load_pretrained, save_pretrained
from attnax.pretrained.families import FAMILIES
from attnax.pretrained.inert import ANY_VALUE, HARMLESS_VALUES
from attnax.pretrained.inspect import inspect_folder

FOLDER = Path(__file__).parents[1] / "goldens" / "pretrained"
NEW_TOKENS = 7
Arrays = dict[str, np.ndarray]
SIZES = (6, 6), (15, 15), (6, 21)
PUBLISHED_SIZES = {
    "ViTModel": {"image_size": 224, "patch_size": 16, "intermediate_size": 37},
    "Dinov2Model": {"image_size": 518, "patch_size": 14},
    "Dinov2WithRegistersModel": {"image_size": 518, "patch_size": 14},
}


def make_model(case: Case, seed: int) -> transformers.PreTrainedModel:
    architecture = getattr(transformers, case.architecture)
    ends = {} if "T5" in case.architecture else {"bos_token_id": None, "eos_token_id": None}
    model = architecture(architecture.config_class(**ends | case.fields), **case.options).eval()
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        parameter.data = torch.tensor(weights(rng, name, tuple(parameter.shape), case)).to(case.dtype).float()
    model.tie_weights()
    if case.untied:
        head = weights(rng, "lm_head.weight", tuple(model.lm_head.weight.shape), case)
        model.lm_head.weight = torch.nn.Parameter(torch.tensor(head))
    return model


def weights(rng: np.random.Generator, name: str, shape: tuple[int, ...], case: Case) -> np.ndarray:
    """Random numbers of a size at which outputs neither vanish nor overflow, and every tensor has an effect."""
    is_norm = len(shape) == 1 and name.endswith("weight")
    deviation = 0.3 if len(shape) == 1 else 1.0 if "embed" in name or "wte" in name else 1.5 * shape[-1] ** -0.5
    return rng.normal(case.norm_mean if is_norm else 0.0, deviation, shape).astype(np.float32)


def make_outputs(model: transformers.PreTrainedModel) -> Arrays:
    if "num_experts_per_tok" in model.config.to_dict():
        model.set_experts_implementation("eager")  # the grouped product refuses some sizes
    if hasattr(model.config, "image_size"):
        return image_outputs(model)
    ids, real = make_tokens(model.config.vocab_size, left=model.can_generate())
    arrays = {"ids": ids, "real": real}
    with torch.no_grad():
        if not model.can_generate():
            return arrays | encode(model, ids, real)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real).long()}
        if model.config.is_encoder_decoder:
            arrays["target_ids"] = np.random.default_rng(5).integers(4, model.config.vocab_size, (3, 11))
            arrays["outputs"] = model(**inputs, decoder_input_ids=torch.tensor(arrays["target_ids"])).logits.numpy()
            inputs["decoder_start_token_id"] = 0
        else:
            positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
            logits = model(**inputs, position_ids=torch.tensor(positions)).logits.numpy()
            arrays["outputs"] = np.where(real[..., None], logits, 0)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        written = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    best = torch.stack(written.logits, 1).log_softmax(-1).topk(2).values.numpy()
    assert (best[..., 0] - best[..., 1] > 1e-3).all(), "two tokens are as likely; take another seed"
    return arrays | {"tokens": written.sequences[:, -NEW_TOKENS:].numpy(), "log_probs": best[..., 0]}


def encode(model: transformers.PreTrainedModel, ids: np.ndarray, real: np.ndarray) -> Arrays:
    """The outputs of an encoder for the tokens."""
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real).long()}
    arrays = {}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        arrays["token_type_ids"] = np.random.default_rng(3).integers(0, model.config.type_vocab_size, ids.shape)
        inputs["token_type_ids"] = torch.tensor(arrays["token_type_ids"])
    out = model(**inputs)
    outputs = out.logits if "logits" in out else out.last_hidden_state
    return arrays | {"outputs": np.where(real[..., None], outputs.numpy(), 0)}


def image_outputs(model: transformers.PreTrainedModel) -> Arrays:
    images = (
        np.random.default_rng(4).normal(size=(2, *model_sides(model), model.config.num_channels)).astype(np.float32)
    )
    with torch.no_grad():
        out = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)))
    arrays = {"images": images, "outputs": (out.logits if "logits" in out else out.last_hidden_state).numpy()}
    if isinstance(model.config.image_size, int):  # transformers assumes a square grid of positions
        arrays |= {f"positions_{height}x{width}": make_positions(model, height, width) for height, width in SIZES}
    return arrays


def make_positions(model: transformers.PreTrainedModel, height: int, width: int) -> np.ndarray:
    """The table of positions for images of another size."""
    count = (height // model.config.patch_size) * (width // model.config.patch_size)
    tokens = torch.empty(1, 1 + count, model.config.hidden_size)  # only its shape matters
    return model.base_model.embeddings.interpolate_pos_encoding(tokens, height, width)[0].detach().numpy()


def model_sides(model: transformers.PreTrainedModel) -> list[int]:
    size = model.config.image_size
    return [size, size] if isinstance(size, int) else list(size)


def make_tokens(vocab_size: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Three rows of 13 tokens, two of them padded."""
    ids = np.random.default_rng(2).integers(4, vocab_size, (3, 13))
    counted = np.arange(13)[None, :] < np.array([[13], [8], [11]])
    real = counted[:, ::-1] if left else counted
    return np.where(real, ids, 3), np.ascontiguousarray(real)


def make_gradients(model: transformers.PreTrainedModel, outputs: Arrays) -> Arrays:
    """Gradients of the mean of the squared outputs of the first row, which has no padding."""
    model.zero_grad()
    target = {"decoder_input_ids": torch.tensor(outputs["target_ids"][:1])} if "target_ids" in outputs else {}
    out = model(input_ids=torch.tensor(outputs["ids"][:1]), **target)
    (out.logits if "logits" in out else out.last_hidden_state).square().mean().backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def make_golden(name: str, folder: Path) -> transformers.PreTrainedModel:
    """Writes the folder of one case."""
    case = CASES[name]
    model = make_model(case, seed=len(name))
    outputs = make_outputs(model)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    np.savez_compressed(folder / "outputs.npz", **outputs)
    if case.gradients:
        save_file(make_gradients(model, outputs), folder / "gradients.safetensors")
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return model.float()


def tensors(folder: Path) -> Arrays:
    found: Arrays = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def differences(stored: Path, made: Path) -> Iterator[str]:
    """Messages about the differences of two folders."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in (stored, made)]
    for key in sorted(configs[0].keys() | configs[1].keys() - {"transformers_version"}):
        if configs[0].get(key) != configs[1].get(key):
            yield f"config.json has {key}={configs[1].get(key)}, stored {configs[0].get(key)}"
    old, new = tensors(stored), tensors(made)
    for name in sorted(old.keys() ^ new.keys()):
        yield f"{name} is in one of them only"
    for name in sorted(old.keys() & new.keys()):
        if old[name].tobytes() != new[name].tobytes():
            yield f"{name} differs"
    pairs = [(np.load(stored / "outputs.npz"), np.load(made / "outputs.npz"))]
    if (stored / "gradients.safetensors").exists():
        pairs.append(tuple(load_file(folder / "gradients.safetensors") for folder in (stored, made)))
    for before, after in pairs:
        for name in after:
            if not close(before[name], after[name]):
                yield f"{name} differs"


def close(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether arrays are equal up to the rounding of another machine."""
    scale = max(1.0, float(np.abs(after).max()))
    return before.shape == after.shape and np.allclose(before, after, rtol=0, atol=1e-5 * scale)


def round_trip(name: str, stored: Path) -> Iterator[str]:
    """Attnax reads and writes the checkpoint; transformers reads the written one, and must give the stored results."""
    case = CASES[name]
    architecture = getattr(transformers, case.architecture)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_pretrained(stored)
        save_pretrained(model, folder)
        options = case.options | {"output_loading_info": True, "dtype": torch.float32}
        again, info = architecture.from_pretrained(folder, **options)
        left = {key: set(value) - set(case.left_out) for key, value in info.items()}
        left = {key: value for key, value in left.items() if value}
        if left:
            yield f"transformers does not read what Attnax writes: {left}"
        with np.load(stored / "outputs.npz") as outputs:
            if not close(outputs["outputs"], make_outputs(again.eval())["outputs"]):
                yield "after a round trip the outputs differ"


VALUES = {  # of keys for which transformers takes no other value
    "auto_map": {"AutoConfig": "module.Config"},
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "cache_implementation": "static",
    "early_stopping": True,
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "forced_bos_token_id": 6,
    "forced_eos_token_id": 6,
}


def inert_keys(name: str, stored: Path) -> Iterator[str]:
    """Keys and values that Attnax ignores: with them transformers must give the stored results."""
    family = inspect_folder(stored).family
    assert family is not None
    fields = {key: VALUES.get(key, 0.5) for key in ANY_VALUE} | {
        key: value[0] for key, value in HARMLESS_VALUES.items()
    }
    fields = {key: value for key, value in fields.items() if key not in family.known_keys}
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(stored, folder, dirs_exist_ok=True)
        config = json.loads((stored / "config.json").read_text())
        (Path(folder) / "config.json").write_text(json.dumps(config | fields | {"_made_up": 1}))
        model = getattr(transformers, case.architecture).from_pretrained(folder, dtype=torch.float32, **case.options)
    if model.can_generate():
        model.generation_config = transformers.GenerationConfig()
    with np.load(stored / "outputs.npz") as outputs:
        if not close(outputs["outputs"], make_outputs(model.eval())["outputs"]):
            yield "with inert keys the outputs differ"


def other_sizes() -> Iterator[str]:
    """Narrow vision models with the published image sizes, on images of other sizes."""
    fields = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    for architecture, more in PUBLISHED_SIZES.items():
        model = make_model(Case(architecture, fields | more), seed=0)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            ours, _ = load_pretrained(folder)
        options = {"interpolate_pos_encoding": True} if architecture == "ViTModel" else {}
        for size in ((224, 224), (448, 448), (224, 448), (448, 112)):
            images = np.random.default_rng(6).normal(size=(1, *size, 3)).astype(np.float32)
            with torch.no_grad():
                out = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)), **options)
            if not close(out.last_hidden_state.numpy(), np.asarray(with_image_size(ours, size)(images))):
                yield f"{architecture} differs for images of {size} pixels"


def unmoved_fields() -> Iterator[str]:
    """Fields that a mapping reads, but that have their default value in every case."""
    defaults: dict[str, Any] = {}
    moved = {("mt5", "tie_word_embeddings")}  # transformers forces it to be true
    for name, case in CASES.items():
        kind = getattr(transformers, case.architecture).config_class
        defaults[kind.model_type] = default = kind().to_dict()
        config = json.loads((FOLDER / name / "config.json").read_text())
        moved |= {(kind.model_type, key) for key in config if config[key] != default.get(key)}
    for family in FAMILIES:
        default = defaults[family.model_type]
        for field in family.fields:
            says_nothing = field.read({key: default[key] for key in field.keys if key in default}) == {}
            if field.keys and not says_nothing and moved.isdisjoint((family.model_type, key) for key in field.keys):
                yield f"{'/'.join(field.keys)} of {family.model_type} has its default in every case"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tiny checkpoints of Hugging Face transformers and its outputs.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="make the files again, and compare them")
    mode.add_argument("--write", action="store_true", help="make the files again, and store them")
    parser.add_argument("names", nargs="*", help="cases, by default all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = arguments.names or list(CASES)
    problems = []
    for name in names:
        if arguments.write:
            make_golden(name, FOLDER / name)
        else:
            with tempfile.TemporaryDirectory() as folder:
                make_golden(name, Path(folder))
                problems += [f"{name}: {problem}" for problem in differences(FOLDER / name, Path(folder))]
        more = (*round_trip(name, FOLDER / name), *inert_keys(name, FOLDER / name))
        problems += [f"{name}: {problem}" for problem in more]
    if not arguments.names:
        problems += [*other_sizes(), *unmoved_fields()]
        problems += [f"{path.name}: no such case" for path in FOLDER.iterdir() if path.name not in CASES]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if problems:
        sys.exit("\n".join([f"{FOLDER} and {versions}:", *problems]))
    print(f"{len(names)} cases of {versions} are as in {FOLDER}.")


if __name__ == "__main__":
    main()

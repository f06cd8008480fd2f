"""The stored checkpoints of tests/parity/pretrained.py: their content, our models of them, and changed copies."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from attnax.pretrained import load_pretrained
from attnax.pretrained.inspect import find_family

FOLDER = Path(__file__).parents[1] / "goldens" / "pretrained"
NAMES = sorted(path.name for path in FOLDER.iterdir())
BFLOAT16 = ("gemma", "llama3")
KIND = ("model_type", "architectures")
# Together they have every kind of block, position, mask, mixture and head; the rest differ in names only.
DIFFERENT = (
    *("bert", "dinov2_registers", "distilbert_masked", "gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "llama3"),
    *("olmo2", "phi3", "qwen3_moe", "roberta", "t5", "vit_classes"),
)


def outputs_of(name):
    with np.load(FOLDER / name / "outputs.npz") as file:
        return dict(file)


def tensors_of(folder):
    return {
        name: tensor
        for path in sorted(Path(folder).glob("model*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(path).items()
    }


def config_of(name):
    return json.loads((FOLDER / name / "config.json").read_text())


def read_config(folder):
    """The facts about our model in the files of a folder, without its dtype."""
    theirs = json.loads((folder / "config.json").read_text())
    family = find_family(theirs, folder)
    return family.adapt(family.read_config(theirs, "config.json"), theirs, tensors_of(folder).keys())


@functools.cache
def load(name, dtype=None):
    return load_pretrained(FOLDER / name, dtype=dtype)[0]


def load_float32(name):
    return load(name, "float32" if name in BFLOAT16 else None)


def check_same(model, other):
    assert type(model) is type(other) and model.config == other.config
    check_parameters(model, other)


def check_parameters(model, other):
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(each, nnx.Param))) for each in (model, other))
    assert ours.keys() == theirs.keys()
    for name, variable in ours.items():
        value, expected = (np.asarray(each[...]) for each in (variable, theirs[name]))
        assert (value.dtype, value.shape, value.tobytes()) == (expected.dtype, expected.shape, expected.tobytes()), name


def run(model, golden):
    graphdef, state = nnx.split(model)

    if "images" in golden:
        return np.asarray(jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, golden["images"]))
    types = {"token_type_ids": golden["token_type_ids"]} if "token_type_ids" in golden else {}

    @jax.jit
    def forward(state, ids, real):
        if "target_ids" in golden:
            return nnx.merge(graphdef, state)(ids, golden["target_ids"], source_padding_mask=real)
        return nnx.merge(graphdef, state)(ids, padding_mask=real, **types)

    return np.asarray(forward(state, golden["ids"], golden["real"]))


def check_outputs(outputs, golden):
    if "real" in golden and "target_ids" not in golden:
        outputs = np.where(golden["real"][..., None], outputs, 0)
    error = np.abs(outputs - golden["outputs"])
    assert error.max() < 2e-4
    assert np.square(error).mean() ** 0.5 < 1e-5 * np.square(golden["outputs"]).mean() ** 0.5


def copy_with(name, folder, **fields):
    """A golden with other fields in its config.json."""
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(name) | fields))
    return folder

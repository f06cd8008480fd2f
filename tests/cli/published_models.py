"""Small published checkpoints, and the message of a command that is refused."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tiny import build

from attnax import TransformerLM
from attnax.cli import main
from attnax.pretrained import save_pretrained

FOLDER = Path(__file__).parents[1] / "goldens" / "pretrained"
NAMES = sorted(path.name for path in FOLDER.iterdir())
CODES = "\x1b[31m\nattnax: all is well\ud800"  # a colour, a line that imitates ours, half of a surrogate pair


def lm(seed=0, **fields):
    """A model with more tokens than its tokenizer, as published models have, and with sure predictions."""
    sizes = {"vocab_size": 310, "d_model": 24, "num_heads": 4, "num_kv_heads": 2, "num_layers": 1, "d_ff": 40}
    kind = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False, "max_len": 64}
    return sure(build(lambda rngs: TransformerLM(rngs, **sizes | kind | fields), seed))


def sure(model):
    """The model with larger logits, so that no two tokens are equally likely."""
    kernel = model.head.projection.kernel
    kernel[...] = jnp.asarray(8 * np.asarray(kernel[...]))
    return model


def publish(folder, model, tokenizer=None, *, config=(), generation=None):
    """A checkpoint in the published form."""
    save_pretrained(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def modify(name, folder, fields=(), tensors=None):
    """A golden with other fields in its config.json, and other tensors."""
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(fields)))
    if tensors is not None:
        held = safetensors.numpy.load_file(folder / "model.safetensors")
        safetensors.numpy.save_file(tensors(held), folder / "model.safetensors")
    return folder


def refuse(capsys, *arguments):
    """The message of a command that is refused."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("attnax: ") and not out
    return error.strip()


GREEDY = ("--temperature", "0")

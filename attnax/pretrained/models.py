"""Published checkpoints into models, and back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.masks import Causal
from attnax.models.sentence import SentenceEncoder
from attnax.models.transformer import TransformerDecoder, TransformerEncoder
from attnax.nn.attention import MultiHeadAttention
from attnax.nn.stack import Stack, with_scan_layers
from attnax.pretrained.checkpoint import SINGLE_FILE, Checkpoint
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.families import FAMILIES
from attnax.pretrained.family import Binding, Family, stacks
from attnax.pretrained.hub import find_folder
from attnax.pretrained.inspect import inspect_folder, parameter_name, parameter_shapes
from attnax.pretrained.safetensors import empty_aligned, same_data, write_tensors
from attnax.pretrained.sentence import MODULES, fit_tokenizer, write_pooling
from attnax.pretrained.tokenizer_file import load_tokenizer

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Sharding", "load_pretrained", "save_pretrained"]

Sharding = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def load_pretrained(
    folder: str | Path,
    *,
    dtype: Any = None,
    sharding: Sharding | None = None,
    ignore: Collection[str] = (),
    revision: str | None = None,
) -> tuple[Any, tokenizers.Tokenizer | None]:
    """The model in a folder of `config.json` and `model.safetensors` as Hugging Face publishes them, and its tokenizer.

    All files are checked before a tensor is read; then they are read one at a time. The model gives what transformers
    gives (`tests/parity/pretrained.py`). It has no dropout, whatever the config says.

    Args:
        folder: with the files; in place of `model.safetensors` several that `model.safetensors.index.json` names. A
            string that is no folder is the name of a model on the Hugging Face hub, such as "openai-community/gpt2",
            taken from its cache or, with the package huggingface_hub, from the hub.
        dtype: of parameters and computation, by default that of the tensors.
        sharding: where parameters go: a `jax.sharding.Sharding` for all of them, or a function of a parameter's name,
            such as "decoder.stack.blocks.0.attention.query.kernel", and its shape; by default the default device.
        ignore: keys of config.json to pass over, such as one that is not known here and changes nothing. A key that is
            read cannot be one of them.
        revision: of a model on the hub: a branch, a tag or a commit; by default its main branch.

    Returns:
        The model, of the class that docs/pretrained.md lists for the architecture (a SentenceEncoder where the folder
        has the `modules.json` of sentence-transformers), whose `loaded_as` is the `model_type`; and a
        `tokenizers.Tokenizer`, or None where the folder has no `tokenizer.json`. That of a SentenceEncoder cuts texts
        and lowers their case as sentence-transformers does.

    Raises:
        CheckpointError: a file is missing or damaged, the files are not what the config says, or it says something that
            is not supported; all that is wrong at once. The hub cannot be asked, or does not give the model.
        ValueError: a dtype that models do not have.

    Warns:
        UserWarning: config.json has keys that the family does not have, but which are known to change nothing.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> from attnax import TransformerLM
        >>> from attnax.pretrained import load_pretrained, save_pretrained
        >>> sizes = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 16}
        >>> kind = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False}
        >>> folder = tempfile.mkdtemp()
        >>> save_pretrained(TransformerLM(nnx.Rngs(0), **sizes, **kind), folder)
        >>> model, tokenizer = load_pretrained(folder)
        >>> model.config.d_ff, tokenizer
        (16, None)
    """
    folder = find_folder(folder, revision)
    seen = inspect_folder(folder, dtype, ignore)
    family, checkpoint, config = seen.require()
    if seen.inert:
        warnings.warn(
            f"load_pretrained: {folder / 'config.json'} has keys that no {family.model_type} reads, and which change "
            f"nothing in what it computes: {', '.join(quoted(key)[1:-1] for key in seen.inert)}.",
            stacklevel=2,
        )
    assert seen.abstract is not None
    (graphdef, state), bindings, pooling = seen.abstract, seen.bindings, seen.pooling
    _check_tied(config, family, checkpoint, bindings)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer is not None and pooling is not None:
        fit_tokenizer(tokenizer, folder, config)
    dtype, arrays = stacks(config)[-1].param_dtype, {}
    # The largest first: what is read last, beside all the others, is then small.
    for binding in sorted(bindings, key=lambda binding: binding.num_elements, reverse=True):
        for name, value in zip(binding.ours, binding.split(_read(checkpoint, binding, dtype)), strict=True):
            where = sharding(name, value.shape) if callable(sharding) else sharding
            arrays[name] = jax.device_put(value, where)  # transposes faster than NumPy does
    flat = [(path, variable.replace(arrays[parameter_name(path)])) for path, variable in nnx.to_flat_state(state)]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    model.loaded_as = family.model_type  # static, so that copies and `nnx.split` keep it
    return model if pooling is None else SentenceEncoder(model, **pooling), tokenizer


def save_pretrained(model: Any, folder: str | Path, *, family: str | None = None) -> None:
    """Writes `config.json` and `model.safetensors`, which transformers and `load_pretrained` read.

    Parameters are written in their own dtype, one at a time. A tokenizer is saved by its own `save`.

    Args:
        model: such as a TransformerLM, whether loaded or made here, if some family has a place for all that it is.
        folder: made if it is missing; files of these names in it are replaced.
        family: a `model_type` of transformers to write it as. By default that which it was loaded as (`loaded_as` of
            the model, which copies keep), if it still has a place for all of it, or else the first that has.

    Raises:
        CheckpointError: no family, or not the given one, has a place for something in the model.
    """
    sentence = model if isinstance(model, SentenceEncoder) else None
    model = model if sentence is None else sentence.encoder
    if any(isinstance(module, Stack) and module.config.scan_layers for _, module in nnx.iter_modules(model)):
        model = with_scan_layers(model, False)
    found, config = _family_for(model, family)
    problems = list(_unwritable(model))
    if problems:
        raise CheckpointError("save_pretrained", problems)
    state = nnx.state(model, nnx.Param)
    parameters = _by_name(state)
    bindings = found.bind(model.config, parameter_shapes(state))
    holder = {name: binding for binding in bindings for name in binding.theirs}

    def make(name: str) -> np.ndarray:
        values = [np.asarray(parameters[ours][...]) for ours in holder[name].ours]
        return holder[name].join(values, name)

    types = {
        name: (np.dtype(parameters[binding.ours[0]].dtype), binding.tensor_shape) for name, binding in holder.items()
    }
    config["torch_dtype"] = str(jnp.result_type(*(dtype for dtype, _ in types.values())))
    folder = Path(folder)
    if sentence is None and (folder / MODULES).exists():
        raise CheckpointError(
            folder, f"its {MODULES} would make a SentenceEncoder of what is written. Write into another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / SINGLE_FILE, types, make)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    if sentence is not None:
        write_pooling(sentence, folder)


def _family_for(model: Any, model_type: str | None) -> tuple[Family, dict[str, Any]]:
    """The family that a model is written as, and its config.json."""
    name = type(model).__name__
    candidates = [family for family in FAMILIES if type(model) is family.model]
    if not candidates:
        known = ", ".join(dict.fromkeys(family.model.__name__ for family in FAMILIES))
        raise CheckpointError("save_pretrained", f"model must be one of {known}; got {name}.")
    loaded_as = getattr(model, "loaded_as", None)
    named = [family for family in candidates if model_type in (None, family.model_type)]
    named.sort(key=lambda family: family.model_type != loaded_as)
    if not named:
        known = ", ".join(family.model_type for family in candidates)
        raise CheckpointError("save_pretrained", f"family of a {name} must be one of {known}; got {model_type!r}.")
    refusals: list[CheckpointError] = []
    for family in named:
        try:
            return family, family.write_config(model.config)
        except CheckpointError as error:
            refusals.append(error)
    closest = min(refusals, key=lambda error: len(error.problems))
    raise CheckpointError(f"save_pretrained, as {closest.where}", closest.problems)


def _unwritable(model: Any) -> Iterator[str]:
    """What a model was given beside its config, for which no config.json has a place."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, TransformerDecoder) and not isinstance(module.self_mask, Causal):
            yield f"self_mask must be the causal one; got {module.self_mask!r}."
        elif isinstance(module, TransformerEncoder) and module.self_mask is not None:
            yield f"self_mask must be None; got {module.self_mask!r}."
        elif isinstance(module, MultiHeadAttention) and module.score_mod is not None:
            yield f"score_mod must be None; got {module.score_mod!r}."


def _check_tied(config: Any, family: Family, checkpoint: Checkpoint, bindings: Sequence[Binding]) -> None:
    """Raises CheckpointError for a head that is not the embeddings, though the config says so."""
    for name in set(family.repeats(config)) & checkpoint.tensors.keys():
        embeddings = next(binding for binding in bindings if binding.ours[0].endswith("embed.tokens.embedding"))
        info, other = checkpoint.tensors[name], checkpoint.tensors[embeddings.theirs[0]]
        if (info.dtype, info.shape) != (other.dtype, other.shape) or not same_data(info, other):
            problem = f"{name!r} must repeat the embeddings, since they are tied, and is another tensor."
            hint = "" if name in family.repeated else " Set tie_word_embeddings to false in config.json."
            raise CheckpointError(checkpoint.folder, problem + hint)


def _read(checkpoint: Checkpoint, binding: Binding, dtype: str) -> np.ndarray:
    """The tensor of a binding, or those of its experts one after the other."""
    if not binding.stacked:
        return checkpoint.read(binding.theirs[0], dtype)
    whole = empty_aligned((len(binding.theirs), *binding.tensor_shape), dtype)
    for expert, name in enumerate(binding.theirs):
        whole[expert] = checkpoint.read(name, dtype)
    return whole


def _by_name(state: Any) -> dict[str, Any]:
    return {parameter_name(path): variable for path, variable in nnx.to_flat_state(state)}

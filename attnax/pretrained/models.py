"""Published checkpoints into models, and back."""

from __future__ import annotations

import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from attnax.nn.axes import parameter_axes
from attnax.nn.depth import with_scan_layers
from attnax.nn.stack import Stack
from attnax.pretrained.checkpoint import SINGLE_FILE, Checkpoint
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.families import FAMILIES
from attnax.pretrained.family import Family, ModelConfig, stacks
from attnax.pretrained.hub import find_folder
from attnax.pretrained.inspect import Inspection, inspect_folder, parameter_name, parameter_shapes
from attnax.pretrained.parts import changed_parts, foreign_parts
from attnax.pretrained.rules import Binding
from attnax.pretrained.safetensors import empty_aligned, read_into, same_data, write_tensors
from attnax.pretrained.sentence import MODULES, fit_tokenizer, write_pooling
from attnax.pretrained.tokenizer_file import load_tokenizer
from attnax.sharding import Layout, check_layout, partition

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Sharding", "load_inspected", "load_pretrained", "save_pretrained"]

MOST_THREADS = 8  # more than a few find no more memory bandwidth

Sharding = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def load_pretrained(
    folder: str | Path,
    *,
    dtype: Any = None,
    sharding: Sharding | None = None,
    layout: Layout | None = None,
    ignore: Collection[str] = (),
    revision: str | None = None,
) -> tuple[Any, tokenizers.Tokenizer | None]:
    """The model in a folder of `config.json` and `model.safetensors` as Hugging Face publishes them, and its tokenizer.

    All files are checked before a tensor is read; then a few threads read the tensors. The model computes the same as
    transformers (`tests/parity/pretrained.py`). It has no dropout, even if the config has some.

    Args:
        folder: with the files; `model.safetensors` may be several files that `model.safetensors.index.json` names. A
            string that is no folder is the name of a model on the Hugging Face hub, such as "openai-community/gpt2",
            taken from its cache or, with the package huggingface_hub, from the hub.
        dtype: of parameters and computation, by default the dtype of the tensors.
        sharding: of the parameters: a `jax.sharding.Sharding` for all of them, or a function of a parameter's name,
            such as "decoder.stack.blocks.0.attention.query.kernel", and its shape; by default the default device.
        layout: in place of sharding: the parameters lie on all devices of the process by the rules of the layout. Call
            the model under its mesh: `with jax.set_mesh(layout.mesh()): ...`.
        ignore: keys of config.json to ignore, such as a key that is not known here and changes nothing. A key that
            decides what the model computes cannot be ignored.
        revision: of a model on the hub: a branch, a tag or a commit; by default its main branch.

    Returns:
        The model, and a `tokenizers.Tokenizer`, or None if the folder has no `tokenizer.json`.
        docs/guides/pretrained.md lists the class of the model for each architecture; it is a SentenceEncoder if the
        folder has the `modules.json` of sentence-transformers. Its `loaded_as` is the `model_type`. The tokenizer of a
        SentenceEncoder truncates texts and lowers their case as sentence-transformers does.

    Raises:
        CheckpointError: a file is missing or damaged, the files do not fit the config, or the config asks for something
            that is not supported; all problems are named. Or the hub cannot be reached, or refuses the model.
        ValueError: a dtype that models do not have, sharding together with layout, or a layout that does not divide the
            model or the devices.

    Warns:
        UserWarning: config.json has keys that are not the family's own and are known to change nothing.

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
    if sharding is not None and layout is not None:
        raise ValueError(
            "load_pretrained: a layout decides where parameters lie; got it with sharding. Leave one of the two out."
        )
    return load_inspected(inspect_folder(find_folder(folder, revision), dtype, ignore), sharding, layout)


def load_inspected(
    seen: Inspection, sharding: Sharding | None = None, layout: Layout | None = None
) -> tuple[Any, tokenizers.Tokenizer | None]:
    """`load_pretrained` of a folder whose config.json and headers are read already."""
    family, checkpoint, config = seen.require()
    if seen.inert:
        warnings.warn(
            f"load_pretrained: {seen.folder / 'config.json'} has keys that no {family.model_type} reads, and which "
            f"change nothing in its results: {', '.join(quoted(key)[1:-1] for key in seen.inert)}.",
            stacklevel=3,
        )
    assert seen.abstract is not None
    (graphdef, state), bindings, pooling = seen.abstract, seen.bindings, seen.pooling
    if layout is not None:
        sharding = _sharding_of(layout, config, state)
    _check_tied(config, family, checkpoint, bindings)
    tokenizer = load_tokenizer(seen.folder / "tokenizer.json")
    if tokenizer is not None and pooling is not None:
        fit_tokenizer(tokenizer, seen.folder, pooling, config)
    dtype, arrays = stacks(config)[-1].param_dtype, {}
    # The largest first, so that the threads end together. A tensor for another device is in host memory too: of the
    # largest, at most one more than there are threads at a time.
    ordered = sorted(bindings, key=lambda binding: binding.num_elements, reverse=True)
    for binding, values in _read_all(checkpoint, ordered, dtype):
        for name, value in zip(binding.parameters, values, strict=True):
            where = sharding(name, value.shape) if callable(sharding) else sharding
            arrays[name] = jax.device_put(value, where)  # in this thread, whose default device it uses
    flat = [(path, variable.replace(arrays[parameter_name(path)])) for path, variable in nnx.to_flat_state(state)]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    model.loaded_as = family.model_type  # static, so that copies and `nnx.split` keep it
    if pooling is not None:
        return SentenceEncoder(model, pool=pooling.pool, normalize=pooling.normalize), tokenizer
    return model, tokenizer


def _sharding_of(layout: Layout, config: ModelConfig, state: Any) -> Sharding:
    mesh = layout.mesh()
    for stack in stacks(config):
        check_layout(stack, layout.sized(mesh.size))
    axes = {parameter_name(path): names for path, names in parameter_axes(state).items()}
    return lambda name, shape: jax.NamedSharding(mesh, partition(mesh, shape, axes[name]))


def save_pretrained(model: Any, folder: str | Path, *, family: str | None = None) -> None:
    """Writes `config.json` and `model.safetensors`, which transformers and `load_pretrained` read.

    Parameters are written in their own dtype, one at a time. A tokenizer is saved by its own `save`.

    Args:
        model: such as a TransformerLM, loaded or made here. Some family must be able to express all of it.
        folder: made if it is missing; files of these names in it are replaced.
        family: a `model_type` of transformers to write the model as. By default the `loaded_as` of the model, which
            copies keep, or, if that family cannot express all of it, the first family that can.

    Raises:
        CheckpointError: no family, or not the given one, can express all of the model.
    """
    sentence = model if isinstance(model, SentenceEncoder) else None
    model = model if sentence is None else sentence.encoder
    if any(isinstance(module, Stack) and module.config.scan_layers for _, module in nnx.iter_modules(model)):
        model = with_scan_layers(model, False)
    if parts := list(foreign_parts(model)):
        raise CheckpointError("save_pretrained", parts)
    found, config = _family_for(model, family)
    if problems := list(_unwritable(model)):
        raise CheckpointError("save_pretrained", problems)
    state = nnx.state(model, nnx.Param)
    parameters = {parameter_name(path): variable for path, variable in nnx.to_flat_state(state)}
    bindings = found.bind(model.config, parameter_shapes(state))
    holder = {name: binding for binding in bindings for name in binding.tensors}

    def make(name: str) -> np.ndarray:
        values = [np.asarray(parameters[parameter][...]) for parameter in holder[name].parameters]
        return holder[name].join(values, name)

    types = {
        name: (np.dtype(parameters[binding.parameters[0]].dtype), binding.tensor_shape)
        for name, binding in holder.items()
    }
    config["torch_dtype"] = str(jnp.result_type(*(dtype for dtype, _ in types.values())))
    folder = Path(folder)
    if sentence is None and (folder / MODULES).exists():
        raise CheckpointError(
            folder, f"its {MODULES} would make the model a SentenceEncoder. Write it into another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / SINGLE_FILE, types, make)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    if sentence is not None:
        write_pooling(sentence, folder)


def _family_for(model: Any, model_type: str | None) -> tuple[Family, dict[str, Any]]:
    """The family to write a model as, and its config.json."""
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
    """One sentence for each part of a model that neither its config nor a config.json can express."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, TransformerDecoder) and not isinstance(module.self_mask, Causal):
            yield f"self_mask must be the causal one; got {module.self_mask!r}."
        elif isinstance(module, TransformerEncoder) and module.self_mask is not None:
            yield f"self_mask must be None; got {module.self_mask!r}."
        elif isinstance(module, MultiHeadAttention) and module.score_mod is not None:
            yield f"score_mod must be None; got {module.score_mod!r}."
    yield from changed_parts(model)


def _check_tied(config: Any, family: Family, checkpoint: Checkpoint, bindings: Sequence[Binding]) -> None:
    """Raises CheckpointError for a tensor that must repeat the embeddings and does not."""
    for name in set(family.repeats(config)) & checkpoint.tensors.keys():
        embeddings = next(binding for binding in bindings if binding.parameters[0].endswith("embed.tokens.embedding"))
        info, other = checkpoint.tensors[name], checkpoint.tensors[embeddings.tensors[0]]
        if (info.dtype, info.shape) != (other.dtype, other.shape) or not same_data(info, other):
            problem = f"{name!r} must repeat the embeddings, since they are tied, and is another tensor."
            hint = "" if name in family.repeated else " Set tie_word_embeddings to false in config.json."
            raise CheckpointError(checkpoint.folder, problem + hint)


def _read_all(
    checkpoint: Checkpoint, bindings: Iterable[Binding], dtype: str
) -> Iterator[tuple[Binding, list[np.ndarray]]]:
    """Each binding with its parameters. Some threads read the next ones meanwhile."""
    count = min(MOST_THREADS, os.cpu_count() or 1)
    waiting: deque[tuple[Binding, Future[list[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(count) as pool:
        try:
            for binding in bindings:
                waiting.append((binding, pool.submit(_read, checkpoint, binding, dtype)))
                if len(waiting) > count:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _read(checkpoint: Checkpoint, binding: Binding, dtype: str) -> list[np.ndarray]:
    """The parameters of a binding."""
    arrays = [empty_aligned(shape, dtype) for shape in binding.shapes]
    for name, places in binding.places(arrays):
        read_into(places, checkpoint.tensors[name])
    return arrays

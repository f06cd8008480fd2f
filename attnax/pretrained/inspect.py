"""What is in the folder of a published checkpoint and what keeps it from being loaded, without reading a tensor."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.config import Dtype, EncoderDecoderConfig
from attnax.models.sentence import SentenceEncoder
from attnax.models.transformer import TransformerEncoder
from attnax.pretrained.checkpoint import Checkpoint, open_checkpoint
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.families import FAMILIES
from attnax.pretrained.family import Binding, Family, ModelConfig, stacks
from attnax.pretrained.fields import MOST_LAYERS
from attnax.pretrained.foreign import QUANTISATION, find_adapter, find_quantised
from attnax.pretrained.json_object import read_object
from attnax.pretrained.safetensors import MAX_TENSORS
from attnax.pretrained.sentence import MODULES, read_pooling

__all__ = ["Inspection", "find_family", "inspect_folder", "parameter_name", "parameter_shapes"]


@dataclasses.dataclass
class Inspection:
    """A checkpoint as far as it is understood; what is None or empty could not be known.

    Attributes:
        folder: of the checkpoint.
        theirs: its config.json.
        checkpoint: its tensors, by the names of today.
        family: that it is of.
        config: of our model.
        abstract: our model as `nnx.split` gives it, with shapes in place of arrays.
        bindings: which tensors are which parameters.
        pooling: what makes a `SentenceEncoder` of it.
        inert: keys of config.json that the family does not have, and that change nothing.
        refusals: what keeps it from being loaded; none is what `load_pretrained` asks for.
    """

    folder: Path
    theirs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    family: Family | None = None
    config: Any = None
    abstract: tuple[nnx.GraphDef[Any], Any] | None = None
    bindings: Sequence[Binding] = ()
    pooling: Mapping[str, Any] | None = None
    inert: Sequence[str] = ()
    refusals: list[CheckpointError] = dataclasses.field(default_factory=list)

    @property
    def model(self) -> Any:
        """The class of our model."""
        return SentenceEncoder if self.pooling is not None else None if self.family is None else self.family.model

    @property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that hold parameters, by name."""
        return {name: binding.tensor_shape for binding in self.bindings for name in binding.theirs}

    @property
    def beside(self) -> list[str]:
        """Tensors that may be there and hold no parameters of their own."""
        if self.family is None or self.checkpoint is None or not self.bindings:
            return []
        return sorted(self.family.beside(self.config, self.checkpoint.tensors) - self.expected.keys())

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """What is refused inside is noted."""
        try:
            yield
        except CheckpointError as error:
            self.refusals.append(error)

    def require(self) -> tuple[Family, Checkpoint, Any]:
        """Family, tensors and config of a checkpoint that can be loaded.

        Raises:
            CheckpointError: it cannot; all that is wrong at once.
        """
        if len(self.refusals) == 1:
            raise self.refusals[0]
        if self.refusals:
            raise CheckpointError(
                self.folder, [f"{error.where}: {problem}" for error in self.refusals for problem in error.problems]
            )
        assert self.family is not None and self.checkpoint is not None
        return self.family, self.checkpoint, self.config


def inspect_folder(folder: Path, dtype: Any = None, ignore: Collection[str] = ()) -> Inspection:
    """Everything about a checkpoint that its config.json and the headers of its files say.

    What is wrong is noted, and the rest understood as if it were not, as far as that can be done.

    Args:
        folder: of the checkpoint.
        dtype: of the model, by default that of the tensors.
        ignore: keys of config.json that are passed over.
    """
    seen = Inspection(folder)
    adapter = find_adapter(folder)
    if adapter is not None:
        seen.refusals.append(adapter)
        return seen
    where = folder / "config.json"
    with seen.noting():
        seen.theirs = read_object(where)
        seen.family = _likely_family(seen.theirs)
        seen.family = find_family(seen.theirs, where, encoder=(folder / MODULES).exists())
    with seen.noting():
        seen.theirs = _without(seen.theirs, ignore, seen.family, where)
    with seen.noting():
        seen.checkpoint = open_checkpoint(folder, seen.theirs)
    names = () if seen.checkpoint is None else seen.checkpoint.tensors
    quantised = find_quantised(where, seen.theirs, names)
    if quantised is not None:
        seen.refusals.insert(0, quantised)
    if seen.family is None:
        return seen
    if seen.checkpoint is not None:
        with seen.noting():
            seen.checkpoint = seen.checkpoint.rename(seen.family.current_name)
    theirs = {key: value for key, value in seen.theirs.items() if quantised is None or key not in QUANTISATION}
    seen.inert = seen.family.inert_keys(theirs)
    seen.config = _likely_config(seen.family, theirs)
    with seen.noting():
        seen.config = seen.family.read_config(theirs, where)
    if seen.family.model is TransformerEncoder:
        with seen.noting():
            seen.pooling = read_pooling(folder)
    if seen.checkpoint is not None and seen.config is not None and quantised is None:
        with seen.noting():
            _bind(seen, seen.family, seen.checkpoint, dtype)
    return seen


def _without(theirs: Mapping[str, Any], ignore: Collection[str], family: Family | None, where: Path) -> dict[str, Any]:
    """The config.json without keys that a person passes over.

    Raises:
        CheckpointError: it has no such key, or the key is read.
    """
    if isinstance(ignore, str):
        raise ValueError(f"load_pretrained: ignore must be several keys; got ignore={ignore!r}. Give ({ignore!r},).")
    read = {"model_type", "architectures"} | (set() if family is None else family.read_keys)
    problems = [f"it has no key {key!r} to ignore." for key in ignore if key not in theirs]
    problems += [
        f"{key!r} cannot be ignored: it says what the model computes. Change it in the file."
        for key in ignore
        if key in theirs and key in read
    ]
    if problems:
        raise CheckpointError(where, problems)
    return {key: value for key, value in theirs.items() if key not in ignore}


def find_family(theirs: Mapping[str, Any], where: Path, *, encoder: bool = False) -> Family:
    """The family that a config.json names.

    Args:
        theirs: the config.json.
        where: it is.
        encoder: whether it is that of the encoder, whatever head its architecture has beside; as sentence-transformers
            takes it. Without effect where no encoder has the model_type.

    Raises:
        CheckpointError: it names none.
    """
    kind, architectures = theirs.get("model_type"), theirs.get("architectures")
    candidates = [family for family in FAMILIES if family.model_type == kind]
    if not candidates:
        known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
        raise CheckpointError(where, f"model_type must be one of {known}; got model_type={quoted(kind)}.")
    encoders = [family for family in candidates if encoder and family.model is TransformerEncoder]
    if encoders or not architectures:
        return [*encoders, *candidates][0]
    for family in candidates:
        if architectures in [[name] for name in (family.architecture, *family.aliases)]:
            return family
    others = [family.model_type for family in FAMILIES if architectures == [family.architecture]]
    if others:
        raise CheckpointError(
            where, f"architectures={quoted(architectures)} is of model_type {others[0]!r}; got model_type={kind!r}."
        )
    known = ", ".join(name for family in candidates for name in (family.architecture, *family.aliases))
    raise CheckpointError(where, f"architectures must be one of {known}; got architectures={quoted(architectures)}.")


def parameter_name(path: tuple[Any, ...]) -> str:
    """Such as "decoder.stack.blocks.0.attention.query.kernel"."""
    return ".".join(map(str, path))


def parameter_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters by name."""
    return {parameter_name(path): tuple(variable.shape) for path, variable in nnx.to_flat_state(state)}


def _bind(seen: Inspection, family: Family, checkpoint: Checkpoint, dtype: Any) -> None:
    """Adds the model and what its parameters are called in the files.

    Raises:
        CheckpointError: the tensors are not those of the config.
    """
    config = family.adapt(seen.config, seen.theirs, checkpoint.tensors.keys())
    _check_head(seen, family, config)
    beside = family.beside(config, checkpoint.tensors) - set(family.repeats(config))
    config = seen.config = _with_dtype(config, _check_dtype(checkpoint, beside, dtype))
    _check_counts(config, checkpoint)
    try:
        seen.abstract = nnx.split(nnx.eval_shape(lambda: family.model(_OneKey(0), config)))
    except ValueError as error:
        raise CheckpointError(checkpoint.folder / "config.json", str(error)) from error
    seen.bindings = family.bind(config, parameter_shapes(seen.abstract[1]), family.base_of(checkpoint.tensors))
    checkpoint = seen.checkpoint = _with_embeddings(checkpoint, seen.bindings, family.repeats(config))
    problems = checkpoint.check(seen.expected, family.beside(config, checkpoint.tensors), family.tied)
    if problems:
        raise CheckpointError(checkpoint.folder, problems)


def _check_head(seen: Inspection, family: Family, config: ModelConfig) -> None:
    """Raises CheckpointError where the files are those of a class without a head, and the embeddings are none."""
    alias = next((name for name in family.aliases if seen.theirs.get("architectures") == [name]), None)
    assert seen.checkpoint is not None
    has_head = not seen.checkpoint.tensors.keys().isdisjoint(family.tied)
    if alias is not None and not has_head and not getattr(stacks(config)[-1], "tie_embeddings", True):
        problem = f"the files of this {alias} have no head, and the embeddings are not tied to be one"
        raise CheckpointError(seen.folder / "config.json", f"{problem}; {family.architecture} must have one.")


def _with_embeddings(checkpoint: Checkpoint, bindings: Sequence[Binding], repeats: Sequence[str]) -> Checkpoint:
    """The checkpoint whose embeddings are a tensor that must repeat them, where they are not there themselves."""
    tables = [binding.theirs[0] for binding in bindings if binding.ours[0].endswith("embed.tokens.embedding")]
    others = [name for name in repeats if name in checkpoint.tensors]
    if not others or tables[0] in checkpoint.tensors:
        return checkpoint
    return checkpoint.rename(lambda name: tables[0] if name == others[0] else name)


class _OneKey(nnx.Rngs):
    """One key for all parameters of a model that is only traced: counting them makes that quadratic in the depth."""

    def params(self) -> jax.Array:
        return self["default"].key[...]


def _with_dtype(config: Any, dtype: str) -> Any:
    if isinstance(config, EncoderDecoderConfig):
        halves = {name: _with_dtype(getattr(config, name), dtype) for name in ("encoder", "decoder")}
        return dataclasses.replace(config, **halves)
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _check_dtype(checkpoint: Checkpoint, beside: set[str], dtype: Any) -> str:
    given, known = dtype, get_args(Dtype)
    try:
        dtype = checkpoint.dtype(beside) if dtype is None else jnp.dtype(dtype)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in known:
        raise ValueError(f"load_pretrained: dtype must be one of {', '.join(known)}; got dtype={given!r}.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            checkpoint.folder, f"JAX has no {dtype} unless jax_enable_x64 is set. Set it, or give a dtype."
        )
    name: str = dtype.name
    return name


def _check_counts(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError before a model is built that could not be that of the tensors."""
    count, most = len(checkpoint.tensors), MAX_TENSORS
    for stack in stacks(config):
        if stack.num_layers > min(count, MOST_LAYERS) or stack.num_layers * (stack.num_experts or 1) > most:
            raise CheckpointError(
                checkpoint.folder,
                f"its {count} tensors are not those of num_layers={stack.num_layers}, num_experts={stack.num_experts}.",
            )


def _likely_family(theirs: Mapping[str, Any]) -> Family | None:
    """A family of the same model_type, where the architecture is another."""
    return next((family for family in FAMILIES if family.model_type == theirs.get("model_type")), None)


def _likely_config(family: Family, theirs: Mapping[str, Any]) -> Any:
    """The config without the fields that nothing reads, if the others can be read."""
    known = {key: value for key, value in theirs.items() if key in family.known_keys}
    try:
        return family.read_config(known, family.model_type)
    except CheckpointError:
        return None

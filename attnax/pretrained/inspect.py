"""The model in the folder of a published checkpoint, and the problems with it; no tensor is read."""

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
from attnax.nn.linear import ShapesOnly
from attnax.pretrained.checkpoint import Checkpoint, open_checkpoint
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.families import FAMILIES
from attnax.pretrained.family import Family, ModelConfig, stacks
from attnax.pretrained.foreign import QUANTISATION, find_adapter, find_quantised
from attnax.pretrained.json_object import read_object
from attnax.pretrained.layer_fields import MOST_LAYERS
from attnax.pretrained.rules import Binding
from attnax.pretrained.safetensors import MAX_TENSORS
from attnax.pretrained.sentence import MODULES, Pooling, read_pooling

__all__ = ["Inspection", "find_family", "inspect_folder", "parameter_name", "parameter_shapes"]


@dataclasses.dataclass
class Inspection:
    """The facts that are known about a checkpoint; an attribute that could not be found is None or empty.

    Attributes:
        folder: of the checkpoint.
        config_json: the content of its config.json.
        checkpoint: its tensors, by their current names.
        family: of the checkpoint; if none fits, one with the same model_type.
        config: of our model.
        abstract: our model as `nnx.split` gives it, with shapes in place of arrays.
        bindings: the tensors of each parameter.
        pooling: the options that make a `SentenceEncoder` of our model.
        inert: keys of config.json that are not the family's own and are known to change nothing.
        refusals: all problems; a checkpoint with problems cannot be loaded.
    """

    folder: Path
    config_json: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    family: Family | None = None
    config: Any = None
    abstract: tuple[nnx.GraphDef[Any], Any] | None = None
    bindings: Sequence[Binding] = ()
    pooling: Pooling | None = None
    inert: Sequence[str] = ()
    refusals: list[CheckpointError] = dataclasses.field(default_factory=list)

    @property
    def model(self) -> Any:
        """The class of our model."""
        return SentenceEncoder if self.pooling is not None else None if self.family is None else self.family.model

    @property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that hold parameters, by name."""
        return {name: binding.tensor_shape for binding in self.bindings for name in binding.tensors}

    @property
    def without_parameters(self) -> list[str]:
        """Tensors that are expected and hold no parameters of their own."""
        if self.family is None or self.checkpoint is None or not self.bindings:
            return []
        return sorted(self.family.without_parameters(self.config, self.checkpoint.tensors) - self.expected.keys())

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Adds a CheckpointError that is raised inside to the refusals."""
        try:
            yield
        except CheckpointError as error:
            self.refusals.append(error)

    def require(self) -> tuple[Family, Checkpoint, Any]:
        """Family, tensors and config of a checkpoint without problems.

        Raises:
            CheckpointError: all problems.
        """
        if self.refusals:
            raise self._error()
        assert self.family is not None and self.checkpoint is not None
        return self.family, self.checkpoint, self.config

    def require_family(self) -> Family:
        """The family, even with other problems.

        Raises:
            CheckpointError: all problems, if no family has the model_type.
        """
        if self.family is None:
            raise self._error()
        return self.family

    def _error(self) -> CheckpointError:
        if len(self.refusals) == 1:
            return self.refusals[0]
        problems = [f"{error.where}: {problem}" for error in self.refusals for problem in error.problems]
        return CheckpointError(self.folder, problems)


def inspect_folder(folder: Path, dtype: Any = None, ignore: Collection[str] = ()) -> Inspection:
    """Reads config.json and the headers of the files, each once.

    A problem is noted, and the reading goes on as far as it can.

    Args:
        folder: of the checkpoint.
        dtype: of the model, by default the dtype of the tensors.
        ignore: keys of config.json to ignore.
    """
    seen = Inspection(folder)
    adapter = find_adapter(folder)
    if adapter is not None:
        seen.refusals.append(adapter)
        return seen
    where = folder / "config.json"
    with seen.noting():
        seen.config_json = read_object(where)
        kind = seen.config_json.get("model_type")
        seen.family = next((family for family in FAMILIES if family.model_type == kind), None)
        seen.family = find_family(seen.config_json, where, encoder=(folder / MODULES).exists())
    kept = seen.config_json
    with seen.noting():
        kept = _without(seen.config_json, ignore, seen.family, where)
    with seen.noting():
        seen.checkpoint = open_checkpoint(folder, kept)
    names = () if seen.checkpoint is None else seen.checkpoint.tensors
    quantised = find_quantised(where, kept, names)
    if quantised is not None:
        seen.refusals.insert(0, quantised)
        kept = {key: value for key, value in kept.items() if key not in QUANTISATION}
    if seen.family is None:
        return seen
    if seen.checkpoint is not None:
        with seen.noting():
            seen.checkpoint = seen.checkpoint.rename(seen.family.current_name)
    seen.inert = seen.family.inert_keys(kept)
    with contextlib.suppress(CheckpointError):  # without the unknown keys, so that the rest is known
        known = {key: value for key, value in kept.items() if key in seen.family.known_keys}
        seen.config = seen.family.read_config(known, where)
    with seen.noting():
        seen.config = seen.family.read_config(kept, where)
    if seen.family.model is TransformerEncoder:
        with seen.noting():
            seen.pooling = read_pooling(folder)
    if seen.checkpoint is not None and seen.config is not None and quantised is None:
        with seen.noting():
            _bind(seen, seen.family, seen.checkpoint, dtype)
    return seen


def _without(
    config_json: Mapping[str, Any], ignore: Collection[str], family: Family | None, where: Path
) -> dict[str, Any]:
    """The config.json without the keys to ignore.

    Raises:
        CheckpointError: it has no such key, or the key decides what the model computes.
    """
    if isinstance(ignore, str):
        raise ValueError(f"load_pretrained: ignore must be several keys; got ignore={ignore!r}. Give ({ignore!r},).")
    read = {"model_type", "architectures"} | (set() if family is None else family.read_keys)
    problems = [f"it has no key {key!r} to ignore." for key in ignore if key not in config_json]
    problems += [
        f"{key!r} cannot be ignored: it decides what the model computes. Change it in the file."
        for key in ignore
        if key in config_json and key in read
    ]
    if problems:
        raise CheckpointError(where, problems)
    return {key: value for key, value in config_json.items() if key not in ignore}


def find_family(config_json: Mapping[str, Any], where: Path, *, encoder: bool = False) -> Family:
    """The family that a config.json names.

    Args:
        config_json: its content.
        where: its path.
        encoder: whether to prefer the encoder of this model_type to the named architecture with its head, as
            sentence-transformers does.

    Raises:
        CheckpointError: no family has this model_type and these architectures.
    """
    kind, architectures = config_json.get("model_type"), config_json.get("architectures")
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
    owners = [family.model_type for family in FAMILIES if architectures == [family.architecture]]
    if owners:
        raise CheckpointError(
            where, f"architectures={quoted(architectures)} is of model_type {owners[0]!r}; got model_type={kind!r}."
        )
    known = ", ".join(name for family in candidates for name in (family.architecture, *family.aliases))
    raise CheckpointError(where, f"architectures must be one of {known}; got architectures={quoted(architectures)}.")


def parameter_name(path: tuple[Any, ...]) -> str:
    """The name of a parameter, such as "decoder.stack.blocks.0.attention.query.kernel"."""
    return ".".join(map(str, path))


def parameter_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters by name."""
    return {parameter_name(path): tuple(variable.shape) for path, variable in nnx.to_flat_state(state)}


def _bind(seen: Inspection, family: Family, checkpoint: Checkpoint, dtype: Any) -> None:
    """Adds the model and the tensors of its parameters; raises CheckpointError if they do not fit the config."""
    config = family.adapt(seen.config, seen.config_json, checkpoint.tensors.keys())
    _check_head(seen, family, config)
    not_counted = family.without_parameters(config, checkpoint.tensors) - set(family.repeats(config))
    config = seen.config = _with_dtype(config, _check_dtype(checkpoint, not_counted, dtype))
    _check_counts(config, checkpoint)
    try:
        seen.abstract = nnx.split(nnx.eval_shape(lambda: family.model(ShapesOnly(0), config)))
    except ValueError as error:
        raise CheckpointError(checkpoint.folder / "config.json", str(error)) from error
    seen.bindings = family.bind(config, parameter_shapes(seen.abstract[1]), family.base_of(checkpoint.tensors))
    checkpoint = seen.checkpoint = _with_embeddings(checkpoint, seen.bindings, family.repeats(config))
    problems = checkpoint.check(seen.expected, family.without_parameters(config, checkpoint.tensors), family.tied)
    if problems:
        raise CheckpointError(checkpoint.folder, problems)


def _check_head(seen: Inspection, family: Family, config: ModelConfig) -> None:
    """Raises CheckpointError if the files are of a class without a head, and no head is tied to the embeddings."""
    alias = next((name for name in family.aliases if seen.config_json.get("architectures") == [name]), None)
    assert seen.checkpoint is not None
    has_head = not seen.checkpoint.tensors.keys().isdisjoint(family.tied)
    if alias is not None and not has_head and not getattr(stacks(config)[-1], "tie_embeddings", True):
        problem = f"the files of this {alias} have no head, and the embeddings are not tied to be one"
        raise CheckpointError(seen.folder / "config.json", f"{problem}; {family.architecture} must have one.")


def _with_embeddings(checkpoint: Checkpoint, bindings: Sequence[Binding], repeats: Sequence[str]) -> Checkpoint:
    """The checkpoint with its embeddings; if they are missing, a tensor that repeats them takes their place."""
    tables = [binding.tensors[0] for binding in bindings if binding.parameters[0].endswith("embed.tokens.embedding")]
    copies = [name for name in repeats if name in checkpoint.tensors]
    if not copies or tables[0] in checkpoint.tensors:
        return checkpoint
    return checkpoint.rename(lambda name: tables[0] if name == copies[0] else name)


def _with_dtype(config: Any, dtype: str) -> Any:
    if isinstance(config, EncoderDecoderConfig):
        halves = {name: _with_dtype(getattr(config, name), dtype) for name in ("encoder", "decoder")}
        return dataclasses.replace(config, **halves)
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _check_dtype(checkpoint: Checkpoint, not_counted: set[str], dtype: Any) -> str:
    given, known = dtype, get_args(Dtype)
    try:
        dtype = checkpoint.dtype(except_for=not_counted) if dtype is None else jnp.dtype(dtype)
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
    """Raises CheckpointError, before the model is built, if it would have more layers or experts than tensors."""
    count, most = len(checkpoint.tensors), MAX_TENSORS
    for stack in stacks(config):
        if stack.num_layers > min(count, MOST_LAYERS) or stack.num_layers * (stack.num_experts or 1) > most:
            raise CheckpointError(
                checkpoint.folder,
                f"its {count} tensors do not fit num_layers={stack.num_layers}, num_experts={stack.num_experts}.",
            )

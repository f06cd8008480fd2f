"""`attnax inspect`: the model in a folder, from the headers of its files."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flax import nnx

from attnax.cli.options import Inspect
from attnax.cli.placement import print_placement
from attnax.cli.tables import collapse, fold, in_bytes, in_shape, print_fields, print_rows
from attnax.cli.terminal import printable
from attnax.config import TransformerConfig
from attnax.errors import InputError
from attnax.models import TransformerLM
from attnax.pretrained.checkpoint import Checkpoint
from attnax.pretrained.errors import CheckpointError
from attnax.pretrained.hub import find_folder
from attnax.pretrained.inspect import Inspection, inspect_folder, parameter_shapes
from attnax.pretrained.tokenizer_file import load_tokenizer
from attnax.text import is_published
from attnax.training import RunFolder, checkpoint_arrays, latest_checkpoint


class Entry(NamedTuple):
    """A parameter; with an empty name, a tensor of the files that is not known to hold a parameter."""

    parameter: str
    shape: tuple[int, ...]
    dtype: str
    tensors: tuple[str, ...] = ()


def inspect(options: Inspect) -> int:
    """Prints all that can be found; returns 1 if the checkpoint cannot be loaded."""
    folder = find_folder(options.folder, options.revision)
    if not is_published(folder):
        _print_run(RunFolder(folder), options)
        return 0
    seen = inspect_folder(folder, ignore=options.ignore)
    try:
        load_tokenizer(folder / "tokenizer.json")
    except CheckpointError as error:
        seen.refusals.append(error)
    _print_model(seen)
    if options.layout is not None and seen.abstract is not None:
        params = nnx.filter_state(seen.abstract[1], nnx.Param)
        print_placement(options, seen.config, params)
    elif seen.checkpoint is not None:
        _print_tensors(seen, seen.checkpoint)
    problems = [f"{error.where}: {problem}" for error in seen.refusals for problem in error.problems]
    if problems:
        print(f"\nproblems ({len(problems)}), so that it cannot be loaded")
        for problem in problems:
            print(f"  {printable(problem)}")
    return 1 if problems else 0


def _print_run(run: RunFolder, options: Inspect) -> None:
    settings, _, _ = run.load()
    step = latest_checkpoint(run.checkpoints)
    since = "without a checkpoint yet" if step is None else f"after {step} updates"
    print_fields("attnax", [f"TransformerLM, a run {since}"])
    print_fields("config", _changed(settings.model))
    if run.parts and options.layout is not None:
        raise InputError("--layout needs the model, and the run has parts that are not in its folder.")
    if run.parts:
        print_fields("made with", [f"{part}={name}, which is not in the folder" for part, name in run.parts.items()])
        _print_saved(run, step)
        return
    model = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), settings.model))
    params = nnx.state(model, nnx.Param)
    if options.layout is not None:
        print_placement(options, settings.model, params, settings.optimizer)
        return
    shapes = parameter_shapes(params)
    _print_table([Entry(name, shape, settings.model.param_dtype) for name, shape in shapes.items()])
    _print_parameters(sum(map(math.prod, shapes.values())))


def _print_saved(run: RunFolder, step: int | None) -> None:
    """The parameters in the newest checkpoint; a model with parts of a user cannot be made from its config."""
    if step is None:
        print_fields("parameters", ["known from the first checkpoint on"])
        return
    arrays = checkpoint_arrays(run.checkpoints, step, "params")
    _print_table([Entry(name, tuple(shape), dtype) for name, (shape, dtype) in arrays.items()])
    _print_parameters(sum(math.prod(shape) for shape, _ in arrays.values()))


def _print_model(seen: Inspection) -> None:
    classes = seen.config_json.get("architectures") or ([] if seen.family is None else [seen.family.architecture])
    kind = seen.config_json.get("model_type")
    print_fields("transformers", [f"model_type={repr(kind)[:200]}, architectures={repr(classes)[:200]}"])
    if seen.family is not None:
        pooled = "" if seen.pooling is None else f" of a {seen.family.model.__name__}"
        print_fields("attnax", [f"{seen.model.__name__}{pooled}"])
    if seen.config is not None:
        print_fields("config", _changed(seen.config))
    if seen.inert:
        print_fields("passed over", [", ".join(map(str, seen.inert))])


def _print_tensors(seen: Inspection, checkpoint: Checkpoint) -> None:
    if seen.bindings:
        _print_table(list(_parameters(seen, checkpoint)))
    unknown = [name for name in checkpoint.tensors if name not in seen.expected and name not in seen.without_parameters]
    if unknown:
        print("\nin the files, and not known to be a parameter")
        _print_table([_tensor(checkpoint, name) for name in unknown])
    if seen.without_parameters:
        print("\nin the files without parameters of their own")
        _print_table([_tensor(checkpoint, name) for name in seen.without_parameters])
    if seen.bindings:
        _print_parameters(sum(binding.num_elements for binding in seen.bindings))
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[str(info.dtype)] += info.num_bytes
    each = ", ".join(f"{in_bytes(size)} of {dtype}" for dtype, size in sizes.most_common())
    print_fields("files", [f"{len(checkpoint.tensors):,} tensors, {each or 'empty'}"])


def _parameters(seen: Inspection, checkpoint: Checkpoint) -> Iterator[Entry]:
    for binding in seen.bindings:
        infos = [checkpoint.tensors.get(name) for name in binding.tensors]
        dtypes = sorted({"missing" if info is None else str(info.dtype) for info in infos})
        for name, shape in zip(binding.parameters, binding.shapes, strict=True):
            yield Entry(name, shape, "/".join(dtypes), binding.tensors)


def _tensor(checkpoint: Checkpoint, name: str) -> Entry:
    info = checkpoint.tensors[name]
    return Entry("", info.shape, str(info.dtype), (name,))


def _changed(config: Any) -> Iterator[str]:
    """The fields of a config that differ from their defaults, with the fields of its halves apart."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, TransformerConfig):
            yield from (f"{field.name}.{line}" for line in _changed(value))
        elif value != (field.default if field.default_factory is dataclasses.MISSING else field.default_factory()):
            yield f"{field.name}={value!r}"


def _print_table(entries: Sequence[Entry]) -> None:
    """A table with one row for the entries that differ only in the number of a layer or an expert."""
    groups = fold(entries, lambda entry: ((entry.parameter, *entry.tensors[:1]), (entry.shape, entry.dtype)))
    rows = [("parameter", "shape", "dtype", "count", "tensor")]
    for same in groups:
        shape, dtype = same[0].shape, same[0].dtype
        parameter = printable(collapse(entry.parameter for entry in same))
        tensors = [name for entry in same for name in entry.tensors]
        count, tensor = f"{len(same) * math.prod(shape):,}", printable(collapse(tensors)) if tensors else ""
        rows.append((parameter, in_shape(shape), dtype, count, tensor))
    print_rows(rows, right=("count",))


def _print_parameters(count: int) -> None:
    sizes = f"{in_bytes(4 * count)} as float32, {in_bytes(2 * count)} as bfloat16 or float16"
    print()
    print_fields("parameters", [f"{count:,}: {sizes}"])

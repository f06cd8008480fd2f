"""A family of published models as data: which config fields and which tensors of theirs are which of ours.

A `Family` is read in both directions: from a checkpoint to a config and parameters, and back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from attnax.config import BIASES, BlockConfig, EncoderDecoderConfig, StackConfig
from attnax.nn.feedforward import ACTIVATIONS
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.fields import COMMON, HARMLESS, Field
from attnax.pretrained.inert import is_inert
from attnax.pretrained.layout import Shape, arrange, arranged_shape, reverse

__all__ = ["Binding", "Family", "ModelConfig", "Rule", "embedding", "linear", "norm", "stacks", "within"]

ModelConfig = StackConfig | EncoderDecoderConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor.

    Attributes:
        theirs: its name, with {base} for the family's prefix, {layer} for the number of a layer, {expert} for that of
            an expert; with {expert} the tensors of all experts are one array, the experts first.
        ours: the parameters that it holds, side by side along their last axis.
        layout: from theirs to that array.
        gated: it is of layers whose feed-forward has a gate, or of those without; None is both.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: str | None = None
    gated: bool | None = None


def linear(
    theirs: str, *ours: str, weight: str = "O I -> I O", bias: str | None = None, gated: bool | None = None
) -> tuple[Rule, ...]:
    """Weight and bias of a projection, or of several in one."""
    return (
        Rule(f"{theirs}.weight", tuple(f"{name}.kernel" for name in ours), weight, gated),
        Rule(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours), bias, gated),
    )


def norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Scale and bias of a norm."""
    return Rule(f"{theirs}.weight", (f"{ours}.scale",)), Rule(f"{theirs}.bias", (f"{ours}.bias",))


def embedding(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The table of an embedding."""
    return (Rule(f"{theirs}.weight", (f"{ours}.embedding",)),)


def within(theirs: str, ours: str, *groups: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules with these names before theirs, such as those of every layer."""
    return tuple(
        dataclasses.replace(rule, theirs=f"{theirs}.{rule.theirs}", ours=tuple(f"{ours}.{name}" for name in rule.ours))
        for group in groups
        for rule in group
    )


@dataclasses.dataclass(frozen=True)
class Binding:
    """A rule for one layer of one model.

    Attributes:
        theirs: names of the tensors, one unless they are of experts.
        ours: names of the parameters.
        shapes: of the parameters.
        layout: from the tensors to the parameters side by side, or None where they are laid out alike.
        sizes: of the layout's axes.
        stacked: whether `theirs` are entries of one array, along a first axis that parameters have too.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layout: str | None
    sizes: Mapping[str, int]
    stacked: bool

    @property
    def tensor_shape(self) -> Shape:
        """The shape of each of `theirs`."""
        whole = (*self.shapes[0][:-1], sum(shape[-1] for shape in self.shapes))
        if self.layout is not None:
            whole = arranged_shape(whole, reverse(self.layout), self.sizes)
        return whole[1:] if self.stacked else whole

    @property
    def num_elements(self) -> int:
        """Of all the parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The parameters that a tensor holds, or that tensors of experts hold one after the other."""
        if self.layout is not None:
            tensor = arrange(tensor, self.layout, self.sizes)
        ends = np.cumsum([shape[-1] for shape in self.shapes])
        return np.split(tensor, ends[:-1], axis=-1)

    def join(self, parameters: Sequence[np.ndarray], name: str) -> np.ndarray:
        """The tensor `name` that holds the parameters, or its part of them if it is an expert's."""
        if self.stacked:
            expert = self.theirs.index(name)
            parameters = [parameter[expert : expert + 1] for parameter in parameters]
        whole = np.concatenate(parameters, axis=-1) if len(parameters) > 1 else parameters[0]
        if self.layout is not None:
            whole = arrange(whole, reverse(self.layout), self.sizes)
        return whole[0] if self.stacked else whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers, and the configs of one of our models that it is.

    Attributes:
        model_type: in config.json.
        architecture: the class in transformers whose results the model gives.
        aliases: other classes whose files it reads: by an older name, with one more head, or with none where this
            one's is tied.
        model: our class, called as `model(rngs, config)`.
        config: the class of its config, or a function of the same fields that makes one.
        constants: fields of the config that are the same in all models of the family.
        fields: the others, and what config.json has for them.
        harmless: keys of config.json that may be there beside, and change nothing.
        bases: what {base} may be in the names of a file: nothing, or what the class in transformers that lacks the head
            leaves out. The first is written.
        rules: the tensors. One for parameters that a model lacks is passed over.
        buffers: endings of names of tensors that may be there beside, and hold no parameters.
        body: beginnings of which all tensors of the model have one in a file that holds a head too; none of the head's
            do, and they may be there beside.
        tied: tensors that repeat the embeddings where they are tied.
        repeated: tensors that repeat the embeddings always.
        adapt: from a config, its config.json and the names of the tensors the config that it is with those, where
            config.json alone does not tell.
        renamed: endings of names in old files, and what they are today.
    """

    model_type: str
    architecture: str
    aliases: tuple[str, ...] = ()
    model: Any
    config: Callable[..., ModelConfig]
    constants: Mapping[str, Any]
    fields: tuple[Field, ...]
    harmless: tuple[str, ...] = ()
    bases: tuple[str, ...] = ("",)
    rules: tuple[Rule, ...]
    buffers: tuple[str, ...] = ()
    body: tuple[str, ...] = ()
    tied: tuple[str, ...] = ("lm_head.weight",)
    repeated: tuple[str, ...] = ()
    adapt: Callable[[Any, Mapping[str, Any], Collection[str]], Any] = lambda config, theirs, names: config
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def known_keys(self) -> frozenset[str]:
        """The keys of config.json that are read or change nothing."""
        return HARMLESS.union(self.harmless, self.read_keys)

    @property
    def read_keys(self) -> frozenset[str]:
        """The keys of config.json that say what a model computes."""
        return frozenset(key for field in self._all_fields for key in field.keys)

    def inert_keys(self, theirs: Mapping[str, Any]) -> list[str]:
        """The keys in a config.json that the family does not have, and that change nothing all the same."""
        return sorted(key for key in theirs.keys() - self.known_keys if is_inert(key, theirs[key]))

    @property
    def _all_fields(self) -> tuple[Field, ...]:
        """Those of any config.json too, where the family has no other with their keys."""
        own = {key for field in self.fields for key in field.keys}
        return (*(field for field in COMMON if own.isdisjoint(field.keys)), *self.fields)

    def read_config(self, theirs: Mapping[str, Any], where: object) -> Any:
        """The config that a config.json describes.

        Raises:
            CheckpointError: all that cannot be expressed, and all fields that nothing here reads.
        """
        ours, problems = dict(self.constants), []
        for field in self._all_fields:
            try:
                ours |= field.read({key: theirs[key] for key in field.keys if key in theirs})
            except ValueError as error:
                problems.append(str(error))
        problems += [
            f"{key}={quoted(theirs[key])} is no field of {self.model_type} that is known here; nor is what it does. "
            f"If it does nothing: load_pretrained(ignore=({quoted(key)},)), "
            f"attnax generate --ignore {quoted(key)[1:-1]}."
            for key in theirs.keys() - self.known_keys - set(self.inert_keys(theirs))
        ]
        if not problems:
            try:
                return self.config(**ours)
            except ValueError as error:
                problems.append(str(error))
        raise CheckpointError(where, sorted(set(problems)))

    def write_config(self, config: Any) -> dict[str, Any]:
        """The config.json of `config`.

        Raises:
            CheckpointError: the family has no place for something in it.
        """
        theirs: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        problems = []
        for field in self.fields:
            try:
                theirs |= field.write(config)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(self.model_type, problems)
        wanted, got = _meaning(config), _meaning(self.read_config(theirs, self.model_type))
        problems = [
            f"{name}={wanted[name]!r} has no place in it; it would be read as {got[name]!r}."
            for name in wanted
            if wanted[name] != got[name]
        ]
        if problems:
            raise CheckpointError(self.model_type, problems)
        return theirs

    def bind(self, config: ModelConfig, shapes: Mapping[str, Shape], base: str | None = None) -> list[Binding]:
        """The rules for each layer of a model, in the order of the rules.

        Args:
            config: of the model.
            shapes: of its parameters, by name; every one is in one binding.
            base: what {base} is, by default what is written.

        Raises:
            CheckpointError: a parameter that no rule is about.
        """
        numbers = {"base": self.bases[0] if base is None else base}
        bindings = []
        for rule in self.rules:
            stack = _stack_of(config, rule.ours[0])
            for layer in range(stack.num_layers) if any("{layer}" in name for name in rule.ours) else [0]:
                ours = tuple(name.format(layer=layer) for name in rule.ours)
                if not all(name in shapes for name in ours) or rule.gated not in (None, _is_gated(stack.layer(layer))):
                    continue
                stacked = "{expert}" in rule.theirs
                experts = range(shapes[ours[0]][0]) if stacked else [0]
                bindings.append(
                    Binding(
                        tuple(rule.theirs.format(layer=layer, expert=expert, **numbers) for expert in experts),
                        ours,
                        tuple(shapes[name] for name in ours),
                        rule.layout,
                        _sizes(stack),
                        stacked,
                    )
                )
        left = shapes.keys() - {name for binding in bindings for name in binding.ours}
        if left:
            raise CheckpointError(
                self.model_type,
                [f"the parameter {name} has no place in it; got {shapes[name]}." for name in sorted(left)],
            )
        return bindings

    def base_of(self, names: Iterable[str]) -> str:
        """What {base} is in a file of tensors with these names."""
        longest = max(self.bases, key=len)
        return longest if any(name.startswith(longest) for name in names) else ""

    def repeats(self, config: ModelConfig) -> tuple[str, ...]:
        """The names of tensors that repeat the embeddings, if they are there."""
        tied = getattr(stacks(config)[-1], "tie_embeddings", False)
        return (*self.repeated, *self.tied) if tied else self.repeated

    def beside(self, config: ModelConfig, names: Collection[str]) -> set[str]:
        """The names that may be there although they hold no parameters of their own."""
        repeats = self.repeats(config)
        beside = {name for name in names if name in repeats or name.endswith(self.buffers)}
        body = {name for name in names if name.startswith(self.body)}
        return beside | (set(names) - body) if body else beside

    def current_name(self, name: str) -> str:
        """What a name in an old file is today."""
        for old, new in self.renamed.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name


def stacks(config: ModelConfig) -> tuple[StackConfig, ...]:
    """The configs of a model's stacks; the last is what a head is on."""
    return (config.encoder, config.decoder) if isinstance(config, EncoderDecoderConfig) else (config,)


def _stack_of(config: ModelConfig, parameter: str) -> StackConfig:
    """The config of the stack that the parameter of this name belongs to."""
    if isinstance(config, EncoderDecoderConfig):
        return config.encoder if parameter.startswith("encoder.") else config.decoder
    return config


def _is_gated(config: BlockConfig) -> bool:
    _, gated = ACTIVATIONS[config.ff_activation]
    return gated


def _sizes(config: StackConfig) -> dict[str, int]:
    """The axes that layouts may name beside those that shapes tell."""
    sizes = {"N": config.num_heads, "K": config.kv_heads, "H": config.head_size}
    height, width = getattr(config, "patch_size", (1, 1))
    return sizes | {"h": height, "w": width}


_TRAINING = {  # how a model is computed or trained, not what it computes
    "attention_block_size",
    "linear_attention_chunk_size",
    "attention_dropout_rate",
    "dropout_rate",
    "router_jitter",
    "rope_max_positions",
    "kernel_init",
    "embedding_init",
    "init_std",
    "residual_init",
    "dtype",
    "param_dtype",
    "scan_layers",
    "remat",
    "kv_cache_max_len",
    "layer_pattern",
}


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide what a model computes, with their defaults applied, those of its layers apart."""
    meaning: dict[str, Any] = {}
    if isinstance(config, EncoderDecoderConfig):
        for half in ("encoder", "decoder"):
            meaning |= {f"{half}.{name}": value for name, value in _meaning(getattr(config, half)).items()}
        return meaning | {"share_embeddings": config.share_embeddings}
    layers = [config.layer(index) for index in range(config.num_layers)]
    for field in dataclasses.fields(config):
        if field.name in _TRAINING:
            continue
        values = [_effective(layer, field.name) for layer in layers]
        meaning[field.name] = values[0] if all(value == values[0] for value in values) else values
    return meaning


def _effective(config: Any, name: str) -> Any:
    value = getattr(config, name)
    match name:
        case "num_kv_heads":
            return config.kv_heads
        case "head_dim":
            return config.head_size
        case "value_head_dim":
            return config.value_head_size
        case "attention_scale":
            return config.head_size**-0.5 if value is None else value
        case "ff_activation":
            return "silu" if value == "swish" else value
        case "attention_type":
            return value if value in ("linear", "lite") else "softmax"
        case "use_bias":
            return tuple(layer for layer in BIASES if config.has_bias(layer) and _has_layer(config, layer))
        case "rope_base" | "rope_fraction" | "rope_scaling":
            return value if config.pos_emb_type == "rope" else None
        case "layer_scale":  # the number is where the learned one starts
            return None if value is None else "learned"
        case "position_offset":
            return value if config.pos_emb_type == "learned" else None
        case "relative_buckets" | "relative_max_distance":
            return value if config.pos_emb_type == "relative" else None
        case "top_k" | "num_shared_experts" | "router_type" | "router_renormalize":
            return None if config.num_experts is None else value
    return value


def _has_layer(config: Any, layer: str) -> bool:
    match layer:
        case "router":
            return config.num_experts is not None
        case "norm":
            return config.norm_type == "layer"
    return True

"""A family of published models as data: the fields of each key of config.json, the parameters of each tensor.

A `Family` is read in both directions: from a checkpoint to a config and parameters, and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from attnax.config import EncoderDecoderConfig, StackConfig
from attnax.nn.feedforward import ACTIVATIONS
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.fields import COMMON, Field
from attnax.pretrained.inert import HARMLESS, is_inert
from attnax.pretrained.layout import Shape
from attnax.pretrained.meaning import meaning
from attnax.pretrained.rules import Binding, Rule

__all__ = ["Family", "ModelConfig", "stacks"]

ModelConfig = StackConfig | EncoderDecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers, and the configs of one of our models that describe it.

    Attributes:
        model_type: in config.json.
        architecture: the class in transformers with the same results as our model.
        aliases: other classes of transformers whose files the family reads: the class under an older name, the class
            with one more head, or the class without a head where the head is tied.
        model: our class, called as `model(rngs, config)`.
        config: the class of its config, or a function that makes a config from the same fields.
        constants: fields of the config that are the same in all models of the family.
        fields: the other fields, and the keys of config.json for them.
        harmless: keys of config.json that may be present and change nothing.
        bases: the values of {base} in the names of a file: a prefix, or nothing in files of the class of transformers
            that lacks the head. Files are written with the first value.
        rules: the tensors. A rule for parameters that a model lacks is skipped.
        buffers: endings of the names of tensors that may be present and hold no parameters.
        body: prefixes of the model's tensors in a file that also holds a head. The tensors of the head have no such
            prefix, and may be present.
        tied: tensors that repeat the embeddings if these are tied.
        repeated: tensors that always repeat the embeddings.
        adapt: for a family whose config.json alone does not decide the config: a function of the config, its
            config.json and the names of the tensors that returns the right config.
        renamed: endings of names in old files, and the current endings.
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
    adapt: Callable[[Any, Mapping[str, Any], Collection[str]], Any] = lambda config, config_json, names: config
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def known_keys(self) -> frozenset[str]:
        """The keys of config.json that are read or change nothing."""
        return HARMLESS.union(self.harmless, self.read_keys)

    @property
    def read_keys(self) -> frozenset[str]:
        """The keys of config.json that decide what a model computes."""
        return frozenset(key for field in self._all_fields for key in field.keys)

    def inert_keys(self, config_json: Mapping[str, Any]) -> list[str]:
        """The keys in a config.json that are not the family's own and are known to change nothing."""
        return sorted(key for key in config_json.keys() - self.known_keys if is_inert(key, config_json[key]))

    @property
    def _all_fields(self) -> tuple[Field, ...]:
        """The family's fields, and the common fields whose keys are not among the family's keys."""
        own = {key for field in self.fields for key in field.keys}
        return (*(field for field in COMMON if own.isdisjoint(field.keys)), *self.fields)

    def read_config(self, config_json: Mapping[str, Any], where: object) -> Any:
        """The config that a config.json describes.

        Raises:
            CheckpointError: values that cannot be expressed and unknown keys, all of them.
        """
        fields, problems = dict(self.constants), []
        for field in self._all_fields:
            try:
                fields |= field.read({key: config_json[key] for key in field.keys if key in config_json})
            except ValueError as error:
                problems.append(str(error))
        unknown = config_json.keys() - self.known_keys - set(self.inert_keys(config_json))
        problems += [
            f"{key}={quoted(config_json[key])} is no field of {self.model_type} that is known here, and its effect is "
            f"not known either. If it has none: load_pretrained(ignore=({quoted(key)},)), "
            f"attnax generate --ignore {quoted(key)[1:-1]}."
            for key in unknown
        ]
        if not problems:
            try:
                return self.config(**fields)
            except ValueError as error:
                problems.append(str(error))
        raise CheckpointError(where, sorted(set(problems)))

    def write_config(self, config: Any) -> dict[str, Any]:
        """The config.json of `config`.

        Raises:
            CheckpointError: the family cannot express a part of it.
        """
        config_json: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        problems = []
        for field in self.fields:
            try:
                config_json |= field.write(config)
            except ValueError as error:
                problems.append(str(error))
        if not problems:
            wanted, got = meaning(config), meaning(self.read_config(config_json, self.model_type))
            problems = [
                f"{name}={value!r} has no place in it; it would be read as {got[name]!r}."
                for name, value in wanted.items()
                if value != got[name]
            ]
        if problems:
            raise CheckpointError(self.model_type, problems)
        return config_json

    def bind(self, config: ModelConfig, shapes: Mapping[str, Shape], base: str | None = None) -> list[Binding]:
        """The rules for each layer of a model, in the order of the rules.

        Args:
            config: of the model.
            shapes: of its parameters, by name; every parameter is in one binding.
            base: the value of {base}; by default the value that is written.

        Raises:
            CheckpointError: a parameter without a rule.
        """
        base = self.bases[0] if base is None else base
        bindings = [
            binding
            for rule in self.rules
            for layer in _layers(config, rule)
            if (binding := _bind(rule, layer, base, config, shapes)) is not None
        ]
        left = sorted(shapes.keys() - {name for binding in bindings for name in binding.parameters})
        if left:
            problems = [f"the parameter {name} has no place in it; got {shapes[name]}." for name in left]
            raise CheckpointError(self.model_type, problems)
        return bindings

    def base_of(self, names: Iterable[str]) -> str:
        """The value of {base} in a file of tensors with these names."""
        longest = max(self.bases, key=len)
        return longest if any(name.startswith(longest) for name in names) else ""

    def repeats(self, config: ModelConfig) -> tuple[str, ...]:
        """The names of tensors that must repeat the embeddings if they are present."""
        tied = getattr(stacks(config)[-1], "tie_embeddings", False)
        return (*self.repeated, *self.tied) if tied else self.repeated

    def without_parameters(self, config: ModelConfig, names: Collection[str]) -> set[str]:
        """The names of tensors that may be present although they hold no parameters of their own."""
        repeats = self.repeats(config)
        extra = {name for name in names if name in repeats or name.endswith(self.buffers)}
        body = {name for name in names if name.startswith(self.body)}
        return extra | (set(names) - body) if body else extra

    def current_name(self, name: str) -> str:
        """The current form of a name, which may be an old name."""
        for old, new in self.renamed.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name


def stacks(config: ModelConfig) -> tuple[StackConfig, ...]:
    """The configs of a model's stacks; a head is on the last of them."""
    return (config.encoder, config.decoder) if isinstance(config, EncoderDecoderConfig) else (config,)


def _layers(config: ModelConfig, rule: Rule) -> Iterable[int]:
    """The numbers of the layers that a rule is applied to; only 0 where its tensor is of no layer."""
    in_layers = any("{layer}" in name for name in rule.parameters)
    return range(_stack_of(config, rule.parameters[0]).num_layers) if in_layers else [0]


def _bind(rule: Rule, layer: int, base: str, config: ModelConfig, shapes: Mapping[str, Shape]) -> Binding | None:
    """The rule for one layer, or None where that layer has no such parameters."""
    stack = _stack_of(config, rule.parameters[0])
    names = tuple(name.format(layer=layer) for name in rule.parameters)
    _, gated = ACTIVATIONS[stack.layer(layer).ff_activation]
    if not all(name in shapes for name in names) or rule.gated not in (None, gated):
        return None
    stacked = "{expert}" in rule.tensor
    experts = range(shapes[names[0]][0]) if stacked else [0]
    tensors = tuple(rule.tensor.format(base=base, layer=layer, expert=expert) for expert in experts)
    return Binding(tensors, names, tuple(shapes[name] for name in names), rule.layout, _sizes(stack), stacked)


def _stack_of(config: ModelConfig, parameter: str) -> StackConfig:
    """The config of the stack that the parameter belongs to."""
    if isinstance(config, EncoderDecoderConfig):
        return config.encoder if parameter.startswith("encoder.") else config.decoder
    return config


def _sizes(config: StackConfig) -> dict[str, int]:
    """The axes that layouts may name and shapes do not tell."""
    sizes = {"N": config.num_heads, "K": config.kv_heads, "H": config.head_size}
    height, width = getattr(config, "patch_size", (1, 1))
    return sizes | {"h": height, "w": width}

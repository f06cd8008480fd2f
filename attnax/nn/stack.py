"""A stack of blocks: a loop in Python, or one loop in the program over stacked parameters."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attnax.cache import StackedCaches, stack_caches
from attnax.checks import is_concrete
from attnax.config import StackConfig
from attnax.masks import kernel_of
from attnax.nn._run import run_of
from attnax.nn.attention import FUNCTIONS
from attnax.nn.blocks import Output, add_aux
from attnax.nn.dropout import Dropout
from attnax.nn.linear import ShapesOnly
from attnax.typing import Array, Float

__all__ = ["Stack", "with_scan_layers"]

Model = TypeVar("Model", bound=nnx.Module)


class Stack(nnx.Module):
    """`num_layers` blocks, each with its own config by `layer_pattern`.

    With `scan_layers`, the blocks at one place of every period of the pattern are stacked into one block of `periods`.
    The program loops over the leading axis of that block. Blocks after the last whole period stay in `blocks`.

    Args:
        rngs: for the initial weights and the stored dropout streams; the same weights with and without scan_layers.
        config: a StackConfig.
        make_block: `(rngs, config) -> block`, whose `run(x, **options)` returns an Output.
    """

    def __init__(self, rngs: nnx.Rngs, config: StackConfig, make_block: Callable[..., Any]):
        self.config = config
        layers = [config.layer(index) for index in range(config.num_layers)]
        if isinstance(rngs, ShapesOnly):
            made = {layer: make_block(rngs, layer) for layer in dict.fromkeys(layers)}
            self._hold([nnx.clone(made[layer]) for layer in layers])
        else:
            self._hold([make_block(rngs, layer) for layer in layers])

    def _hold(self, blocks: Sequence[nnx.Module]) -> None:
        period = max(1, len(self.config.layer_pattern))
        whole = len(blocks) // period * period if self.config.scan_layers else 0
        self.periods = nnx.List([_stack(blocks[place:whole:period]) for place in range(period) if place < whole])
        self.blocks = nnx.List(blocks[whole:])

    def layers(self) -> list[Any]:
        """The blocks from first to last, one a layer; blocks of `periods` are copies.

        A change of a copy does not reach the stack. Replacing a part of a copy raises ValueError; writing to its
        parameters, or calling its `train()` or `eval()`, raises nothing and has no effect.
        """
        scanned = self.config.num_layers - len(self.blocks)
        return [_read_only(block) if layer < scanned else block for layer, block in enumerate(self._unstacked())]

    def holders(self) -> list[Any]:
        """The block that holds the parameters of each layer; layers of one place of `periods` share theirs."""
        count, places = self.config.num_layers - len(self.blocks), len(self.periods)
        return [*(self.periods[layer % places] for layer in range(count)), *self.blocks]

    def _unstacked(self) -> list[Any]:
        """The blocks from first to last; blocks of `periods` are copies."""
        count = self.config.num_layers - len(self.blocks)
        places = len(self.periods)
        stacked = [_take(self.periods[layer % places], layer // places) for layer in range(count)]
        return stacked + list(self.blocks)

    def run(
        self,
        x: Float[Array, "B T D"],
        *,
        each: dict[str, Sequence[Any] | None] | None = None,
        rngs: nnx.Rngs | None = None,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Output:
        """The output of all blocks.

        Args:
            x: (batch, T, d_model).
            each: options of `block.run` that differ from layer to layer, one entry a layer.
            rngs: randomness of the dropout; each layer gets a key of its own.
            deterministic: as in a block.
            **options: options of `block.run` that all layers share.

        Returns:
            The stream, the new caches if there are any, and aux of all layers. The caches are a tuple; with
            `scan_layers` they are StackedCaches, which the next call writes in place.

        Raises:
            ValueError: with `scan_layers`, caches at one place of the pattern that differ in kind or size.
        """
        options["deterministic"] = deterministic
        layers: list[dict[str, Any]] = [{} for _ in range(self.config.num_layers)]
        each, scanned, held = dict(each or {}), self.config.num_layers - len(self.blocks), None
        if scanned and (caches := each.get("cache")) is not None:
            held = stack_caches("Stack", caches, len(self.periods), scanned // len(self.periods))
            each["cache"] = (*[None] * scanned, *held.rest)
        for name, entries in each.items():
            if entries is not None:
                for layer, entry in zip(layers, entries, strict=True):
                    layer[name] = entry
        if rngs is not None and not ("dropout" in rngs or "default" in rngs):
            options["rngs"] = rngs  # a layer that draws raises an error that names the missing stream
        elif rngs is not None and _draws(self, deterministic):
            for layer, key in zip(layers, jax.random.split(rngs.dropout(), len(layers)), strict=True):
                layer["key"] = key
        places: tuple[Any, ...] = ()
        aux: dict[str, Any] = {}
        if scanned:
            x, places, aux = self._scan(x, layers[:scanned], options, held)
        rest: list[Any] = []
        run_block = self._block_runner(options)
        for index, block in enumerate(self.blocks, scanned):
            with jax.named_scope(f"layer_{index}"):
                x, cache, block_aux = run_block(block, x, layers[index])
            rest.append(cache)
            aux = add_aux(aux, block_aux)
        if (*places, *rest)[0] is None:
            return Output(x, None, aux)
        made = StackedCaches(places, tuple(rest), scanned // len(places)) if scanned else tuple(rest)
        return Output(x, made, aux)

    def _block_runner(self, options: dict[str, Any]) -> Callable[..., tuple[Array, Any, dict[str, Any]]]:
        """(block, x, options of the layer) -> (x, cache, aux).

        Under tracing, equal layers of the library share one function, which is traced, differentiated and lowered once.
        The function lives as long as this call, since it may hold tracers. A user's block may have side effects, so
        every block of a user is called.
        """
        is_traced = not is_concrete(jnp.zeros(()))
        shares = is_traced and "rngs" not in options and all(map(_is_own, self.blocks))
        functions: dict[Any, Callable[..., Any]] = {}

        def run(block: Any, x: Array, layer: dict[str, Any]) -> tuple[Array, Any, dict[str, Any]]:
            if not shares and self.config.remat == "none":
                out = run_of(block)(x, **_with_rngs(layer), **options)
                return out.hidden, out.caches, out.aux
            graphdef, state = nnx.split(block)
            if graphdef not in functions:
                function = self._as_function(graphdef, options)
                functions[graphdef] = jax.jit(function) if shares else function
            x, cache, aux, written = functions[graphdef](x, state, layer)
            nnx.update(block, written)
            return x, cache, aux

        return run

    def _scan(
        self, x: Array, layers: list[dict[str, Any]], options: dict[str, Any], held: StackedCaches | None
    ) -> tuple[Array, tuple[Any, ...], dict[str, Any]]:
        """(x, the new caches of the places, aux) of the whole periods."""
        places = len(self.periods)
        graphdefs, states = zip(*(nnx.split(block) for block in self.periods), strict=True)
        functions = [self._as_function(graphdef, options) for graphdef in graphdefs]
        stacked = [jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers[place::places]) for place in range(places)]
        carried: dict[int, Any] = {}  # the caches that the loop writes in place
        if held is not None:
            functions = [jax.jit(function) for function in functions]  # traced once, here or in the loop
            for place, cache in enumerate(held.places):
                stacked[place]["cache"] = cache
                if _keeps_cache(functions[place], x, states[place], stacked[place]):
                    carried[place] = stacked[place].pop("cache")

        def run_period(carry: Any, inputs: Any) -> tuple[Any, Any]:
            x, carried = carry
            period, *of_places = inputs
            outputs = []
            for place, (function, state, layer) in enumerate(zip(functions, *of_places, strict=True)):
                own = {"cache": _at(carried[place], period)} if place in carried else {}
                with jax.named_scope(f"period_{place}"):
                    x, cache, *output = function(x, state, layer | own)
                if place in carried:
                    put = functools.partial(lax.dynamic_update_index_in_dim, index=period, axis=0)
                    carried = carried | {place: jax.tree.map(put, carried[place], cache)}
                outputs.append((None if place in carried else cache, *output))
            return (x, carried), outputs

        periods = jnp.arange(len(layers) // places) if carried else None
        (x, carried), outputs = lax.scan(run_period, (x, carried), (periods, list(states), stacked))
        aux: dict[str, Any] = {}
        for layer in range(len(layers)):
            aux = add_aux(aux, jax.tree.map(operator.itemgetter(layer // places), outputs[layer % places][1]))
        for block, (_, _, written) in zip(self.periods, outputs, strict=True):
            nnx.update(block, written)
        return x, tuple(carried.get(place, cache) for place, (cache, *_) in enumerate(outputs)), aux

    def _as_function(self, graphdef: Any, options: dict[str, Any]) -> Callable[..., Any]:
        """(x, state, options of the layer) -> (x, cache, aux, the variables that the call has written)."""

        def run(x: Array, state: Any, layer: dict[str, Any]) -> Any:
            block = nnx.merge(graphdef, state)
            variables = nnx.to_flat_state(nnx.state(block, nnx.Variable))
            before = {path: variable.get_raw_value() for path, variable in variables}
            out = run_of(block)(x, **_with_rngs(layer), **options)
            after = nnx.to_flat_state(nnx.state(block, nnx.Variable))
            written = [(path, variable) for path, variable in after if before.get(path) is not variable.get_raw_value()]
            return out.hidden, out.caches, out.aux, nnx.from_flat_state(written)

        if self.config.remat == "none":
            return run
        policies, remat = jax.checkpoint_policies, self.config.remat
        if remat == "attention_out":
            return jax.checkpoint(run, policy=policies.save_only_these_names(remat))
        policy = None if remat == "full" else getattr(policies, remat)
        return jax.checkpoint(run, policy=policy)


def with_scan_layers(model: Model, scan_layers: bool) -> Model:
    """A copy of `model` with the same parameters, stacked over the layers or not.

    Args:
        model: any module that holds Stacks, such as a TransformerLM.
        scan_layers: as in StackConfig.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import TransformerLM
        >>> from attnax.nn import with_scan_layers
        >>> lm = TransformerLM(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=3, d_ff=16)
        >>> with_scan_layers(lm, True)(jnp.zeros((1, 5), int)).shape
        (1, 5, 11)
    """
    model = nnx.clone(model)
    modules: list[Any] = [module for _, module in nnx.iter_modules(model)]
    stacks = [(module, module._unstacked()) for module in modules if isinstance(module, Stack)]
    modules += [module for _, layers in stacks for layer in layers for _, module in nnx.iter_modules(layer)]
    for module in modules:
        if isinstance(getattr(module, "config", None), StackConfig):
            module.config = dataclasses.replace(module.config, scan_layers=scan_layers)
    for stack, layers in stacks:
        stack._hold(layers)
    return model


def _stack(blocks: Sequence[nnx.Module]) -> nnx.Module:
    graphdefs, states = zip(*(nnx.split(block) for block in blocks), strict=True)
    return nnx.merge(graphdefs[0], jax.tree.map(lambda *arrays: jnp.stack(arrays), *states))


def _take(block: nnx.Module, index: int) -> nnx.Module:
    graphdef, state = nnx.split(block)
    return nnx.merge(graphdef, jax.tree.map(operator.itemgetter(index), state))


def _at(tree: Any, period: Any) -> Any:
    """The entries of one period, which may be traced."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, period, keepdims=False), tree)


def _keeps_cache(function: Callable[..., Any], x: Array, state: Any, layer: dict[str, Any]) -> bool:
    """Whether a layer returns a cache of the type that it was given, as a loop carries it; not for an EmptyCache."""

    def first_period(x: Array, *inputs: Any) -> tuple[Any, Any]:
        state, layer = _at(inputs, 0)
        return layer["cache"], function(x, state, layer)[1]

    before, after = jax.eval_shape(first_period, x, state, layer)
    return jax.tree.flatten(before) == jax.tree.flatten(after)


def _refuse_change(*_: Any) -> None:
    raise ValueError(
        "Stack.layers: with scan_layers layers share stacked parameters, and these are copies, so a change would be "
        "lost. Change stack.periods, whose parameters have one entry a layer along axis 0, or make the model with "
        "scan_layers=False (attnax.nn.with_scan_layers)."
    )


def _read_only(block: nnx.Module) -> nnx.Module:
    """The block, made read-only: replacing or deleting an attribute of its modules raises ValueError."""
    for _, part in nnx.iter_modules(block):
        part.__class__ = _read_only_class(type(part))
    return block


@functools.cache  # one class for each class, so that the copies of equal blocks are equal
def _read_only_class(cls: type[nnx.Module]) -> type[nnx.Module]:
    def set_attribute(self: Any, name: str, value: Any) -> None:
        if not isinstance(value, bool):  # `nnx.view` sets modes, which are bools, in its own copy
            _refuse_change()
        cls.__setattr__(self, name, value)

    members: dict[str, Any] = {"__setattr__": set_attribute, "__delattr__": _refuse_change}
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))


def _with_rngs(layer: dict[str, Any]) -> dict[str, Any]:
    options = dict(layer)
    if "key" in options:
        options["rngs"] = nnx.Rngs(dropout=options.pop("key"))
    return options


def _draws(module: nnx.Module, deterministic: bool | None) -> bool:
    """Whether a call may need randomness; a user's module always may."""
    return any(
        not type(layer).__module__.startswith(("attnax.", "flax."))
        or (
            isinstance(layer, Dropout)
            and layer.rate > 0.0
            and not (layer.deterministic if deterministic is None else deterministic)
        )
        for _, layer in nnx.iter_modules(module)
    )


def _is_own(module: nnx.Module) -> bool:
    """Whether a module and all modules and functions in it come from the library or Flax."""
    parts: list[Any] = [part for _, part in nnx.iter_modules(module)]
    functions = [getattr(part, name, None) for part in parts for name in FUNCTIONS]
    for part in [*map(type, parts), *functions]:
        inner = kernel_of(part)
        owner = inner if hasattr(inner, "__module__") else type(inner)
        if inner is not None and not str(owner.__module__).startswith(("attnax.", "flax.")):
            return False
    return True

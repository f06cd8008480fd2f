"""A stack of blocks: a loop in Python, or one loop in the program over stacked parameters."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attnax.cache import StackedCaches, stack_caches
from attnax.checks import is_concrete
from attnax.config import StackConfig
from attnax.masks import kernel_of
from attnax.nn._parts import MakeBlock, find_parts
from attnax.nn._protocol import call_block, check_block, init_carry
from attnax.nn._stacked import COPY_OF_A_LAYER, read_only, refuse_shared, stack_blocks, take_block
from attnax.nn.blocks import Output, add_aux
from attnax.nn.dropout import Dropout
from attnax.nn.linear import ShapesOnly
from attnax.nn.probe import Probe, Probed, as_probe, join_layers
from attnax.sharding import constrain, stream_axes
from attnax.typing import Array, Float, Int

__all__ = ["Stack"]


class _Layer(NamedTuple):
    """The results of one layer."""

    x: Array
    carry: Any
    cache: Any
    aux: dict[str, Any]
    weights: Probed | None
    written: Any = None  # the variables that the call has written


class _Layers(NamedTuple):
    """The results of several layers: the stream and the carry after them, and for each layer the rest."""

    x: Array
    carry: Any
    caches: tuple[Any, ...]
    aux: dict[str, Any]
    streams: list[Array]
    weights: list[Probed | None]


class Stack(nnx.Module):
    """`num_layers` blocks, each with its own config by `layer_pattern`.

    With `scan_layers`, the blocks at one place of every period of the pattern are stacked into one block of `periods`.
    The program loops over the leading axis of that block. Blocks after the last whole period stay in `blocks`.

    A block is a module with `run(x, **options) -> Output`. It takes every option that the model hands down, and returns
    the stream in its shape and dtype, the new cache if it gets one, and losses of its own in `aux`. A stack
    adds no mask to those options.

    State that passes from block to block within a call is the carry: a pytree of arrays. `init_carry(x, input_ids)` of
    the first block that has this method makes it, from the stream that enters the stack, (batch, T, d_model), and the
    token ids, (batch, T), or None where there are none. It must leave the block as it is. Blocks with `init_carry` get
    the carry as the option `carry` of `run`, and return the new one in `Output.carry`, of equal structure, shapes and
    dtypes; None leaves it as it was. Other blocks neither get nor change it. A carry ends with the call: each step of
    `generate` makes its own.

    Args:
        rngs: for the initial weights and the stored dropout streams; the same weights with and without scan_layers.
        config: a StackConfig.
        make_block: `(rngs, config) -> block`, called once for each layer, from first to last.

    Raises:
        ValueError: with `scan_layers`, blocks at one place of the pattern that differ in more than their arrays, or
            blocks that share parameters.
    """

    def __init__(self, rngs: nnx.Rngs, config: StackConfig, make_block: MakeBlock):
        self.config = config
        layers = [config.layer(index) for index in range(config.num_layers)]
        is_ours = str(getattr(kernel_of(make_block), "__module__", "")).startswith("attnax.")
        if isinstance(rngs, ShapesOnly) and is_ours:  # a user's function may give each layer something else
            made = {layer: make_block(rngs, layer) for layer in dict.fromkeys(layers)}
            self._hold([nnx.clone(made[layer]) for layer in layers])
        else:
            blocks = [make_block(rngs, layer) for layer in layers]
            for block in blocks:
                check_block(block)
            self._hold(blocks)

    def _hold(self, blocks: Sequence[nnx.Module]) -> None:
        period = max(1, len(self.config.layer_pattern))
        whole = len(blocks) // period * period if self.config.scan_layers else 0
        if whole:
            refuse_shared(blocks)
        self.periods = nnx.List([stack_blocks(blocks[place:whole:period]) for place in range(period) if place < whole])
        self.blocks = nnx.List(blocks[whole:])

    def layers(self) -> list[Any]:
        """The blocks from first to last, one a layer; blocks of `periods` are copies.

        A change of a copy would not reach the stack: replacing a part of it, writing to its parameters and its
        `train()` and `eval()` raise ValueError. Change `with_scan_layers(model, False)`.
        """
        scanned = self.config.num_layers - len(self.blocks)
        return [
            read_only(block, COPY_OF_A_LAYER) if layer < scanned else block
            for layer, block in enumerate(self._unstacked())
        ]

    def holders(self) -> list[Any]:
        """The block that holds the parameters of each layer; layers of one place of `periods` share theirs."""
        count, places = self.config.num_layers - len(self.blocks), len(self.periods)
        return [*(self.periods[layer % places] for layer in range(count)), *self.blocks]

    def _unstacked(self) -> list[Any]:
        """The blocks from first to last; blocks of `periods` are copies."""
        count = self.config.num_layers - len(self.blocks)
        places = len(self.periods)
        stacked = [take_block(self.periods[layer % places], layer // places) for layer in range(count)]
        return stacked + list(self.blocks)

    def run(
        self,
        x: Float[Array, "B T D"],
        *,
        each: dict[str, Sequence[Any] | None] | None = None,
        input_ids: Int[Array, "B T"] | None = None,
        probe: Probe | None = None,
        rngs: nnx.Rngs | None = None,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Output:
        """The output of all blocks.

        Args:
            x: (batch, T, d_model).
            each: options of `block.run` that differ from layer to layer, one entry a layer.
            input_ids: the tokens of x, for the `init_carry` of a block.
            probe: what to return of the layers in `probed`, and a patch of the stream.
            rngs: randomness of the dropout; each layer gets a key of its own.
            deterministic: as in a block.
            **options: options of `block.run` that all layers share.

        Returns:
            The stream, the new caches if there are any, aux of all layers, the last carry, and `probed`. The caches are
            a tuple; with `scan_layers` they are StackedCaches, which the next call writes in place.

        Raises:
            ValueError: with `scan_layers`, caches at one place of the pattern that differ in kind or size; attention
                weights with caches; or a block of a user that does not keep to the protocol.
        """
        options["deterministic"] = deterministic
        each, scanned, held = dict(each or {}), self.config.num_layers - len(self.blocks), None
        probe = as_probe(probe)
        if probe.attention_weights:
            if each.get("cache") is not None:
                raise ValueError(
                    "Probe: attention weights are those of a whole text; got attention_weights=True with caches. Leave "
                    "the caches out, and give all tokens."
                )
            options["attention_weights"] = True
        if scanned and (caches := each.get("cache")) is not None:
            held = stack_caches("Stack", caches, len(self.periods), scanned // len(self.periods))
            each["cache"] = (*[None] * scanned, *held.rest)
        layers = self._options_of_layers(each, rngs, options)
        x = probe.edited(0, x)
        made = _Layers(x, self._init_carry(x, input_ids), (), {}, [x] if probe.hidden_states else [], [])
        if scanned:
            made = self._scan(made, layers[:scanned], options, held, probe)
        places = made.caches
        made = self._loop(made, layers, options, probe)
        caches = made.caches
        if caches[0] is None:
            caches = None
        elif scanned:
            caches = StackedCaches(places, caches[len(places) :], scanned // len(places))
        probed = None
        if probe.hidden_states or probe.attention_weights:
            probed = join_layers(made.streams, made.weights if probe.attention_weights else ())
        return Output(made.x, caches, made.aux, carry=made.carry, probed=probed)

    def _init_carry(self, x: Array, input_ids: Array | None) -> Any:
        """The carry that the first block with an `init_carry` makes; None without such a block."""
        for index, block in enumerate((*self.periods, *self.blocks)):
            if hasattr(block, "init_carry"):
                return init_carry(take_block(block, 0) if index < len(self.periods) else block, x, input_ids)
        return None

    def _options_of_layers(
        self, each: dict[str, Any], rngs: nnx.Rngs | None, options: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The options of each layer alone; explicit randomness that nobody can split goes into the common `options`."""
        layers: list[dict[str, Any]] = [{} for _ in range(self.config.num_layers)]
        for name, entries in each.items():
            if entries is not None:
                for layer, entry in zip(layers, entries, strict=True):
                    layer[name] = entry
        if rngs is not None and not ("dropout" in rngs or "default" in rngs):
            options["rngs"] = rngs  # a layer that draws raises an error that names the missing stream
        elif rngs is not None and _draws(self, options["deterministic"]):
            for layer, key in zip(layers, jax.random.split(rngs.dropout(), len(layers)), strict=True):
                layer["key"] = key
        return layers

    def _loop(self, made: _Layers, layers: list[dict[str, Any]], options: dict[str, Any], probe: Probe) -> _Layers:
        """The results with those of the blocks after the last whole period."""
        run_block = self._block_runner(options)
        x, carry, caches, aux, streams, weights = made
        for index, block in enumerate(self.blocks, self.config.num_layers - len(self.blocks)):
            with jax.named_scope(f"layer_{index}"):
                out = run_block(block, x, carry, layers[index])
            x, carry = probe.edited(index + 1, out.x), out.carry
            caches, aux = (*caches, out.cache), add_aux(aux, out.aux)
            streams, weights = streams + ([x] if probe.hidden_states else []), [*weights, out.weights]
        return _Layers(x, carry, caches, aux, streams, weights)

    def _block_runner(self, options: dict[str, Any]) -> Callable[..., _Layer]:
        """(block, x, carry, options of the layer) -> the results.

        Under tracing, equal layers of the library share one function, which is traced, differentiated and lowered once.
        The function lives as long as this call, since it may hold tracers. A user's block may have side effects, so
        every block of a user is called.
        """
        is_traced = not is_concrete(jnp.zeros(()))
        shares = is_traced and "rngs" not in options and not any(map(find_parts, self.blocks))
        functions: dict[Any, Callable[..., Any]] = {}

        def run(block: Any, x: Array, carry: Any, layer: dict[str, Any]) -> _Layer:
            if not shares and self.config.remat == "none":
                return _results(call_block(block, x, carry, _with_rngs(layer) | options))
            graphdef, state = nnx.split(block)
            if graphdef not in functions:
                function = self._as_function(graphdef, options)
                functions[graphdef] = jax.jit(function) if shares else function
            out: _Layer = functions[graphdef](x, carry, state, layer)
            nnx.update(block, out.written)
            return out

        return run

    def _scan(
        self,
        made: _Layers,
        layers: list[dict[str, Any]],
        options: dict[str, Any],
        held: StackedCaches | None,
        probe: Probe,
    ) -> _Layers:
        """The results of the whole periods; the new caches are those of the places."""
        places = len(self.periods)
        graphdefs, states = zip(*(nnx.split(block) for block in self.periods), strict=True)
        functions = [self._as_function(graphdef, options) for graphdef in graphdefs]
        stacked = [jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers[place::places]) for place in range(places)]
        carried: dict[int, Any] = {}  # the caches that the loop writes in place
        if held is not None:
            functions = [jax.jit(function) for function in functions]  # traced once, here or in the loop
            for place, cache in enumerate(held.places):
                stacked[place]["cache"] = cache
                if _keeps_cache(functions[place], made, states[place], stacked[place]):
                    carried[place] = stacked[place].pop("cache")

        def run_period(loop: Any, inputs: Any) -> tuple[Any, Any]:
            x, carry, carried = loop
            period, *of_places = inputs
            outputs = []
            for place, (function, state, layer) in enumerate(zip(functions, *of_places, strict=True)):
                own = {"cache": _at(carried[place], period)} if place in carried else {}
                with jax.named_scope(f"period_{place}"):
                    out = function(x, carry, state, layer | own)
                x, carry = out.x, out.carry
                if probe.edit is not None:
                    x = probe.edited(period * places + place + 1, x)
                if place in carried:
                    put = functools.partial(lax.dynamic_update_index_in_dim, index=period, axis=0)
                    carried = carried | {place: jax.tree.map(put, carried[place], out.cache)}
                    out = out._replace(cache=None)
                outputs.append(out._replace(x=x if probe.hidden_states else None, carry=None))
            return (x, carry, carried), outputs

        periods = jnp.arange(len(layers) // places, dtype=jnp.int32) if carried or probe.edit else None
        first = (made.x, made.carry, carried)
        inputs, length = (periods, list(states), stacked), len(layers) // places
        (x, carry, carried), outputs = lax.scan(run_period, first, inputs, length=length)
        aux, streams, weights = made.aux, list(made.streams), list(made.weights)
        for layer in range(len(layers)):
            of_place = outputs[layer % places]._replace(cache=None, written=None)
            out = jax.tree.map(operator.itemgetter(layer // places), of_place)
            aux, weights = add_aux(aux, out.aux), [*weights, out.weights]
            streams += [out.x] if probe.hidden_states else []
        for block, output in zip(self.periods, outputs, strict=True):
            nnx.update(block, output.written)
        caches = tuple(carried.get(place, output.cache) for place, output in enumerate(outputs))
        return _Layers(x, carry, caches, aux, streams, weights)

    def _as_function(self, graphdef: Any, options: dict[str, Any]) -> Callable[..., _Layer]:
        """(x, carry, state, options of the layer) -> the results."""

        def run(x: Array, carry: Any, state: Any, layer: dict[str, Any]) -> _Layer:
            block = nnx.merge(graphdef, state)
            variables = nnx.to_flat_state(nnx.state(block, nnx.Variable))
            before = {path: variable.get_raw_value() for path, variable in variables}
            out = call_block(block, x, carry, _with_rngs(layer) | options)
            after = nnx.to_flat_state(nnx.state(block, nnx.Variable))
            written = [(path, variable) for path, variable in after if before.get(path) is not variable.get_raw_value()]
            return _results(out)._replace(written=nnx.from_flat_state(written))

        if self.config.remat == "none":
            return run
        policies, remat = jax.checkpoint_policies, self.config.remat
        if remat == "attention_out":
            return jax.checkpoint(run, policy=policies.save_only_these_names(remat))
        policy = None if remat == "full" else getattr(policies, remat)
        return jax.checkpoint(run, policy=policy)


def _results(out: Output) -> _Layer:
    hidden = constrain(out.hidden, *stream_axes(out.hidden.ndim))
    return _Layer(hidden, out.carry, out.caches, out.aux, out.probed)


def _at(tree: Any, period: Any) -> Any:
    """The entries of one period, which may be traced."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, period, keepdims=False), tree)


def _keeps_cache(function: Callable[..., _Layer], made: _Layers, state: Any, layer: dict[str, Any]) -> bool:
    """Whether a layer returns a cache of the type that it was given, as a loop carries it; not for an EmptyCache."""

    def first_period(x: Array, carry: Any, *inputs: Any) -> tuple[Any, Any]:
        state, layer = _at(inputs, 0)
        return layer["cache"], function(x, carry, state, layer).cache

    before, after = jax.eval_shape(first_period, made.x, made.carry, state, layer)
    return jax.tree.flatten(before) == jax.tree.flatten(after)


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

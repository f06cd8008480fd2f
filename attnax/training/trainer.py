"""The training of a language model: one compiled step and one compiled score."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import P
from jax.sharding import Mesh, NamedSharding

from attnax import masks
from attnax.checks import check_shape
from attnax.config import TransformerConfig
from attnax.models.lm import TransformerLM
from attnax.nn._parts import MakeBlock, Parts
from attnax.nn.axes import gather_parameters, parameter_shardings
from attnax.pytrees import pytree_dataclass
from attnax.sharding import BATCH, Layout, check_layout
from attnax.training.loss import weighted_cross_entropy
from attnax.training.optimizer import OptimizerConfig
from attnax.training.stream import TokenStream
from attnax.typing import Array, AttentionFn, Bool, Float, Int

__all__ = ["DivergenceError", "Metrics", "TrainState", "Trainer", "find_documents", "make_mesh"]


@pytree_dataclass
class TrainState:
    """The state that a step changes.

    Attributes:
        params: the parameters of the model.
        opt_state: of the optimizer.
        passes: int32 scalar, number of forward and backward passes; `accumulate` passes are one update.
        skipped: int32 scalar, number of updates that were skipped because of a non-finite value.
        sums: the accumulated gradients of the next update and whether they are finite; empty if each pass is an update.
    """

    params: Any
    opt_state: Any
    passes: Int[Array, ""]
    skipped: Int[Array, ""]
    sums: Any


class DivergenceError(ArithmeticError):
    """A loss, a gradient or a parameter is non-finite, and the training cannot go on.

    Attributes:
        is_skippable: whether the update was not made, so that the training can go on without it.
    """

    def __init__(self, message: str, *, is_skippable: bool = False):
        self.is_skippable = is_skippable
        super().__init__(message)


class Metrics(NamedTuple):
    """The metrics of one forward and backward pass.

    Attributes:
        loss: of the pass.
        grad_norm: norm of the mean gradient of the update so far, this pass included.
        is_skipped: whether an update was due and was skipped because of a non-finite value.
        is_finite: whether loss and gradient are finite and, after an update, the parameters.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    is_skipped: Bool[Array, ""]
    is_finite: Bool[Array, ""]


class Trainer:
    """A language model, its optimizer, and their compiled functions.

    Args:
        model: configuration of the model.
        optimizer: configuration of the optimizer.
        seed: of the parameters and of the dropout.
        document_token: the first token of every document. If it is given, the documents in a window are packed: they do
            not attend each other, and the positions of each start at 0.
        make_block: as in `TransformerLM`. Scalars in `Output.aux` whose names end in "_loss" are added to the loss.
        attention_fn: as in `TransformerLM`.
        layout: of the devices that hold the state and compute the steps, all devices of the process by default; None
            for the default device. Parameters, updates and dropout are those of one device, but for rounding.
        devices: of the layout, in place of all devices of the process. Those of a topology
            (`jax.experimental.topologies`) serve `lower_step`, on a machine that has none of them.

    Attributes:
        mesh: of the layout, or None.
        parts: the parts that were given, by name, for `TransformerLM(rngs, model, **parts)`.

    Raises:
        ValueError: a configuration that the model refuses, or a layout that does not divide the model, the batch or the
            devices, or a part whose parameters state no axes; from a step, a block that writes into variables which
            are no parameters.

    Example:
        >>> import numpy as np
        >>> from attnax import TransformerConfig
        >>> from attnax.training import OptimizerConfig, Trainer
        >>> model = TransformerConfig(vocab_size=7, d_model=8, num_heads=2, num_layers=1, d_ff=16, dropout_rate=0.0)
        >>> trainer = Trainer(model, OptimizerConfig(steps=10, batch_size=2))
        >>> state, metrics = trainer.step(trainer.init(), np.zeros((2, 6), np.int32))
        >>> int(state.passes)
        1
    """

    def __init__(
        self,
        model: TransformerConfig,
        optimizer: OptimizerConfig,
        seed: int = 0,
        *,
        document_token: int | None = None,
        make_block: MakeBlock | None = None,
        attention_fn: AttentionFn | None = None,
        layout: Layout | None = None,
        devices: Sequence[Any] | None = None,
    ):
        if not isinstance(layout, Layout | None):
            raise ValueError(f"Trainer: layout must be a Layout; got layout={layout!r}. Use Layout.parse(layout).")
        if devices is not None and layout is None:
            raise ValueError(f"Trainer: devices are those of a layout; got {len(devices)} devices and layout=None.")
        self.model, self.optimizer, self.seed, self.document_token = model, optimizer, seed, document_token
        self.parts: Parts = {"make_block": make_block, "attention_fn": attention_fn}
        self._update = optimizer.build()
        self.mesh = None if layout is None else make_mesh(layout, model, optimizer, devices)
        if self.mesh is not None and self.mesh.shape["context"] > 1 and attention_fn is not None:
            raise ValueError(
                "Trainer: an attention_fn gets whole sequences, and context cuts them; got both. Take context=1, or "
                "attention_type='flash' with a mask or a score mod."
            )
        graphdef, params, rest = self._make() if self.mesh is None else jax.eval_shape(self._make)
        self._graphdef, self._rest = graphdef, rest
        self.step: Any = jax.jit(self._step, donate_argnums=0)
        self._score: Any = jax.jit(self._score_windows)
        self._initial = nnx.to_pure_dict(params)
        if self.mesh is not None:
            self._rest = jax.jit(lambda: self._make()[2])()
            self._lay_out(self.mesh, nnx.to_pure_dict(parameter_shardings(params, self.mesh)))

    def _make(self) -> tuple[Any, Any, Any]:
        """The graph, the parameters and the other variables of the model."""
        rngs = nnx.Rngs(params=self.seed, dropout=self.seed)  # two: dropout does not change the initial parameters
        graphdef, params, *rest = nnx.split(TransformerLM(rngs, self.model, **self.parts), nnx.Param, ...)
        return graphdef, params, rest[0]

    def _lay_out(self, mesh: Mesh, cut: Any) -> None:
        """Makes functions that leave the state where the layout puts it; moments lie like their parameters."""
        rows = NamedSharding(mesh, P(BATCH))
        self._shardings = _alike(jax.eval_shape(self._new_state, self._initial), cut, NamedSharding(mesh, P()))
        step = jax.jit(self._step, donate_argnums=0, out_shardings=(self._shardings, None))

        def under(function: Any) -> Any:
            def run(first: Any, *batch: Any) -> Any:
                if batch[0].ndim == 2 and batch[0].shape[0] % _rows(mesh):
                    raise ValueError(
                        f"Trainer.step: data * fsdp * expert must divide the batch; got {_rows(mesh)} for tokens.shape="
                        f"{batch[0].shape}."
                    )
                with jax.set_mesh(mesh):
                    return function(first, *(jax.device_put(x, rows) if x.ndim == 2 else x for x in batch))

            return run

        self.step, self._score, self._compiled = under(step), under(self._score), step

    def init(self) -> TrainState:
        """The state before the first step; a function of the seed."""
        if self.mesh is None:
            return self._new_state(jax.tree.map(jnp.copy, self._initial))  # a step donates its arguments
        place = jax.jit(self._new_state, out_shardings=self._shardings)
        if self.mesh.devices.flat[0].platform == "cpu":
            # XLA's CPU compiler rounds a number by its place in a vector: drawn in parts, an array would differ.
            state: TrainState = place(jax.device_put(nnx.to_pure_dict(self._make()[1]), self._shardings.params))
        else:
            state = jax.jit(lambda: place(nnx.to_pure_dict(self._make()[1])), out_shardings=self._shardings)()
        return state

    def _new_state(self, params: Any) -> TrainState:
        passes, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return TrainState(params, self._update.init(params), passes, skipped, self._no_sums(params))

    def lower_step(self, length: int) -> jax.stages.Lowered:
        """The program of a step over (batch_size, length) tokens, for a look at its collectives, bytes and flops.

        Raises:
            ValueError: the trainer has no layout.
        """
        if self.mesh is None:
            raise ValueError("Trainer.lower_step: the program of a layout; got layout=None. Use trainer.step.lower.")
        with jax.set_mesh(self.mesh):
            lowered: jax.stages.Lowered = self.trace_step(length).lower()
        return lowered

    def trace_step(self, length: int) -> jax.stages.Traced:
        """A step over (batch_size, length) tokens as JAX traces it; nothing is computed."""
        tokens = jax.ShapeDtypeStruct((self.optimizer.batch_size, length), jnp.int32)
        step, shapes = self.step, (jax.eval_shape(self._new_state, self._initial), tokens)
        around: Any = contextlib.nullcontext()
        if self.mesh is not None:
            cuts = self._shardings, NamedSharding(self.mesh, P(BATCH))
            shapes = jax.tree.map(lambda x, cut: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), shapes, cuts)
            step, around = self._compiled, jax.set_mesh(self.mesh)
        with around:
            traced: jax.stages.Traced = step.trace(*shapes)
        return traced

    def merge(self, params: Any) -> TransformerLM:
        """The model with these parameters."""
        rest = jax.tree.map(lambda leaf: leaf, self._rest)  # variables of the model's own
        model: TransformerLM = nnx.merge(self._graphdef, params, rest)
        return model

    def bits(self, params: Any, stream: TokenStream, batch_size: int = 16) -> float:
        """Bits that the model needs for all tokens of `stream` except the first, each with 3/4 of a window as context.

        Args:
            params: of the model.
            stream: its first token, usually a document token, is not scored.
            batch_size: number of windows in a forward pass.
        """
        if self.mesh is not None:
            batch_size = -(-batch_size // _rows(self.mesh)) * _rows(self.mesh)
        windows = list(stream.scoring_windows(stride=max(1, stream.window // 4)))
        nats = 0.0
        for start in range(0, len(windows), batch_size):
            chosen = windows[start : start + batch_size]
            tokens = np.zeros((batch_size, stream.window + 1), np.int32)  # the last batch may have fewer windows
            counts = np.zeros((batch_size, stream.window), bool)
            tokens[: len(chosen)] = [window for window, _ in chosen]
            counts[: len(chosen)] = [count for _, count in chosen]
            nats += float(self._score(params, tokens, counts))
        return nats / math.log(2)

    def _step(self, state: TrainState, tokens: Int[Array, "B T"]) -> tuple[TrainState, Metrics]:
        """One forward and backward pass over windows of tokens, and an update if enough passes are accumulated.

        An update is skipped if a loss or gradient in its passes is non-finite, or if it would make float16 parameters
        non-finite.
        """
        if tokens.ndim != 2:
            raise ValueError(f"Trainer.step: tokens must be (batch, T); got tokens.shape={tokens.shape}.")
        context = 1 if self.mesh is None else self.mesh.shape["context"]
        if (tokens.shape[1] - 1) % context:
            raise ValueError(
                f"Trainer.step: context must divide the length of the windows; got context={context} for "
                f"{tokens.shape[1] - 1} tokens and the next one of each. Take a multiple; one of {2 * context} gives "
                "each device the same work."
            )
        key, targets = jax.random.fold_in(jax.random.key(self.seed), state.passes), tokens[:, 1:]

        def mean_loss(params: Any) -> Array:
            weights = jnp.full(targets.shape, 1 / max(1, targets.size), jnp.float32)
            loss, aux = self._loss(params, tokens, weights, deterministic=False, rngs=nnx.Rngs(dropout=key))
            return loss + self.optimizer.weigh(aux)

        loss, grads = jax.value_and_grad(mean_loss)(state.params)
        accumulate, is_finite = self.optimizer.accumulate, jnp.isfinite(loss)
        count = state.passes % accumulate + 1
        mean = grads
        if state.sums:
            was_finite, sums = state.sums
            grads, is_finite = jax.tree.map(jnp.add, sums, grads), is_finite & was_finite
            mean = jax.tree.map(lambda total: total / count, grads)
        norm = optax.tree.norm(mean)
        is_finite &= jnp.isfinite(norm)

        kept = state.params, state.opt_state, jnp.array(True)

        def update() -> tuple[Any, Any, Array]:
            updates, opt_state = self._update.update(mean, state.opt_state, state.params)
            made = optax.apply_updates(state.params, updates), opt_state
            fits = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(made[0])]).all()
            if _is_narrow(state.params):  # only float16, whose largest number is 65504, needs a second copy
                made = jax.tree.map(lambda new, old: jnp.where(fits, new, old), made, kept[:2])
            return *made, fits

        is_due = count == accumulate
        params, opt_state, fits = jax.lax.cond(is_due & is_finite, update, lambda: kept)
        is_finite &= fits
        sums = ()
        if state.sums:
            sums = jax.lax.cond(is_due, lambda: self._no_sums(state.params), lambda: (is_finite, grads))
        is_skipped = is_due & ~is_finite & (fits | _is_narrow(state.params))
        made = TrainState(params, opt_state, state.passes + 1, state.skipped + is_skipped, sums)
        return made, Metrics(loss, norm, is_skipped, is_finite)

    def _no_sums(self, params: Any) -> Any:
        if self.optimizer.accumulate == 1:
            return ()
        return jnp.ones((), bool), jax.tree.map(jnp.zeros_like, params)

    def _score_windows(self, params: Any, tokens: Int[Array, "B T"], counts: Array) -> Float[Array, ""]:
        return self._loss(params, tokens, counts.astype(jnp.float32), deterministic=True)[0]

    def _loss(
        self, params: Any, tokens: Array, weights: Float[Array, "B T"], **options: Any
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Weighted sum of the cross-entropies of every token after the first, and the losses of the model's layers."""
        read = tokens[:, :-1]
        if self.document_token is not None:
            documents, positions = find_documents(read, self.document_token)
            options |= {"mask": masks.documents(documents), "position_ids": positions}
        model = self.merge(params)
        before = _other_variables(model)
        out = model.decoder.run(read, **options)
        written = [path for path, value in _other_variables(model).items() if before.get(path) is not value]
        if written:
            raise ValueError(
                "Trainer: a step keeps parameters alone, so that what a block writes into other variables would be "
                f"lost; got a change of {'.'.join(map(str, written[0]))}. Pass state on in the carry or in aux, draw "
                "from the rngs of run, or train in a loop of your own."
            )
        graphdef, head = nnx.split((model.head, model.decoder.embed.tokens if self.model.tie_embeddings else None))

        def logits_of(head: Any, hidden: Array) -> Array:
            head_layer, table = nnx.merge(graphdef, head)
            logits: Array = head_layer(hidden, table)
            return logits

        head = gather_parameters(head)  # once, not in every turn of the loop over tokens
        return weighted_cross_entropy(logits_of, head, out.hidden, tokens[:, 1:], weights), out.aux


def _rows(mesh: Mesh) -> int:
    """The number of parts of a batch."""
    return math.prod(mesh.shape[name] for name in BATCH)


def make_mesh(
    layout: Layout, model: TransformerConfig, optimizer: OptimizerConfig, devices: Sequence[Any] | None = None
) -> Mesh:
    """The mesh of a layout over devices, by default all devices of the process.

    Raises:
        ValueError: the layout does not divide the devices, the model or the batch.
    """
    mesh = layout.mesh(devices)
    check_layout(model, layout.sized(mesh.size))
    if optimizer.batch_size % _rows(mesh):
        raise ValueError(
            f"Layout: data * fsdp * expert must divide the batch; got {_rows(mesh)} of {layout.sized(mesh.size)} and "
            f"batch_size={optimizer.batch_size}. Take a multiple."
        )
    return mesh


def _alike(state: Any, cut: Any, whole: NamedSharding) -> Any:
    """The sharding of each array of a state: that of the parameter whose path ends its own, else `whole`."""
    known = {_names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(cut)[0]}

    def find(path: Any, x: Any) -> NamedSharding:
        names = _names(path)
        ends = (known.get(names[start:]) for start in range(len(names)))
        found = next((end for end in ends if end is not None), whole)
        return found if len(found.spec) <= len(x.shape) else whole

    return jax.tree_util.tree_map_with_path(find, state)


def _names(path: Any) -> tuple[Any, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _other_variables(model: TransformerLM) -> dict[Any, Any]:
    """The values of a model's variables but parameters and `sow`n intermediates, which nobody expects to be kept."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate))))
    return {path: variable.get_raw_value() for path, variable in state}


def _is_narrow(params: Any) -> bool:
    """Whether a finite gradient may make non-finite parameters."""
    return any(float(jnp.finfo(leaf.dtype).max) < 1e30 for leaf in jax.tree.leaves(params))


def find_documents(tokens: Int[Array, "B T"], document_token: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The number of each token's document in its row, and the token's index within the document.

    A row may begin within a document; that part of the document has number 0, and its first token has index 0.

    Raises:
        ValueError: tokens whose shape is not (batch, length).

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.training import find_documents
        >>> documents, positions = find_documents(jnp.array([[7, 8, 0, 7, 0, 9]]), 0)
        >>> documents.tolist(), positions.tolist()
        ([[0, 0, 1, 1, 2, 2]], [[0, 1, 0, 1, 0, 1]])
    """
    check_shape("find_documents", "tokens", tokens, ("batch", "length"), integers=True)
    starts = tokens == document_token
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    begun = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32), index - begun

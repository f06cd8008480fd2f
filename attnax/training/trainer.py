"""The training of a model: one compiled update, one compiled score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from attnax.distributed import beat
from attnax.nn.axes import parameter_shardings
from attnax.sharding import Layout
from attnax.training.accumulate import mean_gradient
from attnax.training.devices import Devices
from attnax.training.functional import FunctionalModel, ModelSource
from attnax.training.mesh import check_attention_functions, make_mesh, num_parts, state_shardings
from attnax.training.objectives import Batch, Loss, Objective, check_objective
from attnax.training.optimizer import OptimizerConfig, in_float32
from attnax.training.precision import widen
from attnax.training.scoring import mean_of, windows_of
from attnax.training.state import Evaluation, Metrics, TrainState
from attnax.training.stream import TokenStream
from attnax.typing import Array

__all__ = ["Trainer"]


class Trainer:
    """A model, what it learns, its optimizer, and their compiled functions.

    In several processes (`attnax.distributed.connect`) each makes the same trainer with a layout of all devices, and
    calls the same methods in the same order. It gives the rows of its own part of each batch, `part`. A step or a
    score is run when all processes have compiled it.

    Args:
        model: a config, of a `TransformerLM`, a `Transformer` or a `VisionTransformer`, or a function of `nnx.Rngs`
            that makes a module: `lambda rngs: MaskedLM(rngs, config)`, one with parts of your own, or any module of
            Flax NNX. It is called for the shapes, in each `init`, and once more if the module has variables that are no
            parameters, such as streams of random numbers; it must make the same module each time.
        objective: what is made small: `causal_lm()`, `masked_lm(...)`, `seq2seq(...)`, `classification()` or a function
            `(model, batch, rngs) -> Loss`. Before it is called, the model's `train()` sets dropout on, and its own
            random streams are seeded; without rngs `eval()` sets dropout off.
        optimizer: a configuration, or an Optax transformation. Such a one clips gradients itself if they are to be
            clipped; its `update` gets the `value` of the loss too. Both keep their moments in float32 at least.
        layout: of the devices that hold the state and compute the updates; None for the default device, in one process
            only. Parameters, updates and dropout are those of one device, but for rounding.
        devices: of the layout, by default all devices of all processes. Those of a topology
            (`jax.experimental.topologies`) serve `lower_step`, on a machine that has none of them.
        ema: the decay of an exponential moving average of the parameters, such as 0.999, or None for none. After n
            updates the decay is at most (1 + n) / (10 + n), so that the first parameters are soon forgotten.
        seed: of the parameters, of dropout and of all other draws.

    Attributes:
        config: of the model, if it has one.
        shapes: a `TrainState` of shapes, dtypes and shardings; nothing is allocated.
        mesh: of the layout, or None.
        part: which part of the rows of a batch this process gives, and of how many, for `Batches`: (0, 1) in one
            process.

    Raises:
        ValueError: a configuration that the model refuses, or a layout that does not divide the model, the batch or the
            devices, or parameters that state no axes; from a step, a model that writes into variables which are no
            parameters, or a batch that the objective refuses.

    Example:
        >>> import numpy as np
        >>> from attnax import TransformerConfig
        >>> from attnax.training import OptimizerConfig, Trainer, causal_lm
        >>> model = TransformerConfig(vocab_size=7, d_model=8, num_heads=2, num_layers=1, d_ff=16, dropout_rate=0.0)
        >>> trainer = Trainer(model, causal_lm(), OptimizerConfig(steps=10))
        >>> batch = {"tokens": np.zeros((2, 3, 6), np.int32)}  # two passes over three rows each
        >>> state, metrics = trainer.step(trainer.init(), batch)
        >>> int(state.update), float(metrics.weight)
        (1, 30.0)
    """

    def __init__(
        self,
        model: ModelSource,
        objective: Objective,
        optimizer: OptimizerConfig | optax.GradientTransformation,
        *,
        layout: Layout | None = None,
        devices: Sequence[Any] | None = None,
        ema: float | None = None,
        seed: int = 0,
    ):
        if not isinstance(layout, Layout | None):
            raise ValueError(f"Trainer: layout must be a Layout; got layout={layout!r}. Use Layout.parse(layout).")
        if devices is not None and layout is None:
            raise ValueError(f"Trainer: devices are those of a layout; got {len(devices)} devices and layout=None.")
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"Trainer: ema must be between 0 and 1, or None; got ema={ema!r}.")
        if layout is None and jax.process_count() > 1:
            raise ValueError(
                f"Trainer: {jax.process_count()} processes must have a layout, or each would train a model of its own; "
                "got layout=None. Take Layout()."
            )
        check_objective(objective)
        self.objective, self.optimizer, self.ema, self.seed = objective, optimizer, ema, seed
        is_config = isinstance(optimizer, OptimizerConfig)
        self._update = optimizer.build() if is_config else in_float32(optimizer)
        self._model = FunctionalModel(model, seed)
        self.config = self._model.config
        params = nnx.to_pure_dict(self._model.params)
        self.shapes: TrainState = jax.eval_shape(self._new_state, params)
        self.mesh: Any = None
        self._shardings: Any = None
        if layout is not None:
            batch_size = optimizer.batch_size if is_config else None
            self.mesh = make_mesh(layout, self.config, batch_size=batch_size, devices=devices)
            check_attention_functions(self._model.abstract, self.mesh)
            cuts = nnx.to_pure_dict(parameter_shardings(self._model.params, self.mesh))
            self._shardings = state_shardings(self.shapes, params, cuts, self.mesh)
            self.shapes = _placed(self.shapes, self._shardings)
        self._devices = Devices(self.mesh)
        self.part = self._devices.part
        whole = None if self.mesh is None else NamedSharding(self.mesh, P())  # numbers that every process reads
        self._step_program = jax.jit(self._step, donate_argnums=0, out_shardings=(self._shardings, whole))
        self._score_program = jax.jit(self._score, out_shardings=whole)
        self._place_program = jax.jit(self._new_state, out_shardings=self._shardings)

    def init(self) -> TrainState:
        """The state before the first update; a function of the seed. On accelerators it is born in its place."""
        if self.mesh is None:
            return self._new_state(self._model.init())
        if self.mesh.devices.flat[0].platform == "cpu":
            # XLA's CPU compiler rounds a number by its place in a vector: drawn in parts, an array would differ.
            state: TrainState = self._place_program(self._devices.put(self._model.init(), self._shardings.params))
        else:
            make = jax.jit(lambda: self._place_program(self._model.init()), out_shardings=self._shardings)
            state = make()
        return state

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update: forward and backward passes over microbatches, and one step of the optimizer.

        The gradients are added up in float32, and divided once by the weight of all microbatches: the update is that of
        one large batch. It is skipped if a loss or a gradient is non-finite, or if it would make float16 parameters
        non-finite; only the counts of the state then change.

        Args:
            state: its arrays are given away, and must not be used again.
            batch: arrays (accumulate, B, ...) by name, with the rows of this process. Each shape is a program.

        Raises:
            ValueError: arrays of other shapes, or rows that the layout does not divide.
            ProcessError: another process does not compile the program within an hour, or has ended.
        """
        self._devices.check("Trainer.step", batch, accumulates=True)
        made: tuple[TrainState, Metrics] = self._devices.run(self._step_program, state, batch, accumulates=True)
        return made

    def evaluate(self, params: Any, batches: Iterable[Batch]) -> Evaluation:
        """The mean loss over batches of arrays (B, ...), as the objective gives it without random numbers.

        Args:
            params: of the model, such as `state.params` or `state.ema`.
            batches: of one shape, or each shape is a program; with the rows of this process, and as many in every
                process. Rows of weight 0 fill the last one. At most two are computed or held at a time, so that they
                may be many.

        Raises:
            ValueError: no batch, or as in `step`.
        """
        self._check_params("Trainer.evaluate", params)
        if isinstance(batches, Mapping):
            raise ValueError("Trainer.evaluate: batches must be an iterable of batches; got one batch. Give [batch].")

        def scored() -> Iterator[Loss]:
            for batch in batches:
                self._devices.check("Trainer.evaluate", batch, accumulates=False)
                loss: Loss = self._devices.run(self._score_program, params, batch, accumulates=False)
                beat()  # a long text takes longer than a launcher waits for a sign of life
                yield loss

        return mean_of(scored())

    def bits(self, params: Any, stream: TokenStream, batch_size: int = 16) -> float:
        """Bits that the model needs for all tokens of `stream` except the first, each with 3/4 of a window as context.

        Args:
            params: of the model, whose objective is `causal_lm`.
            stream: its first token, usually a document token, is not scored.
            batch_size: number of windows in a forward pass.
        """
        parts = num_parts(self.mesh)
        scored = self.evaluate(params, windows_of(stream, -(-batch_size // parts) * parts, self.part))
        return scored.loss * scored.weight / math.log(2)

    def merge(self, params: Any) -> Any:
        """The model with these parameters.

        Raises:
            ValueError: not the parameters of the model, such as a whole state.
        """
        self._check_params("Trainer.merge", params)
        return self._model.merge(params)

    def _check_params(self, caller: str, params: Any) -> None:
        if isinstance(params, TrainState):
            raise ValueError(f"{caller}: params must be those of the model; got a TrainState. Give state.params.")

    def trace_step(self, batch: Batch) -> jax.stages.Traced:
        """A step over such a batch, of arrays or of their shapes, as JAX traces it; nothing is computed."""
        self._devices.check("Trainer.trace_step", batch, accumulates=True)
        with self._devices.around():
            shapes = self._devices.shapes(batch, accumulates=True)
            traced: jax.stages.Traced = self._step_program.trace(self.shapes, shapes)
        return traced

    def lower_step(self, batch: Batch) -> jax.stages.Lowered:
        """The program of a step over such a batch, for a look at its collectives, bytes and flops."""
        with self._devices.around():
            return self.trace_step(batch).lower()

    def _new_state(self, params: Any) -> TrainState:
        params = _copied(params)  # two may be one array, or one that the function of the model holds
        update, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        ema = () if self.ema is None else _copied(widen(params))
        return TrainState(params, _copied(self._update.init(params)), update, skipped, ema)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(params: Any, microbatch: Batch, key: Array) -> Loss:
            return self._model.loss(self.objective, params, microbatch, key)

        key = jax.random.fold_in(jax.random.key(self.seed), state.update)
        cuts = None if self._shardings is None else self._shardings.params
        grads, loss = mean_gradient(loss_of, state.params, batch, key, cuts)
        norm = optax.tree.norm(grads)
        kept, is_narrow = (state.params, state.opt_state, state.ema), _is_narrow(state.params)

        def update() -> tuple[Any, Array]:
            updates, opt_state = self._update.update(grads, state.opt_state, state.params, value=loss.sum)
            params = optax.apply_updates(state.params, updates)
            fits = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
            made = params, opt_state, self._averaged(state, params)
            if is_narrow:  # only float16, whose largest number is 65504, needs a second copy
                made = jax.tree.map(lambda new, old: jnp.where(fits, new, old), made, kept)
            return made, fits

        is_finite = jnp.isfinite(loss.sum) & jnp.isfinite(norm)
        (params, opt_state, ema), fits = jax.lax.cond(is_finite, update, lambda: (kept, jnp.array(True)))
        is_skipped = ~(is_finite & fits) & (fits | is_narrow)
        made = TrainState(params, opt_state, state.update + 1, state.skipped + is_skipped, ema)
        return made, Metrics(loss.sum, loss.weight, norm, is_skipped, is_finite & fits, loss.aux)

    def _averaged(self, state: TrainState, params: Any) -> Any:
        """The moving average with the new parameters."""
        if self.ema is None:
            return ()
        made = (state.update - state.skipped).astype(jnp.float32)
        share = 1 - jnp.minimum(self.ema, (1 + made) / (10 + made))
        return jax.tree.map(lambda old, new: old + share.astype(old.dtype) * (new - old), state.ema, widen(params))

    def _score(self, params: Any, batch: Batch) -> Loss:
        return widen(self._model.loss(self.objective, params, batch, None))


def _copied(tree: Any) -> Any:
    """Copies of arrays, each in memory of its own: a step gives all arrays of a state away, and none of them twice."""
    leaves, structure = jax.tree.flatten(tree)
    del tree  # so that each array is freed when it has been copied, if nobody else holds it
    leaves.reverse()
    return jax.tree.unflatten(structure, [jnp.copy(leaves.pop()) for _ in range(len(leaves))])


def _placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, cut: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), shapes, shardings)


def _is_narrow(params: Any) -> bool:
    """Whether a finite gradient may make non-finite parameters."""
    return any(float(jnp.finfo(leaf.dtype).max) < 1e30 for leaf in jax.tree.leaves(params))

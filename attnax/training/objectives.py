"""What a training makes small: functions of a model, a batch and random numbers.

An objective is a plain function, so that one of a user's own needs no class: it returns a `Loss`, the sum over what it
counts and the weight of it. `Trainer` divides the sums of all microbatches once by their weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from attnax import masks
from attnax.checks import wide_dtype
from attnax.models import MaskedLM, Transformer, TransformerLM, VisionTransformer
from attnax.models.transformer import TokenHead
from attnax.nn._run import run_of, runs
from attnax.nn.axes import fsdp_specs, gather_parameters
from attnax.nn.blocks import Output
from attnax.nn.embeddings import TokenEmbedding
from attnax.sharding import current_mesh
from attnax.training.documents import find_documents
from attnax.training.layer_losses import LOSS_WEIGHTS, check_loss_weights, sum_of_layer_losses
from attnax.training.loss import weighted_cross_entropy
from attnax.typing import Array, Bool, Float, Int

__all__ = ["Batch", "Loss", "Objective", "causal_lm", "check_objective", "classification", "masked_lm", "seq2seq"]


class Loss(NamedTuple):
    """A sum of losses, the weight of it, and statistics.

    Attributes:
        sum: floating scalar, the sum of weight times loss; its gradient is that of the training.
        weight: floating scalar, the sum of the weights, such as the number of predicted tokens. The mean loss is
            sum / weight. A batch of weight 0 counts for nothing.
        aux: floating scalars to report, each a mean over what the weight counts.
    """

    sum: Float[Array, ""]
    weight: Float[Array, ""]
    aux: dict[str, Array]


Batch = Mapping[str, Any]
"""Arrays by name, each with the rows of the batch as its first axis."""

Objective = Callable[[Any, Any, "nnx.Rngs | None"], Loss]
"""`(model, batch, rngs) -> Loss`; without rngs there is no dropout, and the loss is a function of model and batch."""


def causal_lm(*, document_token: int | None = None, loss_weights: Mapping[str, float] = LOSS_WEIGHTS) -> Objective:
    """The mean cross-entropy of each token after the first, in nats, of a `TransformerLM`.

    A batch holds `tokens`, integers (B, T + 1), of which the model reads the first T, and may hold `weights` (B, T) of
    the predicted tokens, by default 1. The logits of a chunk of tokens are held at a time.

    A model of another class is called as `run(tokens, deterministic=, rngs=)`, and returns an `Output` with the logits
    of all tokens; so is a subclass that overrides `run` or `logits`.

    Args:
        document_token: the first token of every document. If it is given, the documents in a row are packed: they do
            not attend each other, and the positions of each start at 0.
        loss_weights: the weight of each scalar of `Output.aux` whose name ends in "_loss", by default 1; these losses
            are added to the mean in training, and left out without rngs.

    Raises:
        ValueError: from the objective, a batch of other arrays, rows that a layout's context does not divide, or a loss
            of a layer that is no floating scalar.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from attnax import TransformerLM
        >>> from attnax.training import causal_lm
        >>> model = TransformerLM(nnx.Rngs(0), vocab_size=7, d_model=8, num_heads=2, num_layers=1, d_ff=16)
        >>> loss = causal_lm()(model, {"tokens": np.zeros((2, 6), np.int32)}, None)
        >>> float(loss.weight)
        10.0
    """
    check_loss_weights("causal_lm", loss_weights)

    def objective(model: Any, batch: Batch, rngs: nnx.Rngs | None) -> Loss:
        _check_names("causal_lm", batch, ("tokens",), ("weights",))
        tokens = _integers("causal_lm", batch, "tokens", 2)
        read, targets = tokens[:, :-1], tokens[:, 1:]
        _check_context("causal_lm", targets.shape[1])
        weights, options = _weights("causal_lm", batch, targets), _mode(rngs)
        if document_token is not None:
            documents, positions = find_documents(read, document_token)
            options |= {"mask": masks.documents(documents), "position_ids": positions}
        if _is_as_it_was(model, TransformerLM):
            out = run_of(model.decoder)(read, **options)
            total = _through_head(model.head, model.decoder.embed.tokens, out.hidden, targets, weights)
        else:
            out = _with_logits("causal_lm", model, run_of(model)(read, **options))
            total = _of_logits(out.logits, targets, weights)
        return _loss("causal_lm", total, weights.sum(), out.aux, loss_weights, rngs)

    return objective


def seq2seq(
    *,
    source_padding: int | None = None,
    target_padding: int | None = None,
    loss_weights: Mapping[str, float] = LOSS_WEIGHTS,
) -> Objective:
    """The mean cross-entropy of each target token after the first, in nats, of a `Transformer`: teacher forcing.

    A batch holds `source`, integers (B, S), and `target`, integers (B, T + 1) that begin with the start token and end
    with the end token. The decoder reads the first T, and the logits of a chunk of tokens are held at a time. It may
    hold `weights` (B, T) of the predicted tokens, by default 1. A model of another class is called as
    `run(source, target, deterministic=, rngs=, ...)`, and returns an `Output` with the logits of all tokens.

    Args:
        source_padding: the token that fills the sources; no token attends it.
        target_padding: the token that fills the targets; no token attends it, and it has the weight 0 where it is
            predicted.
        loss_weights: as in `causal_lm`.

    Raises:
        ValueError: as in `causal_lm`.
    """
    check_loss_weights("seq2seq", loss_weights)

    def objective(model: Any, batch: Batch, rngs: nnx.Rngs | None) -> Loss:
        _check_names("seq2seq", batch, ("source", "target"), ("weights",))
        source, target = (_integers("seq2seq", batch, name, 2) for name in ("source", "target"))
        read, targets = target[:, :-1], target[:, 1:]
        weights, options = _weights("seq2seq", batch, targets), _mode(rngs)
        if source_padding is not None:
            options["source_padding_mask"] = source != source_padding
        if target_padding is not None:
            options["target_padding_mask"] = read != target_padding
            weights = jnp.where(targets == target_padding, 0.0, weights)
        if _is_as_it_was(model, Transformer):
            out = model.read(source, read, **options)
            of_decoder = model.decoder.embed.tokens
            table = model.encoder.embed.tokens if of_decoder is None else of_decoder
            total = _through_head(model.head, table, out.hidden, targets, weights)
        else:
            out = _with_logits("seq2seq", model, run_of(model)(source, read, **options))
            total = _of_logits(out.logits, targets, weights)
        return _loss("seq2seq", total, weights.sum(), out.aux, loss_weights, rngs)

    return objective


def masked_lm(
    *,
    mask_token: int,
    padding_token: int | None = None,
    special_tokens: Sequence[int] = (),
    share: float = 0.15,
    loss_weights: Mapping[str, float] = LOSS_WEIGHTS,
) -> Objective:
    """The mean cross-entropy of the chosen tokens of a text, in nats, of a `MaskedLM`.

    A batch holds `tokens`, integers (B, T). In each row a fixed share of the real tokens is chosen at random, at least
    one. Of the chosen ones 80 % become `mask_token`, 10 % a random token of the vocabulary, and 10 % stay as they are.
    The head computes the logits of the chosen tokens alone. Without rngs the draw is always the same.

    Args:
        mask_token: the token that stands for a hidden one.
        padding_token: the token that fills the rows; no token attends it, and it is never chosen.
        special_tokens: further tokens that are never chosen, such as those at the start and the end of a text.
        share: of the real tokens that are chosen.
        loss_weights: as in `causal_lm`.

    Raises:
        ValueError: a share outside of 0 and 1; from the objective, as in `causal_lm`, or a model that is no `MaskedLM`.

    References:
        J. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018,
        https://arxiv.org/abs/1810.04805.
    """
    check_loss_weights("masked_lm", loss_weights)
    if not 0 < share < 1:
        raise ValueError(f"masked_lm: share must be between 0 and 1; got share={share}.")
    never = (*special_tokens, *(() if padding_token is None else (padding_token,)))

    def objective(model: Any, batch: Batch, rngs: nnx.Rngs | None) -> Loss:
        _check_names("masked_lm", batch, ("tokens",), ())
        tokens = _integers("masked_lm", batch, "tokens", 2)
        if not isinstance(model, MaskedLM):
            raise ValueError(
                f"masked_lm: the model must be a MaskedLM; got {type(model).__name__}. Give the Trainer "
                "lambda rngs: MaskedLM(rngs, config)."
            )
        _check_context("masked_lm", tokens.shape[1])
        choose, replace = jax.random.split(jax.random.key(0) if rngs is None else rngs())
        may = jnp.stack([tokens != token for token in never]).all(axis=0) if never else jnp.ones(tokens.shape, bool)
        places, weights = _choose(choose, may, share)
        replaced = _replace(replace, tokens, places, weights > 0, mask_token, model.config.vocab_size)
        options = _mode(rngs)
        if padding_token is not None:
            options["padding_mask"] = tokens != padding_token
        targets = jnp.take_along_axis(tokens, places, axis=1)
        if _is_as_it_was(model, MaskedLM):
            out = run_of(model.encoder)(replaced, **options)
            hidden = model.features(jnp.take_along_axis(out.hidden, places[..., None], axis=1))
            total = _through_head(model.head, model.encoder.embed.tokens, hidden, targets, weights)
        else:
            out = _with_logits("masked_lm", model, run_of(model)(replaced, **options))
            logits = jnp.take_along_axis(out.logits, places[..., None], axis=1)
            total = _of_logits(logits, targets, weights)
        return _loss("masked_lm", total, weights.sum(), out.aux, loss_weights, rngs)

    return objective


def classification(*, padding_token: int | None = None, loss_weights: Mapping[str, float] = LOSS_WEIGHTS) -> Objective:
    """The mean cross-entropy of the class of each image or text, in nats; `aux` has the `accuracy`.

    A batch holds `labels`, integers (B,), and either `images`, floating (B, height, width, channels) or uint8, which
    become numbers from 0 to 1, or `tokens`, integers (B, T). It may hold `weights` (B,), by default 1.

    A `VisionTransformer` with num_classes reads images. Any other module is called as `model(images)` or
    `model(tokens)`, with `padding_mask=` beside tokens if there is a padding token, and returns logits (B, C).
    `Trainer` calls its `train()` or `eval()` before.

    Args:
        padding_token: the token that fills the texts.
        loss_weights: as in `causal_lm`, for a `VisionTransformer`.

    Raises:
        ValueError: from the objective, as in `causal_lm`, or a result that is no (B, C).

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from attnax import VisionTransformer
        >>> from attnax.training import classification
        >>> size = {"image_size": 8, "patch_size": 4, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 16}
        >>> model = VisionTransformer(nnx.Rngs(0), **size, num_classes=3)
        >>> batch = {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([0, 2])}
        >>> sorted(classification()(model, batch, None).aux)
        ['accuracy']
    """
    check_loss_weights("classification", loss_weights)

    def objective(model: Any, batch: Batch, rngs: nnx.Rngs | None) -> Loss:
        source = "tokens" if "tokens" in batch else "images"
        _check_names("classification", batch, (source, "labels"), ("weights",))
        labels = _integers("classification", batch, "labels", 1)
        weights, aux = _weights("classification", batch, labels), {}
        if source == "tokens":
            tokens = _integers("classification", batch, "tokens", 2)
            options = {} if padding_token is None else {"padding_mask": tokens != padding_token}
            logits = model(tokens, **options)
        else:
            images = jnp.asarray(batch["images"])
            images = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
            if isinstance(model, VisionTransformer):
                out = run_of(model)(images, **_mode(rngs))
                logits, aux = out.logits, out.aux
            else:
                logits = model(images)
        if getattr(logits, "shape", (None,))[:-1] != labels.shape:
            raise ValueError(
                f"classification: the model must return logits of shape ({labels.shape[0]}, number of classes); got "
                f"{getattr(logits, 'shape', logits)}. A VisionTransformer needs num_classes."
            )
        total = _of_logits(logits, labels, weights)
        count = weights.sum()
        right = jnp.where(logits.argmax(-1) == labels, weights, 0).sum() / jnp.where(count > 0, count, 1)
        loss = _loss("classification", total, count, aux, loss_weights, rngs)
        return loss._replace(aux=loss.aux | {"accuracy": right})

    return objective


def _through_head(
    head: TokenHead,
    table: TokenEmbedding | None,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """The weighted sum of cross-entropies, from a chunk of logits at a time."""
    graphdef, params = nnx.split((head, table if head.projection is None else None))

    def logits_of(params: Any, hidden: Array) -> Array:
        head, table = nnx.merge(graphdef, params)
        logits: Array = head(hidden, table)
        return logits

    specs = fsdp_specs(params)
    if specs is None:
        params = gather_parameters(params)  # once, not in every turn of the loop over tokens
    return weighted_cross_entropy(logits_of, params, hidden, targets, weights, specs)


def _of_logits(logits: Array, targets: Array, weights: Array) -> Array:
    exact = logits.astype(wide_dtype(logits.dtype))
    losses = optax.softmax_cross_entropy_with_integer_labels(exact, targets)
    return (weights * losses).sum()


def _loss(
    caller: str,
    total: Array,
    weight: Array,
    aux: Mapping[str, Any],
    loss_weights: Mapping[str, float],
    rngs: nnx.Rngs | None,
) -> Loss:
    """The loss with the losses of a model's layers, in training, and the scalars of `Output.aux`."""
    if rngs is not None:
        total = total + weight * sum_of_layer_losses(caller, aux, loss_weights)
    scalars = {name: jnp.asarray(x) for name, x in aux.items() if isinstance(x, jax.Array | float) and jnp.ndim(x) == 0}
    return Loss(total, weight, {name: x for name, x in scalars.items() if jnp.issubdtype(x.dtype, jnp.floating)})


def _choose(key: Array, may: Bool[Array, "B T"], share: float) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """The places of the chosen tokens of each row, and the weight 0 of places that fill a row with fewer of them."""
    rank = jnp.where(may, jax.random.uniform(key, may.shape), 2.0)
    count = max(1, round(share * may.shape[1]))
    places = jnp.argsort(rank, axis=1)[:, :count]
    allowed = may.sum(axis=1, keepdims=True)
    wanted = jnp.minimum(jnp.maximum(jnp.round(share * allowed), 1), allowed)
    return places, (jnp.arange(count)[None, :] < wanted).astype(jnp.float32)


def _replace(
    key: Array,
    tokens: Int[Array, "B T"],
    places: Int[Array, "B K"],
    chosen: Bool[Array, "B K"],
    mask_token: int,
    size: int,
) -> Int[Array, "B T"]:
    """The tokens, of which 80 % at the chosen places are masked and 10 % are random ones of a vocabulary of `size`."""
    draw, other = jax.random.split(key)
    chance, old = jax.random.uniform(draw, places.shape), jnp.take_along_axis(tokens, places, axis=1)
    random = jax.random.randint(other, places.shape, 0, size, tokens.dtype)
    new = jnp.where(chance < 0.8, mask_token, jnp.where(chance < 0.9, random, old))
    rows = jnp.arange(tokens.shape[0])[:, None]
    return tokens.at[rows, places].set(jnp.where(chosen, new, old))


def check_objective(objective: Any) -> None:
    """Raises ValueError for what cannot be called with a model, a batch and random numbers."""
    try:
        inspect.signature(objective).bind(None, None, None)
    except ValueError:  # a function of C, which has no signature to check
        return
    except TypeError as error:
        name = getattr(objective, "__name__", repr(objective))
        raise ValueError(
            f"Trainer: objective must be a function of (model, batch, rngs); got {name}: {error}. A name such as "
            "causal_lm is called first: causal_lm()."
        ) from error


def _mode(rngs: nnx.Rngs | None) -> dict[str, Any]:
    return {"deterministic": rngs is None, "rngs": rngs}


def _is_as_it_was(model: Any, kind: type[TransformerLM] | type[Transformer] | type[MaskedLM]) -> bool:
    """Whether a model computes its logits as `kind` does, so that those of a chunk are the head's."""
    if not isinstance(model, kind) or not runs(model, kind.run):
        return False
    return getattr(type(model), "logits", None) is getattr(kind, "logits", None)


def _with_logits(caller: str, model: Any, out: Any) -> Output:
    if not isinstance(out, Output) or out.logits is None:
        raise ValueError(
            f"{caller}: the run of a model must return an attnax.nn.Output with logits; got {type(out).__name__} from "
            f"{type(model).__name__}.run. Return Output(hidden, None, {{}}, logits), or write an objective of your own."
        )
    return out


def _check_names(caller: str, batch: Any, needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    names = set(batch) if isinstance(batch, Mapping) else {type(batch).__name__}
    if not set(needed) <= names <= {*needed, *optional}:
        more = f", and may hold {' and '.join(optional)}" if optional else ""
        raise ValueError(f"{caller}: a batch must hold {' and '.join(needed)}{more}; got {sorted(names)}.")


def _integers(caller: str, batch: Batch, name: str, ndim: int) -> Int[Array, "..."]:
    """An array of integers of a batch as int32, which every index is."""
    x = jnp.asarray(batch[name])
    if x.ndim != ndim or not jnp.issubdtype(x.dtype, jnp.integer):
        shape = "(B,)" if ndim == 1 else "(B, length)"
        raise ValueError(f"{caller}: {name} must be integers of shape {shape}; got {name}={x.dtype}{list(x.shape)}.")
    return x.astype(jnp.int32)


def _weights(caller: str, batch: Batch, targets: Int[Array, "..."]) -> Float[Array, "..."]:
    weights = jnp.asarray(batch["weights"]) if "weights" in batch else jnp.ones(targets.shape, jnp.float32)
    if weights.shape != targets.shape:
        raise ValueError(
            f"{caller}: weights must be those of the {list(targets.shape)} targets; got weights.shape={weights.shape}."
        )
    return weights.astype(jnp.float32)


def _check_context(caller: str, length: int) -> None:
    mesh = current_mesh()
    context = 1 if mesh is None else mesh.shape["context"]
    if length % context:
        raise ValueError(
            f"{caller}: context must divide the length of the windows; got context={context} for {length} tokens that "
            f"are read. Take a multiple; one of {2 * context} gives each device the same work."
        )

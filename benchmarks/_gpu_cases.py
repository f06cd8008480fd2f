"""The cases, the sizes and the attention of each side of `gpu.py`, in JAX or PyTorch.

A side prepares a job and returns one `Run` for each pass: a function that starts the work on one of several sets of
inputs, and a sample of its results. Needs jax and numpy; PyTorch for its two sides.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from _cases import CAP, Arrays, common_cases, document_ids, jax_results
from _flops import FLOPS_OF_PAIR

WINDOW = 1024
CASES = common_cases(WINDOW)
ATTNAX = ("pallas", "automatic")
SIDES = {
    "pallas": "Attnax Pallas",
    "automatic": "Attnax automatic",
    "cudnn": "jax.nn cuDNN",
    "sdpa": "torch SDPA",
    "flex": "torch Flex",
}
PASSES = ("forward", "forward + backward")
SETS = 3  # of inputs, used in turn
MOST_BIAS_BYTES = 6e9
PERIOD = 2**20 - 3  # numbers drawn for an array; a prime, so that repeated numbers stand in other places of a row


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


# For each case the number of pairs that the mask allows, of a length.
PAIRS: dict[str, Callable[[int], int]] = {
    "full": lambda length: length**2,
    "causal": _triangle,
    "window": lambda length: _triangle(length) - _triangle(max(0, length - WINDOW)),
    "documents": lambda length: sum(map(_triangle, np.bincount(document_ids(length)).tolist())),
    "alibi": _triangle,
    "soft-cap": _triangle,
    "learned bias": lambda length: length**2,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A case and its sizes; all in bfloat16."""

    case: str
    length: int
    head_dim: int
    heads: int
    kv_heads: int
    batch: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of query, key, value and the cotangent of the result: (B, N, T, H)."""
        query = self.batch, self.heads, self.length, self.head_dim
        key = self.batch, self.kv_heads, self.length, self.head_dim
        return query, key, key, query

    @property
    def extra(self) -> Arrays:
        """The arrays of the case."""
        return CASES[self.case].extra(self.length, self.heads)

    def flops(self, name: str) -> float:
        """Floating-point operations of a pass; only pairs that the mask allows count."""
        return float(FLOPS_OF_PAIR[name] * PAIRS[self.case](self.length) * self.batch * self.heads * self.head_dim)


@dataclasses.dataclass
class Run:
    """A pass of a job on one side."""

    start: Callable[[int], Any]  # begins the work on a set of inputs, returns the results
    wait: Callable[[Any], Any]  # waits for the results
    sample: list[list[float]]  # numbers of every result, at the same indices for all sides
    compile_seconds: float
    calls: int = 0  # in a block; 0 is not known yet

    def seconds(self, block: float) -> float:
        """Seconds of one call: the mean of a block of calls that takes about `block` seconds."""
        if self.calls == 0:
            self.calls, once = 1, self._time(1)
            if once >= 10 * block:
                return once
            self.calls = max(1, round(block / min(once, self._time(3))))
        elif self.calls > 1:
            self._time(1)  # wakes the device
        return self._time(self.calls)

    def _time(self, calls: int) -> float:
        begin, results = time.perf_counter(), None
        for n in range(calls):
            results = self.start(n % SETS)
        self.wait(results)
        return (time.perf_counter() - begin) / calls


Runs = dict[str, Run | str]
"""For each pass a Run, or the reason why this side has none."""


def _each_pass(make: Callable[[bool], Run]) -> Runs:
    """`make(backward)` for both passes. JAX and PyTorch raise RuntimeError for errors of compilers and devices."""
    runs: Runs = {}
    for name in PASSES:
        try:
            runs[name] = make(name != "forward")
        except (ValueError, RuntimeError) as error:  # NotImplementedError among them
            runs[name] = why(error)
    return runs


def why(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    words = lines[0][:200]
    return words if isinstance(error, NotImplementedError) and words else f"{type(error).__name__}: {words}"


@functools.lru_cache(4 * SETS)
def _noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(PERIOD, np.float32)


def _places(shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    return tuple(rng.integers(size, size=512) for size in shape)


# JAX.


def jax_inputs(job: Job, number: int) -> list[Any]:
    """A set of query, key, value and cotangent: unit normal, the same numbers on every side."""
    import jax.numpy as jnp

    return [jnp.resize(jnp.asarray(_noise(4 * number + n), jnp.bfloat16), shape) for n, shape in enumerate(job.shapes)]


def attnax_attention(job: Job, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Attnax's attention as a function (query, key, value, extra) -> out."""
    from attnax import masks
    from attnax.kernels import score_mods

    def attend(query: Any, key: Any, value: Any, extra: Arrays) -> Any:
        mask = None if CASES[job.case].keep is None else masks.causal()
        score_mod: Any = None
        if job.case == "window":
            mask = masks.sliding_window(WINDOW)
        elif job.case == "documents":
            mask = masks.causal() & masks.documents(extra["ids"])
        elif job.case == "alibi":
            score_mod = score_mods.Alibi(extra["slopes"])
        elif job.case == "soft-cap":
            score_mod = score_mods.soft_cap_mod(CAP)
        elif job.case == "learned bias":
            score_mod = score_mods.relative_table_mod(extra["table"])
        return kernel(query, key, value, mask=mask, score_mod=score_mod)

    return attend


def attnax_kernel(side: str, *, interpret: bool) -> Callable[..., Any]:
    """The function of Attnax that a side times."""
    from attnax import flash_attention, pallas_flash_attention

    if side == "automatic":
        return flash_attention
    return functools.partial(pallas_flash_attention, interpret=interpret)


def cudnn_attention(job: Job) -> Callable[..., Any]:
    """cuDNN's attention (layout B, T, N, H). ALiBi is an array `bias`; the learned bias is made of its table."""
    import jax
    import jax.numpy as jnp

    case = CASES[job.case]
    if job.case == "soft-cap":
        raise NotImplementedError("cuDNN in JAX has no soft cap")
    if job.case == "documents":
        raise NotImplementedError("cuDNN in JAX has documents only as a dense mask")
    needed = 2.0 * job.heads * job.length**2
    if case.change is not None and needed > MOST_BIAS_BYTES:
        raise NotImplementedError(f"a dense bias of {needed / 1e9:.0f} GB")

    def attend(query: Any, key: Any, value: Any, extra: Arrays) -> Any:
        bias = dense_bias(job, extra) if case.learned else extra.get("bias")
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=None if bias is None else bias.astype(jnp.bfloat16),
            is_causal=case.keep is not None,
            local_window_size=(WINDOW - 1, 0) if job.case == "window" else None,
            implementation="cudnn",
        )

    return attend


def dense_bias(job: Job, extra: Arrays) -> Any:
    """The bias that a case adds to the scores: (1, N, T, S)."""
    import jax.numpy as jnp

    change = CASES[job.case].change
    assert change is not None
    index, heads = jnp.arange(job.length), jnp.arange(job.heads)[:, None, None]
    return change(jnp.float32(0), 0, heads, index[:, None], index[None, :], extra, jnp)[None]


def prepare_jax(side: str, job: Job, *, rehearse: bool) -> Runs:
    """The runs of a job on a side in JAX."""
    import jax
    import jax.numpy as jnp

    case, turned = CASES[job.case], side == "cudnn"

    @functools.cache
    def operands() -> tuple[list[list[Any]], Arrays]:
        sets, extra = [jax_inputs(job, n) for n in range(SETS)], jax.device_put(job.extra)
        if turned:
            sets = [[x.swapaxes(1, 2) for x in inputs] for inputs in sets]
            if job.case == "alibi":
                extra = {"bias": jax.jit(lambda extra: dense_bias(job, extra).astype(jnp.bfloat16))(extra)}
        return jax.block_until_ready((sets, extra))

    def make(backward: bool) -> Run:
        attend = cudnn_attention(job) if turned else attnax_attention(job, attnax_kernel(side, interpret=rehearse))
        sets, extra = operands()
        begin = time.perf_counter()
        results = jax_results(attend, backward=backward, learn=case.learned)
        program = jax.jit(results).lower(*sets[0], extra).compile()
        compile_seconds = time.perf_counter() - begin
        sample = []
        for x in program(*sets[0], extra):
            natural = x.swapaxes(1, 2) if turned and x.ndim == 4 else x
            sample.append(np.asarray(natural[_places(natural.shape)], np.float32).tolist())
        return Run(lambda n: program(*sets[n], extra), jax.block_until_ready, sample, compile_seconds)

    return _each_pass(make)


# The check of Attnax.


def dense_attention(job: Job, query: Any, key: Any, value: Any, extra: Arrays) -> Any:
    """The definition; in bfloat16 the weights are rounded before the second product, as for tensor cores."""
    import jax
    import jax.numpy as jnp

    case, (batch, heads, length, head_dim) = CASES[job.case], query.shape
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    grouped = query.reshape(batch, job.kv_heads, -1, length, head_dim)
    scores = product("BKGTH,BKSH->BKGTS", grouped, key).reshape(batch, heads, length, -1) * head_dim**-0.5
    index = jnp.ix_(*map(jnp.arange, scores.shape))
    if case.change is not None:
        scores = case.change(scores, *index, extra, jnp)
    if case.keep is not None:
        scores = jnp.where(case.keep(*index, extra), scores, -jnp.inf)
    weights = jax.nn.softmax(scores).reshape(*grouped.shape[:4], -1)
    if value.dtype == jnp.bfloat16:
        weights = jax.lax.reduce_precision(weights, 8, 7)  # the compiler may remove a cast to bfloat16 and back
    weights = weights.astype(value.dtype)
    return product("BKGTS,BKSH->BKGTH", weights, value).reshape(query.shape).astype(query.dtype)


def check(side: str, job: Job, *, rehearse: bool) -> list[dict[str, Any]]:
    """The error of each result of a side and of the dense computation in bfloat16, both against float32."""
    import jax
    import jax.numpy as jnp

    inputs, extra = jax_inputs(job, 0), jax.device_put(job.extra)
    learn = [name for name, x in job.extra.items() if x.dtype == np.float32]
    dense = functools.partial(dense_attention, job)
    attends: dict[str, Callable[..., Any]] = {
        "want": dense,
        "dense": dense,
        "have": attnax_attention(job, attnax_kernel(side, interpret=rehearse)),
    }
    results = {}
    for name, attend in attends.items():
        given = [x.astype(jnp.float32) for x in inputs] if name == "want" else inputs
        program = jax.jit(jax_results(attend, backward=True, learn=learn))
        results[name] = [np.asarray(x, np.float32) for x in program(*given, extra)]

    def error(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(x - y)) / np.mean(np.square(y))))

    names = ["out", *(f"gradient of {name}" for name in ("query", "key", "value", *learn))]
    found = []
    for name, have, rounded, want in zip(names, results["have"], results["dense"], results["want"], strict=True):
        errors = {"error": error(have, want), "dense_error": error(rounded, want)}
        # An error below half a unit of bfloat16 is lost when the result is rounded.
        ratio = errors["error"] / max(errors["dense_error"], 2.0**-11)
        # With few numbers, one slope for each head, both errors depend on chance.
        found.append({"result": name, **errors, "ratio": ratio, "allowed": 2.0 if want.size >= 64 else 4.0})
    return found


# PyTorch.


def prepare_torch(side: str, job: Job, *, rehearse: bool) -> Runs:
    """The runs of a job on a side in PyTorch."""
    import torch

    device = "cpu" if rehearse else "cuda"
    torch.compiler.reset()  # or PyTorch limits the number of shapes that it compiles for
    if not rehearse:
        torch.cuda.empty_cache()

    @functools.cache
    def operands() -> list[list[Any]]:
        sizes = [int(np.prod(shape)) for shape in job.shapes]
        sets = []
        for number in range(SETS):
            drawn = [torch.from_numpy(_noise(4 * number + n)).to(device, torch.bfloat16) for n in range(4)]
            sets.append([x.repeat(-(-size // PERIOD))[:size] for x, size in zip(drawn, sizes, strict=True)])
        return sets

    def make(backward: bool) -> Run:
        sets = [[x.view(shape) for x, shape in zip(inputs, job.shapes, strict=True)] for inputs in operands()]
        extra = {name: torch.from_numpy(x).to(device) for name, x in job.extra.items()}
        learned = [extra[name] for name in CASES[job.case].learned]
        for x in [*(x for inputs in sets for x in inputs[:3]), *learned]:
            x.requires_grad_(backward)
        attend = (flex_attention if side == "flex" else sdpa_attention)(job, extra, device)

        def start(n: int) -> Any:
            *inputs, cotangent = sets[n]
            if not backward:
                with torch.no_grad():
                    return (attend(*inputs),)
            out = attend(*inputs)
            return out, *torch.autograd.grad(out, [*inputs, *learned], cotangent)

        begin, sample = time.perf_counter(), []
        for x in start(0):
            places = tuple(torch.from_numpy(place).to(device) for place in _places(x.shape))
            sample.append(x.detach()[places].float().tolist())
        compile_seconds = time.perf_counter() - begin
        return Run(start, lambda _: None if rehearse else torch.cuda.synchronize(), sample, compile_seconds)

    return _each_pass(make)


def sdpa_attention(job: Job, extra: Arrays, device: str) -> Callable[..., Any]:
    """SDPA as a function (query, key, value) -> out; PyTorch chooses among its kernels."""
    from torch.nn.functional import scaled_dot_product_attention

    if job.case not in ("full", "causal"):
        raise NotImplementedError("SDPA has masks and biases only as dense arrays")
    return functools.partial(
        scaled_dot_product_attention, is_causal=job.case == "causal", enable_gqa=job.heads != job.kv_heads
    )


def flex_attention(job: Job, extra: Arrays, device: str) -> Callable[..., Any]:
    """FlexAttention as a function (query, key, value) -> out. Its block mask is made here, before anything is timed."""
    import torch
    from torch.nn.attention import flex_attention as flex

    case = CASES[job.case]
    keep, change = case.keep, case.change
    compiled = (lambda function: function) if device == "cpu" else functools.partial(torch.compile, dynamic=False)
    options: dict[str, Any] = {"enable_gqa": job.heads != job.kv_heads}
    if keep is not None:

        def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
            return keep(b, h, q, kv, extra)

        # The compiled function makes no array of all pairs.
        make_mask = compiled(flex.create_block_mask)
        options["block_mask"] = make_mask(mask_mod, None, None, job.length, job.length, device=device)
    if change is not None:
        options["score_mod"] = lambda scores, b, h, q, kv: change(scores, b, h, q, kv, extra, torch)
    return functools.partial(compiled(flex.flex_attention), **options)


def prepare(side: str, job: Job, *, rehearse: bool) -> Runs:
    """The runs of a job on a side."""
    return (prepare_torch if side in ("sdpa", "flex") else prepare_jax)(side, job, rehearse=rehearse)


def about(side: str, *, rehearse: bool) -> Mapping[str, Any]:
    """The versions and the device of a side's process, or the `reason` why it cannot run."""
    if side in ("sdpa", "flex"):
        try:
            import torch
        except ImportError:
            return {"reason": "torch is not installed"}
        if not (rehearse or torch.cuda.is_available()):
            return {"reason": "torch sees no GPU"}
        return {"torch": torch.__version__, "torch CUDA": torch.version.cuda}
    import jax

    [device, *_] = jax.devices()
    if not rehearse and device.platform != "gpu":
        return {"reason": f"JAX computes on {device.platform}"}
    cuda = device.client.platform_version.splitlines()[-1]
    return {"device": device.device_kind, "jax": jax.__version__, "jax platform": cuda}

"""cuDNN's attention without a GPU: the reasons against it, and the programs for a GPU that hold it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _lowered import gpu_mesh
from jax import export
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnax import flash_attention, masks, pallas_flash_attention, why_not_cudnn
from attnax.kernels import _engines
from attnax.kernels._gpu import cudnn as engine

PLAIN = {"none": None, "causal": masks.causal(), "window": masks.sliding_window(32)}


@pytest.fixture
def another_machine():
    """A machine of which nothing is known: the cached answer is asked for again, in the test and after it."""
    engine.why_not_cudnn_here.cache_clear()
    yield
    engine.why_not_cudnn_here.cache_clear()


@pytest.fixture
def cudnn(another_machine, monkeypatch):
    """JAX with a cuDNN whose version it can read, as the CUDA plugin brings it."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.fixture
def gpu(cudnn, monkeypatch):
    monkeypatch.setattr(_engines, "has_nvidia_gpu", lambda: True)


def arrays(dtype=jnp.bfloat16, rows=2, sharding=None):
    """Shapes of query, key and value. Traces are cached, so each state of the machine has its own number of rows."""
    return [jax.ShapeDtypeStruct((rows, heads, 128, 64), dtype, sharding=sharding) for heads in (4, 2, 2)]


def gradient(attend):
    return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))


def lowered(function, *arguments, platform="cuda", mesh=None):
    with jax.sharding.use_abstract_mesh(mesh or gpu_mesh()):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def kernels_in(text):
    return set(re.findall(r"attnax_(?:forward|d_\w+)|__cudnn\$\w+|CustomSPMDPartitioning", text))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score_mod": lambda s, b, h, q, kv: s}, "score mod"),
        ({"dropout_rate": 0.1, "deterministic": False, "dropout_rng": jax.random.key(0)}, "drops"),
        ({"return_lse": True}, "log-sum-exp"),
        ({"dtype": jnp.float32}, "float16 and bfloat16"),
        ({"shape": (1, 2, 128, 20)}, "head sizes"),
        ({"shape": (1, 2, 128, 256)}, "head sizes"),
        ({"shape": (1, 2, 127, 64)}, "even lengths"),
        ({"shape": (1, 2, 0, 64)}, "even lengths"),
        ({"shape": (1, 2, 192, 64), "mask": masks.causal()}, "64 beyond a multiple of 128"),
        ({"mask": masks.padding(np.array([5]))}, "rows empty"),
        ({"mask": masks.sliding_window(5, causal=False)}, "rows empty"),
        ({"mask": masks.causal()}, "no NVIDIA GPU"),
        ({"dropout_rate": 0.1}, "no NVIDIA GPU"),  # deterministic, so there is no dropout
        ({"mask": masks.sliding_window(32)}, "no NVIDIA GPU"),
        ({"scale": np.float32(0.3)}, "no NVIDIA GPU"),
        ({}, "no NVIDIA GPU"),
        ({"platform": "cuda"}, "cannot use cuDNN here: cuDNN is not detected"),
        ({"platform": "cuda", "score_mod": lambda s, b, h, q, kv: s}, "score mod"),
    ],
)
def test_reasons(change, words):
    change = dict(change)
    x = np.ones(change.pop("shape", (1, 2, 128, 64)), change.pop("dtype", jnp.bfloat16))
    assert words in why_not_cudnn(x, x, x, **change)


def test_an_unknown_scale_is_a_reason():
    x = jnp.ones((1, 2, 128, 64), jnp.bfloat16)
    reasons = []
    jax.eval_shape(lambda scale: reasons.append(why_not_cudnn(x, x, x, scale=scale)), 0.5)
    assert "known scale" in reasons[0]


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("mask", PLAIN)
def test_for_another_platform_the_machine_does_not_count(mask):
    x = jnp.ones((1, 2, 128, 64), jnp.bfloat16)
    assert why_not_cudnn(x, x, x, mask=PLAIN[mask], platform="cuda") is None
    assert "no NVIDIA GPU" in why_not_cudnn(x, x, x, mask=PLAIN[mask])


def test_an_old_gpu_is_a_reason(another_machine, monkeypatch):
    x = jnp.ones((1, 2, 128, 64), jnp.bfloat16)
    monkeypatch.setattr(engine, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(jax, "devices", lambda: [type("T4", (), {"compute_capability": "7.5"})])
    assert "compute capability 8.0" in why_not_cudnn(x, x, x, platform="cuda")


def test_without_cudnn_the_kernels_are_in_programs_for_a_gpu():
    run = gradient(partial(flash_attention, mask=masks.causal()))
    assert kernels_in(lowered(run, *arrays(rows=3))) == {"attnax_forward", "attnax_d_query", "attnax_d_key_value"}


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("mask", PLAIN)
def test_with_cudnn_it_is_in_programs_for_a_gpu(mask):
    attend = partial(flash_attention, mask=PLAIN[mask])
    assert kernels_in(lowered(attend, *arrays())) == {"__cudnn$fmhaSoftmax"}
    both = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert kernels_in(lowered(gradient(attend), *arrays())) == both
    assert kernels_in(lowered(gradient(attend), *arrays(), platform="cpu")) == set()


@pytest.mark.usefixtures("cudnn")
def test_one_export_holds_tiles_for_a_cpu_and_cudnn_for_a_gpu():
    query, key, value = (jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in arrays())
    run = jax.jit(gradient(partial(flash_attention, mask=masks.causal())))
    calls = [export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{which}") for which in ("", "Backward")]
    with jax.sharding.use_abstract_mesh(gpu_mesh()):
        both = export.export(run, platforms=("cpu", "cuda"), disabled_checks=calls)(query, key, value)
    assert kernels_in(both.mlir_module()) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    for x, y in zip(both.call(query, key, value), run(query, key, value), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("cudnn")
def test_the_kernels_serve_calls_that_cudnn_does_not():
    for attend, dtype in (
        (partial(flash_attention, scale=jnp.float32(2.0), mask=masks.causal()), jnp.float32),
        (partial(flash_attention, score_mod=lambda s, b, h, q, kv: s * 2), jnp.bfloat16),
        (partial(pallas_flash_attention, mask=masks.causal()), jnp.bfloat16),
        (lambda *x: flash_attention(*x, return_lse=True)[0], jnp.bfloat16),
    ):
        assert kernels_in(lowered(attend, *arrays(dtype))) == {"attnax_forward"}
    assert kernels_in(lowered(partial(flash_attention, block_size=64), *arrays())) == set()


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("how", ["vmap", "scan", "remat", "shard_map", "explicit mesh", "jvp"])
def test_cudnn_is_taken_inside_every_transformation(how):
    attend = partial(flash_attention, mask=masks.causal())
    run, given, mesh = gradient(attend), arrays(), gpu_mesh()
    if how == "vmap":
        run, given = jax.vmap(run), [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in given]
    elif how == "scan":
        run = gradient(lambda q, k, v: jax.lax.scan(lambda x, _: (attend(x, k, v), None), q, None, length=2)[0])
    elif how == "remat":
        run = gradient(jax.checkpoint(attend))
    elif how == "shard_map":
        run = gradient(jax.shard_map(attend, mesh=mesh, in_specs=P("gpus"), out_specs=P("gpus")))
    elif how == "explicit mesh":
        mesh = gpu_mesh(2, AxisType.Explicit)
        given = arrays(sharding=NamedSharding(mesh, P("gpus")))
    else:  # its tangents are computed in tiles
        inner = run
        run = lambda *x: jax.jvp(inner, x, x)
    both = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert kernels_in(lowered(run, *given, mesh=mesh)) == (set() if how == "jvp" else both)


@pytest.mark.usefixtures("gpu")
def test_over_several_gpus_jax_cuts_it_by_rows_and_heads():
    mesh = Mesh(np.array(jax.devices()[:2]), ("gpus",))
    run = gradient(partial(flash_attention, mask=masks.causal()))
    given = arrays(rows=4, sharding=NamedSharding(mesh, P("gpus")))
    assert kernels_in(lowered(run, *given)) == {"CustomSPMDPartitioning"}
    mapped = jax.vmap(run, in_axes=(0, None, None), axis_size=3)
    stacked = jax.ShapeDtypeStruct((3, *given[0].shape), given[0].dtype)
    assert kernels_in(lowered(mapped, stacked, *given[1:])) == {"CustomSPMDPartitioning"}


@pytest.mark.usefixtures("cudnn")
def test_over_several_gpus_that_are_elsewhere_the_kernels_run():
    mesh = Mesh(np.array(jax.devices()[:2]), ("gpus",))
    attend = partial(flash_attention, mask=masks.causal())
    text = lowered(attend, *arrays(sharding=NamedSharding(mesh, P("gpus"))))
    assert kernels_in(text) == {"attnax_forward"}
    mesh = AbstractMesh((2, 2), ("gpus", "more"), (AxisType.Auto,) * 2, abstract_device=gpu_mesh().abstract_device)
    some = jax.shard_map(attend, mesh=mesh, in_specs=P("gpus"), out_specs=P("gpus"), axis_names={"gpus"})
    assert kernels_in(lowered(some, *arrays(), mesh=mesh)) == {"attnax_forward"}


@pytest.mark.usefixtures("cudnn")
def test_the_backward_pass_computes_nothing_of_the_forward_pass_again():
    query, key, value = arrays()
    lse = jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
    call = engine.Cudnn(0.125, True, None)
    run = lambda *x: engine.cudnn_backward(*x[:3], call, *x[3:])
    (custom_vmap,) = jax.make_jaxpr(run)(query, key, value, query, lse, query).eqns
    traced = custom_vmap.params["call"]
    used, _ = dce_jaxpr(getattr(traced, "jaxpr", traced), [True] * 3)
    names = [str(equation.primitive) for equation in used.eqns]
    assert sum("attention_bwd" in name for name in names) == 1
    assert not any("attention_fwd" in name for name in names)

"""What Attnax and other libraries have, by trying: the table of docs/compare/index.md.

    make bench-compare                        # installs the libraries first
    python benchmarks/compare.py              # prints the table
    python benchmarks/compare.py --side flax  # one library in this environment, as JSON

A library is tried on a CPU in a process of its own, by the function here that has its name. A cell is what it found:
"no" is a call that was refused, a result that is wrong, or a package whose files do not hold the name. A missing name
is looked for, so that a release which adds it ends this program. Cells of `READ` were not tried; the table links the
page that says them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _pages import markdown_table, show, write_section
from _pairs import side_command

Cells = dict[str, str]

DEVICES = 8  # of JAX, all on this CPU
LENGTH, LONG, WINDOW = 128, 4096, 256
NOT = "—"  # the library has no such part

ROWS = {
    "mask": "a mask",
    "score": "a function of each score",
    "own": "an attention function of your own in its layers",
    "skip": f"a window of {WINDOW} at {LONG} tokens takes less than half of the time",
    "backward": "gradients on a CPU",
    "captured": "gradients of arrays in a mask or score function",
    "empty": "a query that may attend nothing",
    "nan": "NaN behind a mask",
    "grouped": "query heads share key heads",
    "dropout": "dropout of attention weights",
    "sequence": "one sequence over several devices",
    "gpu": "its GPU kernels ran on a GPU",
    "tpu": "its TPU kernels ran on a TPU",
    "cache": "generation with a cache of keys and values",
    "paged": "paged cache",
    "int8": "keys and values in 8 bits",
    "draft": "speculative decoding",
    "beam": "beam search",
    "scheduler": "a queue of requests in one batch",
    "server": "server",
    "seq2seq": "encoder-decoder",
    "vision": "vision transformer",
    "experts": "mixture of experts",
    "published": "published checkpoints",
    "lora": "LoRA",
    "quantised": "quantised weights",
    "loop": "training loop",
    "resume": "a resumed training ends with the same bits",
    "layouts": "a model over several devices",
    "scale": "trained on many accelerators",
}
# The names of libraries with the packages whose versions the table names, and whether PyTorch's environment holds them.
PEERS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "attnax": ("Attnax", ("jax",), False),
    "flex": ("FlexAttention", ("torch",), True),
    "x_transformers": ("x-transformers", ("x-transformers",), True),
    "transformers": ("transformers", ("transformers", "accelerate", "peft"), True),
    "flax": ("Flax NNX", ("flax",), False),
    "equinox": ("Equinox", ("equinox",), False),
}
MAXTEXT = "MaxText"
_MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main/"
_CONFIG = _MAXTEXT + "src/maxtext/configs/base.yml"
_ATTENTION = _MAXTEXT + "src/maxtext/layers/attention_op.py"
_FACE = "https://huggingface.co/docs/transformers/"
_FLEX = "https://pytorch.org/blog/flexattention/"
# (library, row): what its page says, and the page. MaxText is not installed: it needs Python 3.12 and packages for a
# TPU or GPU. Its cells were read in the files of its wheel 0.2.5, which the links show as they are today.
READ = {
    ("attnax", "gpu"): ("no", "../understand/accelerators.md"),
    ("attnax", "tpu"): ("no", "../understand/accelerators.md"),
    ("attnax", "scheduler"): ("a loop to copy", "../guides/generation.md#many-requests-in-one-pool"),
    ("attnax", "scale"): ("no: compiled only", "../guides/devices.md"),
    ("flex", "captured"): ("yes, on a GPU", _FLEX),
    ("flex", "gpu"): ("yes", _FLEX),
    ("transformers", "gpu"): ("yes, others' kernels", _FACE + "attention_interface"),
    ("transformers", "server"): ("yes", _FACE + "serving"),
    ("transformers", "layouts"): ("yes", _FACE + "perf_infer_gpu_multi"),
    ("maxtext", "mask"): ("causal, windows, chunks", _CONFIG),
    ("maxtext", "score"): ("soft cap, sinks", _ATTENTION),
    ("maxtext", "own"): ("no", _ATTENTION),
    ("maxtext", "skip"): ("yes", _MAXTEXT + "src/maxtext/kernels/attention/splash_attention_kernel.py"),
    ("maxtext", "grouped"): ("yes", _CONFIG),
    ("maxtext", "dropout"): ("on a GPU", _ATTENTION),
    ("maxtext", "sequence"): ("yes", _MAXTEXT + "src/maxtext/kernels/attention/tokamax_ring_attention.py"),
    ("maxtext", "gpu"): ("yes, cuDNN", _CONFIG),
    ("maxtext", "tpu"): ("yes", _MAXTEXT + "README.md"),
    ("maxtext", "cache"): ("yes", _MAXTEXT + "src/maxtext/inference/kvcache.py"),
    ("maxtext", "paged"): ("through vLLM", _MAXTEXT + "src/maxtext/layers/attentions.py"),
    ("maxtext", "int8"): ("yes", _MAXTEXT + "src/maxtext/inference/kvcache.py"),
    ("maxtext", "draft"): ("no", _CONFIG),
    ("maxtext", "beam"): ("no", _CONFIG),
    ("maxtext", "scheduler"): ("yes", _MAXTEXT + "src/maxtext/inference/offline_engine.py"),
    ("maxtext", "server"): ("through vLLM", _MAXTEXT + "src/maxtext/inference/vllm_decode.py"),
    ("maxtext", "seq2seq"): ("no", _CONFIG),
    ("maxtext", "vision"): ("in multimodal models", _MAXTEXT + "README.md"),
    ("maxtext", "experts"): ("yes", _CONFIG),
    ("maxtext", "published"): (
        "those of its list",
        _MAXTEXT + "src/maxtext/checkpoint_conversion/utils/hf_model_configs.py",
    ),
    ("maxtext", "lora"): ("yes", _CONFIG),
    ("maxtext", "quantised"): ("yes", _CONFIG),
    ("maxtext", "loop"): ("yes", _MAXTEXT + "README.md"),
    ("maxtext", "layouts"): ("yes", _CONFIG),
    ("maxtext", "scale"): ("yes", _MAXTEXT + "README.md"),
}


def yes(holds: Any) -> str:
    return "yes" if bool(holds) else "no"


def absent(package: str, pattern: str) -> str:
    """Looks for a name, and returns "no" if no Python file of an installed package holds the pattern.

    Raises:
        LookupError: a file holds it, so the cell must be tried.
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).rglob("*.py")):
            if found := re.search(pattern, path.read_text(errors="replace")):
                raise LookupError(f"{path} has {found[0]!r}: try it, and write what it does in place of absent().")
    return "no"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What libraries print goes to the other stream: this one is for the answer."""
    with contextlib.redirect_stdout(importlib.import_module("sys").stderr):
        yield


def seconds(work: Callable[[], Any]) -> float:
    """The least of three calls after one that compiles."""
    work()
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def inputs(heads: int = 2, key_heads: int = 2, length: int = LENGTH, features: int = 16) -> tuple[Any, Any, Any]:
    """Queries, keys and values (1, heads, length, features), float32."""
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((1, n, length, features), np.float32) for n in (heads, key_heads, key_heads)
    )
    return query, key, value


def definition(
    query: Any, key: Any, value: Any, allowed: Any, change: Callable[[Any], Any] = lambda scores: scores
) -> Any:
    """Attention in float64; `allowed` (length, length), and a change of the scores."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    scores = np.where(allowed, change(query @ np.swapaxes(key, -1, -2) / np.sqrt(query.shape[-1])), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


def close(got: Any, want: Any) -> bool:
    return bool(np.allclose(np.asarray(got), want, atol=1e-4))


ROW, COLUMN = np.arange(LENGTH)[:, None], np.arange(LENGTH)
ALLOWED = (COLUMN <= ROW) & (COLUMN % 3 != 1)  # no common shape
EMPTY = np.ones((LENGTH, LENGTH), bool)
EMPTY[3] = False  # query 3 may attend nothing
HIDDEN = np.ones((LENGTH, LENGTH), bool)
HIDDEN[:, 5] = False  # nothing may attend key 5


def counting(run: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """The function, which also writes down each of its calls."""

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return run(*arguments, **options)

    return counted


def near_mask() -> Any:
    """The causal window of `WINDOW` tokens as an array (LONG, LONG)."""
    column, row = np.arange(LONG), np.arange(LONG)[:, None]
    return (column <= row) & (row - column < WINDOW)


def of_empty(row: Any, value: Any) -> str:
    """What a query without keys gives, from its row (heads, features) and all values (1, heads, length, features)."""
    if not np.any(np.asarray(row)):
        return "0"
    return "the mean of all values" if close(row, value[0].mean(-2)) else "NaN" if np.isnan(row).all() else "other"


def of_nan(out: Any) -> str:
    return "spreads" if np.isnan(np.asarray(out)).any() else "stays there"


def with_nan(x: Any) -> Any:
    """x (1, heads, length, features) with NaN at token 5."""
    x = x.copy()
    x[:, :, 5] = np.nan
    return x


def attnax() -> Cells:
    return attnax_attention() | attnax_models() | attnax_training()


def attnax_config() -> Any:
    """A small language model with the shape of Llama."""
    from attnax import TransformerConfig

    sizes: dict[str, Any] = {"vocab_size": 19, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2}
    kind: dict[str, Any] = {"pos_emb_type": "rope", "norm_type": "rms", "ff_activation": "swiglu", "use_bias": False}
    return TransformerConfig(**sizes, **kind, d_ff=32, max_len=32)


def attnax_attention() -> Cells:
    import jax
    import jax.numpy as jnp

    from attnax import flash_attention, masks, ring_attention

    query, key, value = inputs()
    every_third = lambda b, h, q, kv: (kv <= q) & (kv % 3 != 1)  # noqa: E731
    out = flash_attention(query, key, value, mask=every_third)
    capped = flash_attention(query, key, value, mask=every_third, score_mod=lambda s, b, h, q, kv: 2 * jnp.tanh(s / 2))
    sloped = lambda w: flash_attention(query, key, value, score_mod=lambda s, b, h, q, kv: s + w[h] * kv)  # noqa: E731
    long = inputs(1, 1, LONG, 64)

    def time_of(mask: Any) -> float:
        run = jax.jit(lambda *x: flash_attention(*x, mask=mask))
        return seconds(lambda: jax.block_until_ready(run(*long)))

    hidden = flash_attention(query, with_nan(key), with_nan(value), mask=HIDDEN)
    dropped = flash_attention(query, key, value, dropout_rng=jax.random.key(0), dropout_rate=0.5, deterministic=False)
    ring = jax.jit(
        jax.shard_map(
            lambda *x: ring_attention(*x, axis_name="d", mask=masks.causal()),
            mesh=jax.make_mesh((DEVICES,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=jax.P(None, None, "d"),
            out_specs=jax.P(None, None, "d"),
        )
    )
    return {
        "mask": "a function, an array" if close(out, definition(query, key, value, ALLOWED)) else "no",
        "score": yes(close(capped, definition(query, key, value, ALLOWED, lambda s: 2 * np.tanh(s / 2)))),
        "skip": yes(time_of(masks.sliding_window(WINDOW, causal=True)) < time_of(None) / 2),
        "backward": yes(np.isfinite(jax.grad(lambda q: flash_attention(q, key, value).sum())(query)).all()),
        "captured": yes(np.any(jax.grad(lambda w: sloped(w).sum())(jnp.ones(2)))),
        "empty": of_empty(flash_attention(query, key, value, mask=EMPTY)[0, :, 3], value),
        "nan": of_nan(hidden),
        "grouped": yes(flash_attention(*inputs(4, 2)).shape == (1, 4, LENGTH, 16)),
        "dropout": yes(not close(dropped, definition(query, key, value, np.True_))),
        "sequence": yes(close(ring(query, key, value), definition(query, key, value, COLUMN <= ROW))),
    }


def attnax_models() -> Cells:
    import jax.numpy as jnp
    from flax import nnx

    import attnax as library
    from attnax.pretrained import CheckpointError, load_pretrained, save_pretrained
    from attnax.pretrained.families import FAMILIES

    config = attnax_config()
    model = library.TransformerLM(nnx.Rngs(0), config)
    new: dict[str, Any] = {"max_new_tokens": 6}
    prompts = jnp.arange(10).reshape(2, 5) % 19
    text = model.generate(prompts, **new).tokens
    whole = [model.run(jnp.concatenate([prompts, text[:, :n]], 1)).logits[:, -1].argmax(-1) for n in range(6)]
    same = lambda **how: bool((model.generate(prompts, **new, **how).tokens == text).all())  # noqa: E731
    own = library.TransformerLM(nnx.Rngs(0), config, attention_fn=library.standard_attention)
    moe = library.MixtureOfExperts(nnx.Rngs(0), d_model=16, d_ff=32, num_experts=4, top_k=2)
    pair = library.Transformer(nnx.Rngs(0), encoder=config, decoder=config)
    image = library.VisionTransformer(nnx.Rngs(0), image_size=8, patch_size=4, num_classes=3, d_model=16, num_heads=2)
    cells = {
        "own": yes(close(own(prompts), model(prompts))),
        "cache": yes((text == jnp.stack(whole, 1)).all()),
        "paged": yes(same(cache="paged")),
        "int8": yes(model.generate(prompts, **new, cache_dtype="int8").tokens.shape == text.shape),
        "draft": yes(same(draft=model, num_draft_tokens=2)),
        "beam": yes(model.beam_search(prompts, **new, num_beams=3).tokens.shape == (2, 3, 6)),
        "server": absent("attnax", r"http\.server|socketserver|fastapi|uvicorn|aiohttp"),
        "seq2seq": yes(
            pair.generate(prompts, max_length=4, start_token=1, sampler=library.Sampler()).tokens.shape == (2, 4)
        ),
        "vision": yes(image(jnp.zeros((2, 8, 8, 3))).shape == (2, 3)),
        "experts": yes(moe(jnp.ones((2, 5, 16)))[0].shape == (2, 5, 16)),
        "published": f"{len({family.model_type for family in FAMILIES})} model types",
    }

    def refused(folder: Path, name: str, text: dict[str, Any]) -> str:
        """Returns "no" if the folder is refused because of the file that is written into it."""
        (folder / name).write_text(json.dumps(text))
        try:
            load_pretrained(str(folder))
        except CheckpointError:
            return "no"
        raise LookupError(f"attnax reads a folder with {name}: try what it does.")

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_pretrained(model, str(folder / "model"))
        described = json.loads((folder / "model/config.json").read_text())
        (folder / "adapter").mkdir()
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "model"}
        cells["lora"] = refused(folder / "adapter", "adapter_config.json", adapter)
        quantised = described | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        cells["quantised"] = refused(folder / "model", "config.json", quantised)
    return cells


def attnax_training() -> Cells:
    import jax

    from attnax import Layout
    from attnax.training import Checkpoints, OptimizerConfig, Trainer, causal_lm

    config = attnax_config()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        trainer = Trainer(config, causal_lm(), OptimizerConfig(steps=6), seed=0)
        batch = {"tokens": (np.arange(2 * 4 * 9).reshape(2, 4, 9)) % 19}
        state = trainer.init()
        losses = []
        with Checkpoints(folder / "run") as checkpoints:
            for update in range(1, 7):
                state, metrics = trainer.step(state, batch)
                losses.append(float(metrics.loss))
                if update == 3:
                    checkpoints.save(update, {"state": state})
        again = Trainer(config, causal_lm(), OptimizerConfig(steps=6), seed=0)
        with Checkpoints(folder / "run") as checkpoints:
            restored = checkpoints.restore({"state": again.init()})
        assert restored is not None
        resumed = restored[1]["state"]
        for _ in range(3):
            resumed, _ = again.step(resumed, batch)
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), state.params, resumed.params)
    cut = Trainer(config, causal_lm(), OptimizerConfig(steps=6), seed=0, layout=Layout.parse("fsdp=4,tensor=2"))
    spread, metrics = cut.step(cut.init(), batch)
    places = {len(x.sharding.device_set) for x in jax.tree.leaves(spread.params)}
    return {
        "loop": yes(losses[-1] < losses[0]),
        "resume": yes(all(jax.tree.leaves(equal))),
        "layouts": yes(places == {DEVICES} and close(metrics.loss, losses[0])),
    }


def flex() -> Cells:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = (torch.from_numpy(x) for x in inputs())
    blocks = lambda mask, length=LENGTH: create_block_mask(mask, None, None, length, length, device="cpu")  # noqa: E731
    every_third = blocks(lambda b, h, q, kv: (kv <= q) & (kv % 3 != 1))
    out = flex_attention(query, key, value, block_mask=every_third)
    capped = flex_attention(
        query, key, value, block_mask=every_third, score_mod=lambda s, b, h, q, kv: 2 * torch.tanh(s / 2)
    )
    try:
        flex_attention(query.clone().requires_grad_(), key, value).sum().backward()
        backward = "yes"
    except NotImplementedError:
        backward = "refused"
    compiled = torch.compile(flex_attention)
    long = [torch.from_numpy(x) for x in inputs(1, 1, LONG, 64)]
    window = blocks(lambda b, h, q, kv: (kv <= q) & (q - kv < WINDOW), LONG)
    faster = seconds(lambda: compiled(*long, block_mask=window)) < seconds(lambda: compiled(*long)) / 2
    empty = flex_attention(query, key, value, block_mask=blocks(lambda b, h, q, kv: q != 3))
    hidden = blocks(lambda b, h, q, kv: kv != 5)
    nan = [torch.from_numpy(with_nan(x.numpy())) for x in (key, value)]
    grouped = flex_attention(*(torch.from_numpy(x) for x in inputs(4, 2)), enable_gqa=True)
    parameters = importlib.import_module("inspect").signature(flex_attention).parameters
    try:
        flex_attention(query.to("meta"), key.to("meta"), value.to("meta"))
        tpu = NOT
    except ValueError as error:  # "only supported on ...", a list of devices
        tpu = "no" if "TPU" not in str(error) and "XLA" not in str(error) else NOT
    return {
        "mask": "a function" if close(out, definition(*inputs(), ALLOWED)) else "no",
        "score": yes(close(capped, definition(*inputs(), ALLOWED, lambda s: 2 * np.tanh(s / 2)))),
        "own": NOT,
        "skip": yes(faster),
        "backward": backward,
        "empty": of_empty(empty[0, :, 3].numpy(), value.numpy()),
        "nan": of_nan(flex_attention(query, *nan, block_mask=hidden)),
        "grouped": yes(grouped.shape == (1, 4, LENGTH, 16)),
        "dropout": yes(any("dropout" in name for name in parameters)),
        "sequence": yes(any("axis" in name or "mesh" in name or "group" in name for name in parameters)),
        "tpu": tpu,
    }


def x_transformers() -> Cells:
    import torch

    library: Any = importlib.import_module("x_transformers")
    layers: Any = importlib.import_module("x_transformers.x_transformers")
    attend: Any = importlib.import_module("x_transformers.attend")
    torch.manual_seed(0)
    query, key, value = (torch.from_numpy(x) for x in inputs())
    plain = attend.Attend(heads=2)

    def call(mask: Any, *x: Any, run: Any = plain, **options: Any) -> Any:
        mask = torch.from_numpy(mask)[None, None]  # one of two axes is padding of keys
        return run(*(x or (query, key, value)), mask=mask, **options)[0].detach()

    bias = torch.zeros(2, LENGTH, LENGTH, requires_grad=True)
    plain(query, key, value, attn_bias=bias)[0].sum().backward()
    nan = [torch.from_numpy(with_nan(x.numpy())) for x in (key, value)]
    rows = torch.randn(1, LONG, 64)
    near = near_mask()
    layer = layers.Attention(dim=64, heads=1, flash=True)
    with torch.no_grad():
        window = seconds(lambda: layer(rows, attn_mask=torch.from_numpy(near)))
        every = seconds(lambda: layer(rows))
    dropping = attend.Attend(heads=2, dropout=0.5).train()
    capped = attend.Attend(heads=2, softclamp_logits=True, logit_softclamp_value=2.0)
    called: list[int] = []
    own = attend.Attend(heads=2, custom_attn_fn=counting(lambda scores: scores.softmax(-1), called))
    call(ALLOWED, run=own)
    inner = library.Decoder(dim=32, depth=2, heads=4, rotary_pos_emb=True, attn_kv_heads=2)
    model = library.TransformerWrapper(num_tokens=20, max_seq_len=64, attn_layers=inner)
    writer = library.AutoregressiveWrapper(model)
    ids = torch.randint(0, 20, (2, 6))
    texts = [writer.generate(ids, 8, temperature=0.0, cache_kv=cached) for cached in (True, False)]
    pair = library.XTransformer(
        dim=32,
        enc_num_tokens=20,
        enc_depth=1,
        enc_heads=2,
        enc_max_seq_len=32,
        dec_num_tokens=20,
        dec_depth=1,
        dec_heads=2,
        dec_max_seq_len=32,
    )
    encoder = library.Encoder(dim=32, depth=1, heads=2)
    image = library.ViTransformerWrapper(image_size=16, patch_size=4, num_classes=3, attn_layers=encoder)
    return {
        "mask": "an array" if close(call(ALLOWED), definition(*inputs(), ALLOWED)) else "no",
        "score": "a bias array, a soft cap"
        if close(call(ALLOWED, run=capped), definition(*inputs(), ALLOWED, lambda s: 2 * np.tanh(s / 2)))
        else "no",
        "own": "its softmax only" if called else "no",
        "skip": yes(window < every / 2),
        "backward": yes(bias.grad is not None),
        "captured": "of a bias" if bias.grad is not None and bool(bias.grad.any()) else "no",
        "empty": of_empty(call(EMPTY)[0, :, 3].numpy(), value.numpy()),
        "nan": of_nan(call(HIDDEN, query, *nan)),
        "grouped": yes(texts[0].shape == (2, 8)),
        "dropout": yes(not close(call(EMPTY | True, run=dropping), definition(*inputs(), np.True_))),
        "sequence": absent("x_transformers", r"torch\.distributed|ring_attn|DTensor"),
        "gpu": NOT,
        "tpu": NOT,
        "cache": yes((texts[0] == texts[1]).all()),
        "paged": absent("x_transformers", r"[Pp]aged"),
        "int8": absent("x_transformers", r"int8|[Qq]uantiz"),
        "draft": absent("x_transformers", r"draft|assistant|def speculative|class Speculative"),
        "beam": yes(writer.beam_search(ids, 8, beams=3).shape == (2, 8)),
        "scheduler": absent("x_transformers", r"continuous_batch|[Ss]cheduler"),
        "server": absent("x_transformers", r"http\.server|fastapi|uvicorn"),
        "seq2seq": yes(pair.generate(ids, torch.zeros(2, 1, dtype=torch.long), 5).shape == (2, 5)),
        "vision": yes(image(torch.randn(2, 3, 16, 16)).shape == (2, 3)),
        "experts": absent("x_transformers", r"class \w*(MoE|Experts?)\b|num_experts"),
        "published": absent("x_transformers", r"from_pretrained|safetensors"),
        "lora": absent("x_transformers", r"adapter|merge_lora|peft"),
        "quantised": absent("x_transformers", r"int8|[Qq]uantiz"),
        "loop": absent("x_transformers", r"class \w*Trainer"),
        "layouts": absent("x_transformers", r"torch\.distributed|FSDP|DTensor"),
    }


def transformers_attention() -> Cells:
    import torch

    sdpa: Any = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    query, key, value = (torch.from_numpy(x) for x in inputs())
    one = type("Layer", (), {"is_causal": False, "num_key_value_groups": 1, "training": False})()

    def call(mask: Any, *x: Any, **options: Any) -> Any:
        out = sdpa(one, *(x or (query, key, value)), torch.from_numpy(mask)[None, None], **options)[0]
        return out.transpose(1, 2).detach()

    nan = [torch.from_numpy(with_nan(x.numpy())) for x in (key, value)]
    long = [torch.from_numpy(x) for x in inputs(1, 1, LONG, 64)]
    near = near_mask()
    with torch.no_grad():
        faster = seconds(lambda: call(near, *long)) < seconds(lambda: call(np.ones_like(near), *long)) / 2
    bias = torch.zeros(1, 2, LENGTH, LENGTH, requires_grad=True)
    sdpa(one, query, key, value, bias)[0].sum().backward()
    capping: Any = importlib.import_module("transformers.models.gemma2.modeling_gemma2").eager_attention_forward
    every = torch.from_numpy(np.where(ALLOWED, np.float32(0), -np.inf))[None, None]
    capped = capping(one, query, key, value, every, scaling=16**-0.5, softcap=2.0)[0].transpose(1, 2)
    return {
        "mask": "an array" if close(call(ALLOWED), definition(*inputs(), ALLOWED)) else "no",
        "score": "a bias array, a soft cap"
        if close(capped, definition(*inputs(), ALLOWED, lambda s: 2 * np.tanh(s / 2)))
        else "no",
        "skip": yes(faster),
        "captured": "of a bias" if bias.grad is not None and bool(bias.grad.any()) else "no",
        "empty": of_empty(call(EMPTY)[0, :, 3].numpy(), value.numpy()),
        "nan": of_nan(call(HIDDEN, query, *nan)),
        "dropout": yes(not close(call(EMPTY | True, dropout=0.5), definition(*inputs(), np.True_))),
    }


def transformers() -> Cells:
    import torch

    library: Any = importlib.import_module("transformers")
    sdpa: Any = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    auto: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    quantizers: Any = importlib.import_module("transformers.quantizers.auto")
    library.logging.set_verbosity_error()
    sizes = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = library.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.1,
        eos_token_id=None, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip

    def llama() -> Any:
        torch.manual_seed(0)
        return library.LlamaForCausalLM(config)

    model = llama().eval()
    layer = model.model.layers[0].self_attn
    ids, new = torch.arange(12).reshape(2, 6) + 1, {"max_new_tokens": 8, "do_sample": False}
    text = model.generate(ids, **new)
    same = lambda **how: bool((model.generate(ids, **new, **how) == text).all())  # noqa: E731
    whole = model.generate(ids, **new, use_cache=False)
    try:
        model.generate(ids, **new, cache_implementation="quantized")
        int8 = "yes"
    except ImportError:
        int8 = "with another package"
    draft = yes((model.generate(ids[:1], **new, assistant_model=llama().eval()) == text[:1]).all())
    try:
        model.generate(ids, **new, assistant_model=llama().eval())
    except ValueError:
        draft += ", one text"
    queue = model.generate_batch(
        inputs=ids.tolist(), generation_config=library.GenerationConfig(**new, eos_token_id=-1)
    )
    written = [answer.generated_tokens for answer in queue.values()]
    called: list[int] = []
    library.AttentionInterface.register("counted", counting(sdpa, called))
    model.set_attn_implementation("counted")
    model(ids)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        flexible = model(ids).logits
    model.set_attn_implementation("sdpa")
    assert close(flexible, model(ids).logits.detach())
    peft: Any = importlib.import_module("peft")
    adapter = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    small = [name for name, x in adapter.named_parameters() if x.requires_grad]
    model(ids, labels=ids).loss.backward()
    layers = {"num_layers": 1, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 30}
    pair = library.T5ForConditionalGeneration(library.T5Config(**layers, decoder_start_token_id=0))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    image = library.ViTForImageClassification(library.ViTConfig(**shape, image_size=8, patch_size=4, num_labels=3))
    moe = library.MixtralForCausalLM(
        library.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    )
    loop, resume = resumed_trainer(library, llama)
    return transformers_attention() | {
        "own": yes(called),
        "backward": yes(layer.q_proj.weight.grad is not None),
        "grouped": yes(config.num_key_value_heads == 2 and text.shape == (2, 14)),
        "tpu": NOT,
        "cache": yes((whole == text).all()),
        "paged": yes(same(cache_implementation="paged")),
        "int8": int8,
        "draft": draft,
        "beam": yes(model.generate(ids, **new, num_beams=3).shape == (2, 14)),
        "scheduler": yes(written == text[:, 6:].tolist()),
        "seq2seq": yes(pair.generate(ids, **new).shape[0] == 2),
        "vision": yes(image(torch.zeros(2, 3, 8, 8)).logits.shape == (2, 3)),
        "experts": yes(moe(ids).logits.shape == (2, 6, 30)),
        "published": f"{len(auto.CONFIG_MAPPING_NAMES)} model types",
        "lora": "with peft" if small and all("lora" in name for name in small) else "no",
        "quantised": f"{len(quantizers.AUTO_QUANTIZER_MAPPING)} methods",
        "loop": loop,
        "resume": resume,
    }


def resumed_trainer(library: Any, make: Callable[[], Any]) -> tuple[str, str]:
    """Whether transformers' Trainer trains, and whether going on from its checkpoint gives the same weights."""
    rows = [{"input_ids": [(row + n) % 30 for n in range(9)]} for row in range(24)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        options = library.TrainingArguments(
            folder, max_steps=6, save_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[], seed=0,
            disable_tqdm=True, learning_rate=1e-2, logging_steps=1,
        )  # fmt: skip
        trainers = [library.Trainer(make(), options, train_dataset=rows) for _ in range(2)]
        trainers[0].train()
        trainers[1].train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    losses = [line["loss"] for line in trainers[0].state.log_history if "loss" in line]
    ends = [dict(trainer.model.named_parameters()) for trainer in trainers]
    return yes(losses[-1] < losses[0]), yes(all(bool((x == ends[1][name]).all()) for name, x in ends[0].items()))


def flax() -> Cells:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    query, key, value = (np.swapaxes(x, 1, 2) for x in inputs())  # (1, length, heads, features)
    attend = nnx.dot_product_attention

    def call(mask: Any, *x: Any, **options: Any) -> Any:
        x = x or (query, key, value)
        out = attend(x[0], x[1], x[2], mask=jnp.asarray(mask)[None, None], **options)
        return np.swapaxes(np.asarray(out), 1, 2)

    nan = [np.swapaxes(with_nan(x), 1, 2) for x in inputs()[1:]]
    bias = jax.grad(lambda b: attend(query, key, value, bias=b).sum())(jnp.zeros((1, 2, LENGTH, LENGTH)))
    grouped = attend(*(np.swapaxes(x, 1, 2) for x in inputs(4, 2)))
    dropped = call(EMPTY | True, dropout_rate=0.5, dropout_rng=jax.random.key(0))
    called: list[int] = []
    own = nnx.MultiHeadAttention(
        2,
        8,
        decode=False,
        rngs=nnx.Rngs(0),
        attention_fn=counting(attend, called),
    )
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    want = own(x, mask=nnx.make_causal_mask(jnp.ones((2, 5))))
    one_by_one = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
    one_by_one.init_cache(x.shape)
    outs = [one_by_one(x[:, t : t + 1]) for t in range(5)]
    past_its_end = one_by_one(x[:, :1])
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    adapted = nnx.LoRA(8, 2, 8, base_module=layer, rngs=nnx.Rngs(0))
    small = nnx.state(adapted, nnx.LoRAParam)
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        cut = nnx.Linear(8, 8, kernel_init=nnx.with_partitioning(nnx.initializers.zeros, (None, "d")), rngs=nnx.Rngs(0))
    long = [np.swapaxes(x, 1, 2) for x in inputs(1, 1, LONG, 64)]
    missing = absent("flax", r"[Pp]aged|int8_|[Dd]raft_|beam_search|[Ss]peculat")
    cells = dict.fromkeys(("paged", "draft", "beam"), missing)
    no_model = dict.fromkeys(("scheduler", "server", "seq2seq", "vision", "published", "resume", "scale"), NOT)
    return cells | no_model | {
        "mask": "an array" if close(call(ALLOWED), definition(*inputs(), ALLOWED)) else "no",
        "score": "a bias array",
        "own": yes(called),
        "skip": window_is_faster(attend, long, near_mask()[None, None]),
        "backward": yes(np.isfinite(bias).all()),
        "captured": "of a bias" if np.any(bias) else "no",
        "empty": of_empty(call(EMPTY)[0, :, 3], inputs()[2]),
        "nan": of_nan(call(HIDDEN, query, *nan)),
        "grouped": yes(grouped.shape == (1, LENGTH, 4, 16)),
        "dropout": yes(not close(dropped, definition(*inputs(), np.True_))),
        "sequence": absent("flax", r"[Rr]ing_?[Aa]ttention"),
        "gpu": NOT,
        "tpu": NOT,
        "cache": ("a token a call" if close(jnp.concatenate(outs, 1), want) else "no")
        + ("" if np.isnan(past_its_end).any() else "; its end is not checked"),
        "int8": absent("flax.nnx", r"int8"),
        "experts": absent("flax", r"[Ee]xperts?\b"),
        "lora": yes(len(jax.tree.leaves(small)) == 2 and close(adapted(x), layer(x))),
        "quantised": absent("flax.nnx", r"int8|int4"),
        "loop": "an optimizer" if hasattr(nnx, "Optimizer") else "no",
        "layouts": "by axis names" if len(cut.kernel[...].sharding.device_set) == DEVICES else "no",
    }  # fmt: skip


def window_is_faster(attend: Callable[..., Any], long: Sequence[Any], near: Any) -> str:
    """Whether JAX's `attend(query, key, value, mask=)` takes less than half of the time with a mask."""
    import jax

    run = jax.jit(lambda q, k, v, mask: attend(q, k, v, mask=mask))

    def time_of(mask: Any) -> float:
        return seconds(lambda: jax.block_until_ready(run(*long, mask)))

    return yes(time_of(near) < time_of(None) / 2)


def equinox() -> Cells:
    import jax
    import jax.numpy as jnp

    eqx: Any = importlib.import_module("equinox")
    attend: Any = importlib.import_module("equinox.nn._attention").dot_product_attention  # the layer's own
    query, key, value = inputs()

    def call(mask: Any, *x: Any) -> Any:  # a head at a time
        x = x or (query, key, value)
        return np.stack([attend(*(part[0, head] for part in x), jnp.asarray(mask)) for head in range(2)])[None]

    layer = eqx.nn.MultiheadAttention(2, 8, dropout_p=0.5, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 8))
    grads = jax.grad(lambda x: layer(x, x, x, inference=True).sum())(x)
    dropped = [layer(x, x, x, key=jax.random.key(seed)) for seed in range(2)]
    options = importlib.import_module("inspect").signature(eqx.nn.MultiheadAttention.__init__).parameters
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = eqx.filter_shard(eqx.nn.Linear(8, 8, key=jax.random.key(0)), jax.NamedSharding(mesh, jax.P("d")))
    none = (
        "scheduler",
        "server",
        "seq2seq",
        "vision",
        "published",
        "resume",
        "scale",
        "paged",
        "int8",
        "draft",
        "beam",
    )
    return dict.fromkeys(none, NOT) | {
        "mask": "an array" if close(call(ALLOWED), definition(query, key, value, ALLOWED)) else "no",
        "score": yes(any("bias" in name and "use" not in name for name in options)),
        "own": yes(any("attention" in name for name in options)),
        "skip": window_is_faster(attend, [x[0, 0] for x in inputs(1, 1, LONG, 64)], near_mask()),
        "backward": yes(np.isfinite(grads).all()),
        "captured": NOT,
        "empty": of_empty(call(EMPTY)[0, :, 3], value),
        "nan": of_nan(call(HIDDEN, query, with_nan(key), with_nan(value))),
        "grouped": yes(any("kv_heads" in name for name in options)),
        "dropout": yes((dropped[0] != dropped[1]).any()),
        "sequence": absent("equinox", r"[Rr]ing_?[Aa]ttention"),
        "gpu": NOT,
        "tpu": NOT,
        "cache": absent("equinox", r"kv_cache|init_cache"),
        "experts": absent("equinox", r"[Ee]xperts?\b"),
        "lora": absent("equinox", r"[Ll]o[Rr][Aa]\b"),
        "quantised": absent("equinox", r"int8|int4|[Qq]uantiz"),
        "loop": absent("equinox", r"class \w*(Trainer|Optimizer)"),
        "layouts": "by hand" if len(cut.weight.sharding.device_set) == DEVICES else "no",
    }


SIDES: dict[str, Callable[[], Cells]] = {
    "attnax": attnax,
    "flex": flex,
    "x_transformers": x_transformers,
    "transformers": transformers,
    "flax": flax,
    "equinox": equinox,
}


def tried(name: str) -> dict[str, Any]:
    """The cells and versions that the process of a library prints."""
    _, _, torch = PEERS[name]
    devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = side_command(__file__, name, torch=torch)
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    answer = dict(json.loads(run.stdout.splitlines()[-1]))
    print(f"{name}: {answer['versions']}", flush=True)
    return answer


def table(answers: dict[str, dict[str, Any]], link: bool) -> list[list[str]]:
    """The header and the rows. A cell that was read is a link to its page, or has a star.

    Raises:
        ValueError: a cell was both tried and read, or a library knows no such row.
    """
    lines = [["", *(PEERS[name][0] for name in answers), MAXTEXT]]
    for name, answer in answers.items():
        twice = [row for row in answer["cells"] if row not in ROWS or (name, row) in READ]
        if twice:
            raise ValueError(f"{name}: a cell is one of ROWS, and tried or read; got {twice}.")
    for row, label in ROWS.items():
        cells = [label]
        for name in (*answers, "maxtext"):
            said, page = READ.get((name, row), (None, ""))
            if said is not None:
                cells.append(f"[{said}]({page})" if link else f"{said} *")
            else:
                cells.append(answers[name]["cells"].get(row, NOT) if name in answers else NOT)
        lines.append(cells)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="What Attnax and other libraries have, by trying.")
    parser.add_argument("--markdown", type=Path, help="the page with a place for the table")
    parser.add_argument("--side", choices=SIDES, help="try one library here, and print its cells as JSON")
    options = parser.parse_args()
    if options.side:
        with quiet():
            cells = SIDES[options.side]()
        versions = {package: version(package) for package in PEERS[options.side][1]}
        print(json.dumps({"cells": cells, "versions": versions}))
        return
    answers = {name: tried(name) for name in PEERS}
    show(table(answers, link=False))
    if options.markdown:
        numbers = [
            f"{package} {number}" for answer in answers.values() for package, number in answer["versions"].items()
        ]
        from attnax import __version__

        text = f"{datetime.date.today():%d %B %Y}, on a CPU: attnax {__version__}, {', '.join(numbers)}."
        write_section(options.markdown, "make bench-compare", f"{text}\n\n{markdown_table(table(answers, link=True))}")


if __name__ == "__main__":
    main()

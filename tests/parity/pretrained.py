"""Tiny checkpoints of Hugging Face transformers and what it computes with them, stored for tests/test_pretrained.py.

    python tests/parity/pretrained.py --check    # needs torch and transformers; `make parity` installs them
    python tests/parity/pretrained.py --write [NAME ...]

Each folder of tests/goldens/pretrained is a checkpoint as transformers writes it, and `outputs.npz`:

    ids, real           tokens (rows, length), and which are no padding; the first row has none
    outputs             logits or hidden states of the real tokens
    tokens, log_probs   of a language model: what it writes after each row at temperature 0, and its log-probabilities
    images              of a vision model, (rows, height, width, channels)
    positions_HxW       its table of positions for images of H times W pixels, if its own are square
    target_ids          of an encoder-decoder: tokens (rows, length), none of them padding, that `outputs` are of

and where `gradients` asks for it `gradients.safetensors`, the gradient of the mean of all outputs squared.

`--check` makes all of it anew, and also lets Attnax read each checkpoint and write it, and transformers read that, and
the checkpoint with keys that Attnax passes over. It compares what vision models of the published sizes make of images
of other sizes too.
Weights are NumPy's random numbers, so torch's may change without new files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from attnax.models import with_image_size
from attnax.pretrained import load_pretrained, save_pretrained
from attnax.pretrained.families import FAMILIES
from attnax.pretrained.inert import ANY_VALUE, HARMLESS_VALUES
from attnax.pretrained.inspect import inspect_folder

FOLDER = Path(__file__).parents[1] / "goldens" / "pretrained"
NEW_TOKENS = 7
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model.

    Attributes:
        architecture: a class of transformers.
        fields: of its config.
        options: of the class, beside the config.
        left_out: tensors that Attnax neither reads nor writes.
        norm_mean: of the norms' weights.
        untied: the head is not tied, although the config of transformers 5 cannot say so.
        gradients: whether they are stored too.
        shard_size: of the files, in transformers' words.
        dtype: of the tensors in the files.
    """

    architecture: str
    fields: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    norm_mean: float = 1.0
    untied: bool = False
    gradients: bool = False
    shard_size: str = "1GB"
    dtype: torch.dtype = torch.float32


DECODER = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 67,
    "pad_token_id": 3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 300.0,
    "factor": 3.0,
    "beta_fast": 5.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 19,
}
ENCODER = {
    "vocab_size": 61,
    "hidden_size": 30,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 23,
    "layer_norm_eps": 1e-2,
    "pad_token_id": 3,
}
DISTILBERT = {"vocab_size": 61, "dim": 30, "hidden_dim": 37, "n_layers": 2, "n_heads": 5, "max_position_embeddings": 23}
IMAGE = {
    "hidden_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": 9,
    "patch_size": 3,
    "num_channels": 2,
    "layer_norm_eps": 1e-2,
}
T5 = {
    "vocab_size": 61,
    "d_model": 30,
    "d_kv": 7,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 5,
    "relative_attention_num_buckets": 10,
    "relative_attention_max_distance": 11,
    "layer_norm_epsilon": 1e-2,
}
SIZES = (6, 6), (15, 15), (6, 21)
PUBLISHED_SIZES = {
    "ViTModel": {"image_size": 224, "patch_size": 16, "intermediate_size": 37},
    "Dinov2Model": {"image_size": 518, "patch_size": 14},
    "Dinov2WithRegistersModel": {"image_size": 518, "patch_size": 14},
}
MASK_TOKEN = ("embeddings.mask_token",)
CASES = {
    "llama2": Case("LlamaForCausalLM", DECODER | {"rms_norm_eps": 1e-2, "head_dim": 4}, gradients=True),
    "llama3": Case(
        "LlamaForCausalLM",
        DECODER
        | {"rope_parameters": LLAMA3_ROPE, "head_dim": 10, "attention_bias": True, "mlp_bias": True}
        | {"hidden_act": "gelu", "tie_word_embeddings": True},
        shard_size="20KB",
        dtype=torch.bfloat16,
    ),
    "llama_linear": Case(
        "LlamaForCausalLM",
        DECODER | {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5}},
    ),
    "llama_yarn": Case("LlamaForCausalLM", DECODER | {"rope_parameters": YARN_ROPE, "num_key_value_heads": 6}),
    "gpt2": Case(
        "GPT2LMHeadModel",
        {"vocab_size": 61, "n_positions": 67, "n_embd": 28, "n_layer": 2, "n_head": 7, "n_inner": 37}
        | {"layer_norm_epsilon": 1e-2, "pad_token_id": 3},
        gradients=True,
    ),
    "gpt2_variant": Case(
        "GPT2LMHeadModel",
        {"vocab_size": 61, "n_positions": 67, "n_embd": 12, "n_layer": 2, "n_head": 3, "activation_function": "relu"}
        | {"scale_attn_weights": False, "tie_word_embeddings": False},
    ),
    "gpt_neox": Case(
        "GPTNeoXForCausalLM",
        {**{key: value for key, value in DECODER.items() if key != "num_key_value_heads"}, "layer_norm_eps": 1e-2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.67}},
    ),
    "gpt_neox_variant": Case(
        "GPTNeoXForCausalLM",
        {**{key: value for key, value in DECODER.items() if key != "num_key_value_heads"}, "hidden_act": "relu"}
        | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.34}},
    ),
    "mistral": Case("MistralForCausalLM", DECODER | {"sliding_window": 5, "head_dim": 8, "rms_norm_eps": 1e-2}),
    "mistral_variant": Case(
        "MistralForCausalLM",
        DECODER
        | {"sliding_window": None, "hidden_act": "gelu", "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    ),
    "qwen2": Case(
        "Qwen2ForCausalLM",
        DECODER
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rms_norm_eps": 1e-2}
        | {"hidden_act": "gelu", "tie_word_embeddings": True, "rope_parameters": YARN_ROPE},
    ),
    "qwen3": Case(
        "Qwen3ForCausalLM",
        DECODER
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "rms_norm_eps": 1e-2}
        | {"hidden_act": "gelu", "tie_word_embeddings": True, "head_dim": 10, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    ),
    "gemma": Case(
        "GemmaForCausalLM",
        DECODER
        | {"head_dim": 10, "rms_norm_eps": 1e-2, "attention_bias": True, "tie_word_embeddings": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        norm_mean=0.0,
        dtype=torch.bfloat16,
    ),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        DECODER
        | {"head_dim": 10, "rms_norm_eps": 1e-2, "attention_bias": True, "query_pre_attn_scalar": 17}
        | {"sliding_window": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
        | {"tie_word_embeddings": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        norm_mean=0.0,
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        DECODER
        | {"head_dim": 10, "rms_norm_eps": 1e-2, "query_pre_attn_scalar": 17, "num_hidden_layers": 3}
        | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"final_logit_softcapping": 4.0, "attention_bias": True, "tie_word_embeddings": False}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 2.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
        norm_mean=0.0,
    ),
    "phi3": Case(
        "Phi3ForCausalLM",
        DECODER
        | {"sliding_window": 5, "rms_norm_eps": 1e-2, "hidden_act": "gelu", "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.67}},
    ),
    "olmo2": Case(
        "Olmo2ForCausalLM",
        DECODER
        | {"rms_norm_eps": 1e-2, "hidden_act": "gelu", "tie_word_embeddings": True, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    ),
    "mixtral": Case(
        "MixtralForCausalLM",
        DECODER
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5, "rms_norm_eps": 1e-2}
        | {"intermediate_size": 19, "head_dim": 8, "hidden_act": "gelu", "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    ),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM",
        DECODER
        | {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "norm_topk_prob": True}
        | {"head_dim": 8, "hidden_act": "gelu", "tie_word_embeddings": True, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rms_norm_eps": 1e-2}
        | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen3_moe_variant": Case(
        "Qwen3MoeForCausalLM",
        DECODER | {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "head_dim": 8},
    ),
    "gpt_oss": Case(
        "GptOssForCausalLM",
        DECODER
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5, "rms_norm_eps": 1e-2}
        | {"intermediate_size": 11, "head_dim": 8, "rope_parameters": YARN_ROPE | {"truncate": False}},
    ),
    "gpt_oss_variant": Case(
        "GptOssForCausalLM",
        DECODER
        | {"num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": True, "attention_bias": False}
        | {"layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
        | {"intermediate_size": 11, "head_dim": 8},
    ),
    "bert": Case("BertModel", ENCODER | {"type_vocab_size": 3}, options={"add_pooling_layer": False}, gradients=True),
    "bert_masked": Case("BertForMaskedLM", ENCODER | {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    "roberta": Case(
        "RobertaModel", ENCODER | {"hidden_act": "relu", "type_vocab_size": 1}, options={"add_pooling_layer": False}
    ),
    "roberta_masked": Case("RobertaForMaskedLM", ENCODER | {"type_vocab_size": 3, "pad_token_id": 2}),
    "xlm_roberta": Case(
        "XLMRobertaModel", ENCODER | {"hidden_act": "relu", "type_vocab_size": 1}, options={"add_pooling_layer": False}
    ),
    "xlm_roberta_masked": Case("XLMRobertaForMaskedLM", ENCODER | {"type_vocab_size": 3, "pad_token_id": 2}),
    "distilbert": Case("DistilBertModel", DISTILBERT),
    "distilbert_masked": Case("DistilBertForMaskedLM", DISTILBERT | {"activation": "relu", "pad_token_id": 3}),
    "vit": Case(
        "ViTModel",
        IMAGE | {"intermediate_size": 37, "hidden_act": "relu"},
        options={"add_pooling_layer": False},
    ),
    "vit_classes": Case(
        "ViTForImageClassification",
        IMAGE
        | {"image_size": [6, 9], "patch_size": [1, 3], "intermediate_size": 37, "qkv_bias": False, "num_labels": 7},
    ),
    "dinov2": Case(
        "Dinov2Model",
        IMAGE | {"mlp_ratio": 2, "hidden_act": "relu", "qkv_bias": False, "layerscale_value": 0.5},
        left_out=MASK_TOKEN,
    ),
    "dinov2_registers": Case(
        "Dinov2WithRegistersModel",
        IMAGE | {"mlp_ratio": 2, "use_swiglu_ffn": True, "num_register_tokens": 3},
        left_out=MASK_TOKEN,
    ),
    "t5": Case("T5ForConditionalGeneration", T5 | {"num_decoder_layers": 1}, gradients=True),
    "t5_variant": Case(
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "n_positions": 31, "pad_token_id": 2},
        untied=True,
    ),
    "t5_encoder": Case("T5EncoderModel", T5 | {"feed_forward_proj": "gated-silu", "pad_token_id": 2}),
    "mt5": Case("MT5ForConditionalGeneration", T5 | {"n_positions": 31, "pad_token_id": 2}, untied=True),
    "mt5_variant": Case(
        "MT5ForConditionalGeneration", T5 | {"num_decoder_layers": 1, "feed_forward_proj": "gated-relu"}
    ),
    "mt5_encoder": Case("MT5EncoderModel", T5 | {"feed_forward_proj": "relu", "pad_token_id": 2}),
    "dinov2_registers_variant": Case(
        "Dinov2WithRegistersModel",
        IMAGE | {"hidden_act": "relu", "qkv_bias": False, "layerscale_value": 0.5, "mlp_ratio": 1},
        left_out=MASK_TOKEN,
    ),
}


def make_model(case: Case, seed: int) -> transformers.PreTrainedModel:
    architecture = getattr(transformers, case.architecture)
    ends = {} if "T5" in case.architecture else {"bos_token_id": None, "eos_token_id": None}
    model = architecture(architecture.config_class(**ends | case.fields), **case.options).eval()
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        parameter.data = torch.tensor(weights(rng, name, tuple(parameter.shape), case)).to(case.dtype).float()
    model.tie_weights()
    if case.untied:
        head = weights(rng, "lm_head.weight", tuple(model.lm_head.weight.shape), case)
        model.lm_head.weight = torch.nn.Parameter(torch.tensor(head))
    return model


def weights(rng: np.random.Generator, name: str, shape: tuple[int, ...], case: Case) -> np.ndarray:
    """Random numbers such that nothing vanishes, blows up or could be left out unnoticed."""
    is_norm = len(shape) == 1 and name.endswith("weight")
    deviation = 0.3 if len(shape) == 1 else 1.0 if "embed" in name or "wte" in name else 1.5 * shape[-1] ** -0.5
    return rng.normal(case.norm_mean if is_norm else 0.0, deviation, shape).astype(np.float32)


def make_outputs(model: transformers.PreTrainedModel) -> Arrays:
    if "num_experts_per_tok" in model.config.to_dict():
        model.set_experts_implementation("eager")  # the grouped product refuses odd sizes
    if hasattr(model.config, "image_size"):
        return image_outputs(model)
    ids, real = make_tokens(model.config.vocab_size, left=model.can_generate())
    arrays = {"ids": ids, "real": real}
    with torch.no_grad():
        if not model.can_generate():
            return arrays | encode(model, ids, real)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real).long()}
        if model.config.is_encoder_decoder:
            arrays["target_ids"] = np.random.default_rng(5).integers(4, model.config.vocab_size, (3, 11))
            arrays["outputs"] = model(**inputs, decoder_input_ids=torch.tensor(arrays["target_ids"])).logits.numpy()
            inputs["decoder_start_token_id"] = 0
        else:
            positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
            logits = model(**inputs, position_ids=torch.tensor(positions)).logits.numpy()
            arrays["outputs"] = np.where(real[..., None], logits, 0)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        written = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    best = torch.stack(written.logits, 1).log_softmax(-1).topk(2).values.numpy()
    assert (best[..., 0] - best[..., 1] > 1e-3).all(), "two tokens are as likely; take another seed"
    return arrays | {"tokens": written.sequences[:, -NEW_TOKENS:].numpy(), "log_probs": best[..., 0]}


def encode(model: transformers.PreTrainedModel, ids: np.ndarray, real: np.ndarray) -> Arrays:
    """What an encoder makes of the tokens."""
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real).long()}
    arrays = {}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        arrays["token_type_ids"] = np.random.default_rng(3).integers(0, model.config.type_vocab_size, ids.shape)
        inputs["token_type_ids"] = torch.tensor(arrays["token_type_ids"])
    out = model(**inputs)
    outputs = out.logits if "logits" in out else out.last_hidden_state
    return arrays | {"outputs": np.where(real[..., None], outputs.numpy(), 0)}


def image_outputs(model: transformers.PreTrainedModel) -> Arrays:
    images = (
        np.random.default_rng(4).normal(size=(2, *model_sides(model), model.config.num_channels)).astype(np.float32)
    )
    with torch.no_grad():
        out = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)))
    arrays = {"images": images, "outputs": (out.logits if "logits" in out else out.last_hidden_state).numpy()}
    if isinstance(model.config.image_size, int):  # transformers takes the grid of positions for a square
        arrays |= {f"positions_{height}x{width}": make_positions(model, height, width) for height, width in SIZES}
    return arrays


def make_positions(model: transformers.PreTrainedModel, height: int, width: int) -> np.ndarray:
    """The table of positions for images of another size."""
    count = (height // model.config.patch_size) * (width // model.config.patch_size)
    tokens = torch.empty(1, 1 + count, model.config.hidden_size)  # for its shape
    return model.base_model.embeddings.interpolate_pos_encoding(tokens, height, width)[0].detach().numpy()


def model_sides(model: transformers.PreTrainedModel) -> list[int]:
    size = model.config.image_size
    return [size, size] if isinstance(size, int) else list(size)


def make_tokens(vocab_size: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Three rows of 13 tokens, two of them padded."""
    ids = np.random.default_rng(2).integers(4, vocab_size, (3, 13))
    counted = np.arange(13)[None, :] < np.array([[13], [8], [11]])
    real = counted[:, ::-1] if left else counted
    return np.where(real, ids, 3), np.ascontiguousarray(real)


def make_gradients(model: transformers.PreTrainedModel, outputs: Arrays) -> Arrays:
    """Of the mean of the squared outputs of the first row, whose tokens are all real."""
    model.zero_grad()
    target = {"decoder_input_ids": torch.tensor(outputs["target_ids"][:1])} if "target_ids" in outputs else {}
    out = model(input_ids=torch.tensor(outputs["ids"][:1]), **target)
    (out.logits if "logits" in out else out.last_hidden_state).square().mean().backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def make_golden(name: str, folder: Path) -> transformers.PreTrainedModel:
    """Writes one folder."""
    case = CASES[name]
    model = make_model(case, seed=len(name))
    outputs = make_outputs(model)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    np.savez_compressed(folder / "outputs.npz", **outputs)
    if case.gradients:
        save_file(make_gradients(model, outputs), folder / "gradients.safetensors")
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return model.float()


def tensors(folder: Path) -> Arrays:
    found: Arrays = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def differences(stored: Path, made: Path) -> Iterator[str]:
    """What two folders do not share, in words."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in (stored, made)]
    for key in sorted(configs[0].keys() | configs[1].keys() - {"transformers_version"}):
        if configs[0].get(key) != configs[1].get(key):
            yield f"config.json has {key}={configs[1].get(key)}, stored {configs[0].get(key)}"
    old, new = tensors(stored), tensors(made)
    for name in sorted(old.keys() ^ new.keys()):
        yield f"{name} is in one of them only"
    for name in sorted(old.keys() & new.keys()):
        if old[name].tobytes() != new[name].tobytes():
            yield f"{name} differs"
    pairs = [(np.load(stored / "outputs.npz"), np.load(made / "outputs.npz"))]
    if (stored / "gradients.safetensors").exists():
        pairs.append(tuple(load_file(folder / "gradients.safetensors") for folder in (stored, made)))
    for before, after in pairs:
        for name in after:
            if not close(before[name], after[name]):
                yield f"{name} differs"


def close(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether arrays are one but for the rounding of another machine."""
    scale = max(1.0, float(np.abs(after).max()))
    return before.shape == after.shape and np.allclose(before, after, rtol=0, atol=1e-5 * scale)


def round_trip(name: str, stored: Path) -> Iterator[str]:
    """Attnax reads and writes the checkpoint; transformers reads what it wrote, and must compute what it did."""
    case = CASES[name]
    architecture = getattr(transformers, case.architecture)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_pretrained(stored)
        save_pretrained(model, folder)
        options = case.options | {"output_loading_info": True, "dtype": torch.float32}
        again, info = architecture.from_pretrained(folder, **options)
        left = {key: set(value) - set(case.left_out) for key, value in info.items()}
        left = {key: value for key, value in left.items() if value}
        if left:
            yield f"transformers does not read what Attnax writes: {left}"
        with np.load(stored / "outputs.npz") as outputs:
            if not close(outputs["outputs"], make_outputs(again.eval())["outputs"]):
                yield "after a round trip the outputs differ"


VALUES = {  # of keys of which transformers takes no others
    "auto_map": {"AutoConfig": "module.Config"},
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "cache_implementation": "static",
    "early_stopping": True,
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "forced_bos_token_id": 6,
    "forced_eos_token_id": 6,
}


def inert_keys(name: str, stored: Path) -> Iterator[str]:
    """Keys that Attnax passes over, with values that it passes over: transformers must compute what it did."""
    family = inspect_folder(stored).family
    assert family is not None
    fields = {key: VALUES.get(key, 0.5) for key in ANY_VALUE} | {
        key: value[0] for key, value in HARMLESS_VALUES.items()
    }
    fields = {key: value for key, value in fields.items() if key not in family.known_keys}
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(stored, folder, dirs_exist_ok=True)
        config = json.loads((stored / "config.json").read_text())
        (Path(folder) / "config.json").write_text(json.dumps(config | fields | {"_made_up": 1}))
        model = getattr(transformers, case.architecture).from_pretrained(folder, dtype=torch.float32, **case.options)
    if model.can_generate():
        model.generation_config = transformers.GenerationConfig()
    with np.load(stored / "outputs.npz") as outputs:
        if not close(outputs["outputs"], make_outputs(model.eval())["outputs"]):
            yield "with inert keys the outputs differ"


def other_sizes() -> Iterator[str]:
    """Narrow vision models of the published sizes see images of other sizes."""
    fields = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    for architecture, more in PUBLISHED_SIZES.items():
        model = make_model(Case(architecture, fields | more), seed=0)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            ours, _ = load_pretrained(folder)
        options = {"interpolate_pos_encoding": True} if architecture == "ViTModel" else {}
        for size in ((224, 224), (448, 448), (224, 448), (448, 112)):
            images = np.random.default_rng(6).normal(size=(1, *size, 3)).astype(np.float32)
            with torch.no_grad():
                out = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)), **options)
            if not close(out.last_hidden_state.numpy(), np.asarray(with_image_size(ours, size)(images))):
                yield f"{architecture} differs for images of {size} pixels"


def unmoved_fields() -> Iterator[str]:
    """Fields that a mapping reads and that have their default in every case."""
    defaults: dict[str, Any] = {}
    moved = {("mt5", "tie_word_embeddings")}  # which transformers has forced to be true
    for name, case in CASES.items():
        kind = getattr(transformers, case.architecture).config_class
        defaults[kind.model_type] = default = kind().to_dict()
        config = json.loads((FOLDER / name / "config.json").read_text())
        moved |= {(kind.model_type, key) for key in config if config[key] != default.get(key)}
    for family in FAMILIES:
        default = defaults[family.model_type]
        for field in family.fields:
            says_nothing = field.read({key: default[key] for key in field.keys if key in default}) == {}
            if field.keys and not says_nothing and moved.isdisjoint((family.model_type, key) for key in field.keys):
                yield f"{'/'.join(field.keys)} of {family.model_type} has its default in every case"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tiny checkpoints of Hugging Face transformers and its outputs.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="compare the files with ones made anew")
    mode.add_argument("--write", action="store_true", help="store files made anew")
    parser.add_argument("names", nargs="*", help="cases, by default all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = arguments.names or list(CASES)
    problems = []
    for name in names:
        if arguments.write:
            make_golden(name, FOLDER / name)
        else:
            with tempfile.TemporaryDirectory() as folder:
                make_golden(name, Path(folder))
                problems += [f"{name}: {problem}" for problem in differences(FOLDER / name, Path(folder))]
        more = (*round_trip(name, FOLDER / name), *inert_keys(name, FOLDER / name))
        problems += [f"{name}: {problem}" for problem in more]
    if not arguments.names:
        problems += [*other_sizes(), *unmoved_fields()]
        problems += [f"{path.name}: no such case" for path in FOLDER.iterdir() if path.name not in CASES]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if problems:
        sys.exit("\n".join([f"{FOLDER} and {versions}:", *problems]))
    print(f"{len(names)} cases of {versions} are as in {FOLDER}.")


if __name__ == "__main__":
    main()

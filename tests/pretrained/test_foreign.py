"""The error for a folder without a whole model names its content and the command to type."""

import json

import numpy as np
import pytest
from golden_copies import copy_with
from safetensors.numpy import load_file, save_file

from attnax.pretrained import CheckpointError, load_pretrained


def test_the_hint_for_pickles_keeps_the_head(tmp_path):
    copy_with("bert_masked", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    hint = f"from transformers import BertForMaskedLM; BertForMaskedLM.from_pretrained('{tmp_path}').save_pretrained("
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(tmp_path)
    assert "got pytorch_model.bin, of a format whose files can run code" in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("architectures", [None, [], "Llama", ["import os; os"], [7]])
def test_without_a_class_the_hint_has_one_with_a_head(architectures, tmp_path):
    copy_with("gpt2", tmp_path, architectures=architectures)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from"
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("llama.Q4_K_M.gguf", r"got llama.Q4_K_M.gguf. Take .* gguf_file='llama.Q4_K_M.gguf'\).save_pretrained"),
        (
            "model.pt",
            "got model.pt, of a format whose files can run code. Where you trust it, convert it with its own tool",
        ),
        ("tf_model.h5", "it must hold model.safetensors, or .*; got tf_model.h5"),
        ("consolidated.safetensors", "it must hold model.safetensors, or .*; got consolidated.safetensors"),
    ],
)
def test_files_of_other_names_are_named(file, problem, tmp_path):
    copy_with("phi3", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    with pytest.raises(CheckpointError, match=problem):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\), .* Take the model it was"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantised \(bitsandbytes\).*\.dequantize\(\)\.save_pre"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantised \(fp8\).*FineGrainedFP8Config\(dequantize=True\)",
        ),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"\(mxfp4\).*import GptOssForCausalLM, Mxfp4Config;"),
        ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, r"quantised \(mlx\)"),
        ({"quantization_config": 4}, r"quantised \(quantization_config=4\)"),
    ],
)
def test_a_quantised_checkpoint_says_so_instead_of_its_tensors(fields, problem, tmp_path):
    copy_with("gpt_oss", tmp_path, **fields)
    save_file(
        {f"model.layers.{i}.x.qweight": np.zeros((2, 2), "int32") for i in range(9)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=problem) as caught:
        load_pretrained(tmp_path)
    assert len(caught.value.problems) == 1


def test_quantised_tensors_are_noticed_by_their_names(tmp_path):
    copy_with("llama2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.qweight"] = np.zeros((2, 2), "int32")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"it is quantised \(it has 'model.layers.0.self_attn.q_proj.qweight'\)"):
        load_pretrained(tmp_path)


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_says_that_it_is_one_and_names_its_base(beside, tmp_path):
    if beside:
        copy_with("llama2", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"base_model.model.x.lora_A.weight": np.zeros((2, 2), "f")}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"an adapter \(peft_type='LORA'\) of the model 'meta-llama/Llama-3.2-1B', not a model. .*merge_and_unl",
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"), [("[]", "must hold a JSON object"), ("{}", r"adapter \(peft_type=None\) of the model N")]
)
def test_a_damaged_adapter_is_an_error_in_words(text, problem, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=problem):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "head"),
    [
        ("llama2", {}, "lm_head.weight"),
        ("gpt_neox", {}, "embed_out.weight"),
        ("t5_variant", {"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_a_missing_head_hints_at_tying(name, fields, head, tmp_path):
    copy_with(name, tmp_path, **fields)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[head]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"'{head}' is missing; .* set tie_word_embeddings to true in config.json"
    ):
        load_pretrained(tmp_path)

"""The files and tensors that make a model."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx
from golden_copies import (
    FOLDER,
    NAMES,
    check_outputs,
    check_parameters,
    check_same,
    config_of,
    copy_with,
    load,
    outputs_of,
    run,
    tensors_of,
)
from tiny import build

from attnax import Layout, TransformerEncoder, TransformerLM
from attnax.nn.axes import parameter_axes
from attnax.pretrained import CheckpointError, load_pretrained, save_pretrained
from attnax.pretrained.inspect import inspect_folder
from attnax.pretrained.models import load_inspected
from attnax.sharding import RULES


def test_dtype_is_that_of_the_tensors_or_the_one_given():
    for given, expected in ((None, "bfloat16"), ("float32", "float32"), (jnp.float16, "float16")):
        model, _ = load_pretrained(FOLDER / "llama3", dtype=given)
        assert model.config.dtype == model.config.param_dtype == expected
        assert {str(array.dtype) for array in jax.tree.leaves(nnx.state(model))} == {expected}
    with pytest.raises(CheckpointError, match="JAX has no float64 unless jax_enable_x64 is set"):
        load_pretrained(FOLDER / "llama3", dtype="float64")
    for wrong in ("int32", "float8_e4m3fn", "foo"):
        with pytest.raises(ValueError, match=f"dtype must be one of float32, .*; got dtype='{wrong}'"):
            load_pretrained(FOLDER / "llama3", dtype=wrong)


def test_float64_is_not_read_as_less_without_a_word(tmp_path):
    shutil.copytree(FOLDER / "gpt2", tmp_path, dirs_exist_ok=True)
    tensors = tensors_of(tmp_path)
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].astype("float64")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="JAX has no float64 unless jax_enable_x64 is set"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path, dtype="float32")[0].config == load("gpt2").config


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "t5_variant", "vit_classes"])
def test_a_model_of_shapes_is_the_model_without_its_numbers(name):
    """Equal layers of it are copies."""
    seen = inspect_folder(FOLDER / name)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: seen.family.model(nnx.Rngs(0), seen.config)))
    assert seen.abstract[0] == graphdef
    of_shapes, of_numbers = (
        {path: (variable.shape, variable.dtype) for path, variable in nnx.to_flat_state(each)}
        for each in (seen.abstract[1], state)
    )
    assert of_shapes == of_numbers


def test_parameters_go_where_sharding_says():
    mesh = jax.make_mesh((2,), ("model",))
    spread, whole = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, "model"), ()))
    model, _ = load_pretrained(
        FOLDER / "llama3", sharding=lambda name, shape: spread if "query.kernel" in name else whole
    )
    attention = model.decoder.stack.blocks[1].attention
    assert attention.query.kernel[...].sharding == spread and attention.key.kernel[...].sharding == whole
    model, _ = load_pretrained(FOLDER / "llama3", sharding=whole)
    assert {array.sharding for array in jax.tree.leaves(nnx.state(model))} == {whole}


def test_parameters_go_where_the_rules_of_a_layout_say(tmp_path):
    kind = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False}
    sizes = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "num_layers": 2, "d_ff": 12}
    save_pretrained(build(lambda rngs: TransformerLM(rngs, **sizes, **kind)), tmp_path)
    layout = Layout(fsdp=2, tensor=2, data=2)
    model, _ = load_pretrained(tmp_path, layout=layout)
    block, mesh = model.decoder.stack.blocks[1], layout.mesh()
    assert block.attention.query.kernel[...].sharding == jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    assert block.feed_forward.down.kernel[...].sharding == jax.NamedSharding(mesh, jax.P("tensor", "fsdp"))
    norm = block.around_attention.norm_in.scale[...]
    assert norm.sharding.is_fully_replicated and norm.sharding.mesh == mesh


def test_a_layout_that_does_not_fit_is_refused_before_a_tensor_is_read():
    with pytest.raises(ValueError, match="a layout decides where parameters lie; got it with sharding"):
        load_pretrained(FOLDER / "llama3", layout=Layout(), sharding=lambda name, shape: None)
    with pytest.raises(ValueError, match="tensor=5 needs 5 devices; got 8 devices"):
        load_pretrained(FOLDER / "llama3", layout=Layout(fsdp=1, tensor=5))
    with pytest.raises(ValueError, match="tensor must divide num_heads; got tensor=8"):
        load_pretrained(FOLDER / "llama3", layout=Layout(tensor=8))


@pytest.mark.contract
def test_each_matrix_of_each_family_states_its_axes():
    for name in NAMES:
        for path, axes in parameter_axes(inspect_folder(FOLDER / name).abstract[1]).items():
            named = {axis[0] if isinstance(axis, tuple) else axis for axis in axes} - {None}
            assert named <= set(RULES), (name, path)


def test_parameters_go_to_the_callers_default_device():
    """Other threads, which read the files, do not know it."""
    last = jax.devices()[-1]
    with jax.default_device(last):
        model, _ = load_pretrained(FOLDER / "llama3")
    assert {device for array in jax.tree.leaves(nnx.state(model)) for device in array.devices()} == {last}


def test_a_file_that_is_cut_off_while_tensors_are_read_is_refused(tmp_path):
    shutil.copytree(FOLDER / "gpt2", tmp_path, dirs_exist_ok=True)
    seen = inspect_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut off after its header was read"):
        load_inspected(seen)


def test_a_tokenizer_is_read_if_it_is_there(tmp_path):
    shutil.copytree(FOLDER / "gpt2", tmp_path, dirs_exist_ok=True)
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    assert load_pretrained(tmp_path)[1].encode("b").ids == [1]
    for text in ("", "{}", '{"model": {"type": "None"}}', "[]"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: it is no tokenizer"):
            load_pretrained(tmp_path)


def test_a_file_that_must_not_be_read_is_an_error_in_words(monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json: it cannot be read \(Permission denied\)"):
        load_pretrained(FOLDER / "gpt2")


def test_files_that_older_versions_wrote_are_read(tmp_path):
    """Names without prefix, buffers, a head beside tied embeddings, and RoPE in the form of version 4."""
    shutil.copytree(FOLDER / "gpt2", tmp_path, dirs_exist_ok=True)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(tmp_path).items()}
    tensors |= {"h.0.attn.bias": np.ones((1, 1, 4, 4), bool), "lm_head.weight": tensors["wte.weight"]}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    check_same(load_pretrained(tmp_path)[0], load("gpt2"))

    folder, fields = tmp_path / "llama3", config_of("llama3")
    said = fields.pop("rope_parameters")
    fields |= {"rope_theta": said.pop("rope_theta"), "torch_dtype": fields.pop("dtype")}
    fields["rope_scaling"] = said | {"type": said["rope_type"]}
    shutil.copytree(FOLDER / "llama3", folder)
    (folder / "config.json").write_text(json.dumps(fields))
    check_same(load_pretrained(folder)[0], load("llama3"))


def test_a_head_that_is_not_the_embeddings_it_is_tied_to_is_refused(tmp_path):
    shutil.copytree(FOLDER / "gpt2", tmp_path, dirs_exist_ok=True)
    tensors = tensors_of(tmp_path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'lm_head.weight' must repeat the embeddings, since they are tied"):
        load_pretrained(tmp_path)
    config = config_of("gpt2") | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_pretrained(tmp_path)[0].head.projection is not None


def test_a_tensor_by_its_old_name_and_its_new_one_is_refused(tmp_path):
    shutil.copytree(FOLDER / "bert", tmp_path, dirs_exist_ok=True)
    tensors = tensors_of(tmp_path)
    tensors["embeddings.LayerNorm.gamma"] = tensors["embeddings.LayerNorm.weight"] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'embeddings.LayerNorm.weight' is there twice, once by its old name"):
        load_pretrained(tmp_path)


def test_poolers_and_old_names_of_bert_are_known(tmp_path):
    shutil.copytree(FOLDER / "bert", tmp_path, dirs_exist_ok=True)
    tensors = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors_of(tmp_path).items()
    }
    tensors |= {"bert.pooler.dense.weight": np.ones((30, 30), "f"), "bert.embeddings.position_ids": np.arange(23)[None]}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    check_same(load_pretrained(tmp_path)[0], load("bert"))


def test_a_file_of_bert_with_both_heads_is_a_masked_language_model(tmp_path):
    copy_with("bert_masked", tmp_path, architectures=["BertForPreTraining"])
    tensors = tensors_of(tmp_path)
    tensors |= {
        f"cls.seq_relationship.{part}": np.ones((2, 30)[: 3 - len(part) // 3], "f") for part in ("weight", "bias")
    }
    tensors["bert.pooler.dense.weight"] = np.ones((30, 30), "f")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    check_same(load_pretrained(tmp_path)[0], load("bert_masked"))


def test_files_without_a_head_are_read_where_it_is_tied(tmp_path):
    copy_with("gpt2", tmp_path, architectures=["GPT2Model"])
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(tmp_path).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    check_same(load_pretrained(tmp_path)[0], load("gpt2"))
    (tmp_path / "config.json").write_text(
        json.dumps(config_of("gpt2") | {"architectures": ["GPT2Model"], "tie_word_embeddings": False})
    )
    with pytest.raises(CheckpointError, match="this GPT2Model have no head, .* GPT2LMHeadModel must have one"):
        load_pretrained(tmp_path)


def test_buffers_that_an_index_does_not_name_are_known(tmp_path):
    shutil.copytree(FOLDER / "llama3", tmp_path, dirs_exist_ok=True)
    shard = min(tmp_path.glob("model-*.safetensors"))
    tensors = safetensors.numpy.load_file(shard)
    safetensors.numpy.save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, "f")}, shard)
    check_same(load_pretrained(tmp_path)[0], load("llama3"))
    safetensors.numpy.save_file(tensors | {"model.more": np.ones(5, "f")}, shard)
    with pytest.raises(CheckpointError, match=r"'model.more' is float32\(5,\); no such tensor was expected"):
        load_pretrained(tmp_path)


def test_files_of_t5_from_before_version_5_are_read(tmp_path):
    """With an untied head tie_word_embeddings is false, and the table may be present three times."""
    fields = {"tie_word_embeddings": False}
    shutil.copytree(FOLDER / "t5_variant", tmp_path, dirs_exist_ok=True)
    config = {key: value for key, value in config_of("t5_variant").items() if key != "scale_decoder_outputs"}
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    tensors = tensors_of(tmp_path)
    tensors |= {f"{half}.embed_tokens.weight": tensors["shared.weight"] for half in ("encoder", "decoder")}
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros((10, 5), "f")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    check_same(load_pretrained(tmp_path)[0], load("t5_variant"))
    head = tensors.pop("lm_head.weight")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'lm_head.weight' is missing"):
        load_pretrained(tmp_path)
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'lm_head.weight' must repeat the embeddings"):
        load_pretrained(tmp_path)
    tensors |= {"lm_head.weight": tensors["shared.weight"]}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert load_pretrained(tmp_path)[0].head.projection is None
    tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'decoder.embed_tokens.weight' must repeat the embeddings.* tensor\.$"):
        load_pretrained(tmp_path)


def move(tensors, **names):
    """The tensors, some of them under other names."""
    return {names.get(name.replace(".", "_"), name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "table", "other"),
    [
        ("t5_variant", "shared_weight", "decoder.embed_tokens.weight"),  # Madlad-400 has it
        ("t5_variant", "shared_weight", "encoder.embed_tokens.weight"),
        ("t5", "shared_weight", "lm_head.weight"),
        ("t5_encoder", "shared_weight", "encoder.embed_tokens.weight"),
        ("gpt2", "transformer_wte_weight", "lm_head.weight"),
        ("bert_masked", "bert_embeddings_word_embeddings_weight", "cls.predictions.decoder.weight"),
    ],
)
def test_embeddings_are_read_by_the_name_of_a_tensor_that_is_tied_to_them(tmp_path, name, table, other):
    shutil.copytree(FOLDER / name, tmp_path, dirs_exist_ok=True)
    safetensors.numpy.save_file(move(tensors_of(tmp_path), **{table: other}), tmp_path / "model.safetensors")
    check_same(load_pretrained(tmp_path)[0], load(name))


def test_an_untied_head_is_not_read_as_embeddings(tmp_path):
    shutil.copytree(FOLDER / "llama2", tmp_path, dirs_exist_ok=True)
    tensors = tensors_of(tmp_path)
    del tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'model.embed_tokens.weight' is missing"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "encoder"), [("bert_masked", "BertModel"), ("vit_classes", "ViTModel")])
def test_a_head_beside_an_encoder_is_not_read(tmp_path, name, encoder):
    model, _ = load_pretrained(copy_with(name, tmp_path, architectures=[encoder]))
    whole = load(name)
    ours, theirs = (
        dict(nnx.to_flat_state(nnx.state(each, nnx.Param))) for each in (model, getattr(whole, "encoder", whole))
    )
    heads = {path for path in theirs if path[0] == "head"}
    assert ours.keys() == theirs.keys() - heads
    assert all(np.array_equal(ours[path][...], theirs[path][...]) for path in ours)


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_the_encoder_is_read_from_the_files_of_the_whole(tmp_path, name):
    architecture = config_of(f"{name}_encoder")["architectures"]
    encoder, _ = load_pretrained(copy_with(name, tmp_path, architectures=architecture))
    whole = load(name)
    assert type(encoder) is TransformerEncoder and encoder.config == whole.config.encoder
    check_parameters(encoder, whole.encoder)


def test_relative_positions_have_no_longest_sequence(tmp_path):
    golden = outputs_of("t5_encoder")
    model, _ = load_pretrained(copy_with("t5_encoder", tmp_path, n_positions=5))
    check_outputs(run(model, golden), golden)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["n_positions"] == 5

"""Published checkpoints give what transformers gives; tests/parity/pretrained.py wrote down what that is."""

import copy
import dataclasses
import functools
import json
import math
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx
from tiny import SEED, build

from attnax import Transformer, TransformerEncoder, TransformerLM, masks
from attnax.models import SentenceEncoder, with_image_size
from attnax.nn import with_scan_layers
from attnax.pretrained import CheckpointError, load_pretrained, save_pretrained
from attnax.pretrained.families import FAMILIES
from attnax.pretrained.inspect import find_family
from attnax.pretrained.layout import arrange, arranged_shape, reverse

FOLDER = Path(__file__).parents[1] / "goldens" / "pretrained"
NAMES = sorted(path.name for path in FOLDER.iterdir())
BFLOAT16 = ("gemma", "llama3")
KIND = ("model_type", "architectures")
# Between them they have every kind of block, position, mask, mixture and head; the others say it in other names.
DIFFERENT = (
    *("bert", "dinov2_registers", "distilbert_masked", "gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "llama3"),
    *("olmo2", "phi3", "qwen3_moe", "roberta", "t5", "vit_classes"),
)


def outputs_of(name):
    with np.load(FOLDER / name / "outputs.npz") as file:
        return dict(file)


def tensors_of(folder):
    return {
        name: tensor
        for path in sorted(Path(folder).glob("model*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(path).items()
    }


def config_of(name):
    return json.loads((FOLDER / name / "config.json").read_text())


def read_config(folder):
    """What the files of a folder say of our model, but for its dtype."""
    theirs = json.loads((folder / "config.json").read_text())
    family = find_family(theirs, folder)
    return family.adapt(family.read_config(theirs, "config.json"), theirs, tensors_of(folder).keys())


@functools.cache
def load(name, dtype=None):
    return load_pretrained(FOLDER / name, dtype=dtype)[0]


def load_float32(name):
    return load(name, "float32" if name in BFLOAT16 else None)


def check_same(model, other):
    assert type(model) is type(other) and model.config == other.config
    check_parameters(model, other)


def check_parameters(model, other):
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(each, nnx.Param))) for each in (model, other))
    assert ours.keys() == theirs.keys()
    for name, variable in ours.items():
        value, expected = (np.asarray(each[...]) for each in (variable, theirs[name]))
        assert (value.dtype, value.shape, value.tobytes()) == (expected.dtype, expected.shape, expected.tobytes()), name


def run(model, golden):
    graphdef, state = nnx.split(model)

    if "images" in golden:
        return np.asarray(jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, golden["images"]))
    types = {"token_type_ids": golden["token_type_ids"]} if "token_type_ids" in golden else {}

    @jax.jit
    def forward(state, ids, real):
        if "target_ids" in golden:
            return nnx.merge(graphdef, state)(ids, golden["target_ids"], source_padding_mask=real)
        return nnx.merge(graphdef, state)(ids, padding_mask=real, **types)

    return np.asarray(forward(state, golden["ids"], golden["real"]))


def check_outputs(outputs, golden):
    if "real" in golden and "target_ids" not in golden:
        outputs = np.where(golden["real"][..., None], outputs, 0)
    error = np.abs(outputs - golden["outputs"])
    assert error.max() < 2e-4
    assert np.square(error).mean() ** 0.5 < 1e-5 * np.square(golden["outputs"]).mean() ** 0.5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DIFFERENT else pytest.mark.contract) for name in NAMES]
)
def test_outputs_are_the_same_with_padding_too(name):
    golden = outputs_of(name)
    check_outputs(run(load_float32(name), golden), golden)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.contract if name in DIFFERENT else pytest.mark.thorough)
        for name in NAMES
        if "tokens" in outputs_of(name)
    ],
)
def test_greedy_texts_of_padded_prompts_are_the_same(name):
    golden = outputs_of(name)
    model = nnx.jit(with_scan_layers, static_argnums=1)(load_float32(name), True)  # one layer compiles faster than all
    length = golden["tokens"].shape[1]
    if "target_ids" in golden:
        written = model.generate(golden["ids"], length, start_token=0, source_padding_mask=golden["real"])
    else:
        written = model.generate(golden["ids"], padding_mask=golden["real"], max_new_tokens=length)
    np.testing.assert_array_equal(written.tokens, golden["tokens"])
    np.testing.assert_allclose(written.log_probs, golden["log_probs"], atol=2e-4)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers", "vit"])
def test_positions_at_other_image_sizes_are_the_same(name):
    golden = {key: table for key, table in outputs_of(name).items() if key.startswith("positions_")}
    assert len(golden) == 3
    for key, table in golden.items():
        size = tuple(map(int, key.removeprefix("positions_").split("x")))
        np.testing.assert_allclose(with_image_size(load(name), size).positions.embedding[...], table, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_read(name, tmp_path):
    save_pretrained(load(name), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in KIND} == {key: config_of(name)[key] for key in KIND}
    read, written = tensors_of(FOLDER / name), tensors_of(tmp_path)
    left_out = {"embeddings.mask_token"} & read.keys()
    assert read.keys() - left_out == written.keys()
    for tensor in written:
        value = read[tensor]
        assert (written[tensor].dtype, written[tensor].tobytes()) == (value.dtype, value.tobytes())
    assert read_config(tmp_path) == read_config(FOLDER / name)


@pytest.mark.contract
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_again(name, tmp_path):
    save_pretrained(load(name), tmp_path)
    model, tokenizer = load_pretrained(tmp_path)
    assert tokenizer is None
    check_same(model, load(name))


@pytest.mark.contract
@pytest.mark.parametrize("name", [name for name in NAMES if (FOLDER / name / "gradients.safetensors").exists()])
def test_gradients_are_the_same(name, tmp_path):
    golden = outputs_of(name)
    graphdef, state = nnx.split(load(name))

    @jax.jit
    @jax.grad
    def gradients(state):
        target = [golden["target_ids"][:1]] if "target_ids" in golden else []
        return jnp.square(nnx.merge(graphdef, state)(golden["ids"][:1], *target)).mean()

    save_pretrained(nnx.merge(graphdef, gradients(state)), tmp_path)
    ours, theirs = tensors_of(tmp_path), safetensors.numpy.load_file(FOLDER / name / "gradients.safetensors")
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(value).max() for value in theirs.values())
    for tensor, value in theirs.items():  # that of a key's bias is 0, and elsewhere rounding
        np.testing.assert_allclose(ours[tensor], value, rtol=0, atol=2e-5 * max(np.abs(value).max(), 1e-2 * largest))


@pytest.mark.parametrize(
    ("layout", "shape", "other"),
    [
        ("O I -> I O", (5, 3), (3, 5)),
        ("(N 3 H) I -> I (3 N H)", (30, 7), (7, 30)),
        ("E D (F 2) -> E D (2 F)", (3, 5, 14), (3, 5, 14)),
        ("D C h w -> (h w C) D", (11, 3, 2, 7), (42, 11)),
        ("1 T D -> T D", (1, 5, 7), (5, 7)),
    ],
)
def test_a_layout_is_its_own_inverse(layout, shape, other):
    sizes = {"N": 5, "H": 2, "h": 2, "w": 7}
    array = np.arange(math.prod(shape)).reshape(shape)
    there = arrange(array, layout, sizes)
    assert there.shape == arranged_shape(shape, layout, sizes) == other
    np.testing.assert_array_equal(arrange(there, reverse(layout), sizes), array)


def test_a_layout_means_what_einops_says():
    np.testing.assert_array_equal(arrange(np.arange(6), "(F 2) -> (2 F)", {}), [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(
        arrange(np.arange(12), "(N 3 H) -> (3 N H)", {"N": 2}), [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    )
    with pytest.raises(ValueError, match="layout: .* does not fit the shape"):
        arrange(np.zeros((5, 2)), "(N 3 H) I -> I (3 N H)", {"H": 2})


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


def test_a_name_is_looked_up_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--tiny--gpt2", "0" * 40
    shutil.copytree(FOLDER / "gpt2", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert load_pretrained("tiny/gpt2")[0].config == load("gpt2").config
    with pytest.raises(
        CheckpointError,
        match="tiny/gpt3: there is no such folder, nor all of such a model in the cache.*HF_HUB_OFFLINE",
    ):
        load_pretrained("tiny/gpt3")
    for name in (tmp_path / "gpt3", "../gpt3", "a/b/c", "", "a" * 300, "a\0b"):
        with pytest.raises(CheckpointError, match="there is no such folder"):
            load_pretrained(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"hub: pip install 'attnax\[pretrained\]'"):
        load_pretrained("tiny/gpt3")


def test_of_the_hub_only_what_is_read_is_loaded(monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.extend(allow_patterns)
        return FOLDER / "gpt2"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_pretrained("tiny/gpt2")
    read = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "1_Pooling/config.json"]
    read += ["tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
    read += ["preprocessor_config.json", "adapter_config.json"]
    other = ["onnx/model.safetensors", "original/consolidated.safetensors", "model.fp32.safetensors", "code.py"]
    other += ["pytorch_model.bin", "onnx/config.json", "adapter_model.bin"]
    assert list(huggingface_hub.utils.filter_repo_objects(read + other, allow_patterns=asked)) == read


def copy_with(name, folder, **fields):
    """A golden with other fields in its config.json."""
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(name) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model_type": "llama5"}, "model_type must be one of llama, .*; got model_type='llama5'"),
        ({"model_type": ["llama"]}, "model_type must be one of"),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            "architectures must be one of LlamaForCausalLM, LlamaModel, .*; got",
        ),
        ({"shiny_new_trick": 7}, "shiny_new_trick=7 is no field of llama that is known here"),
        ({"hidden_size": "36"}, "hidden_size must be a whole number of at least 0 .*; got hidden_size='36'"),
        ({"hidden_size": None}, "hidden_size must be a whole number"),
        ({"hidden_size": 1 << 40}, "hidden_size must be a whole number"),
        ({"hidden_act": "mish"}, "hidden_act must be one of silu, .*; got hidden_act='mish'"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be a number"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"is_decoder": True}, "is_decoder must be False, which is all that is supported; got is_decoder=True"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object or null"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of default, linear"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "more": 1}}, "rope_type='linear' must have no"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a number; got factor=None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "must have low_freq_factor and high_freq_factor"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": math.e, "mscale": 1, "mscale_all_dim": -10}},
            "mscale and mscale_all_dim must be above 0",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0, "mscale": 1, "mscale_all_dim": 1}}, "factor must be"),
        ({"pad_token_id": "junk"}, "pad_token_id must be a token, or null; got pad_token_id='junk'"),
        ({"hidden_act": "x" * 1000}, f"got hidden_act='{'x' * 59}\\.\\.\\.\\."),
        ({"num_key_value_heads": 4}, "num_heads must be a multiple of num_kv_heads"),
        ({"num_hidden_layers": 100_000}, "its 21 tensors are not those of num_layers=100000"),
        ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 1}, r"'model.layers.1.input_layernorm.weight' is float32\(36,\); no such tensor"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_understood_is_refused_in_words(tmp_path, fields, problem):
    with pytest.raises(CheckpointError, match=problem):
        load_pretrained(copy_with("llama2", tmp_path, **fields))


def test_two_names_of_the_rotary_positions_must_say_the_same(tmp_path):
    for name in ("llama2", "gemma3"):
        with pytest.raises(CheckpointError, match="must say the same where both are there; got rope_base"):
            load_pretrained(copy_with(name, tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0}))


LLAMA3_ROPE = dict(config_of("llama3")["rope_parameters"])
YARN_ROPE = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 19}
YARN_FACTOR = {"attention_factor": 0.1 * math.log(3.0) + 1.0}
YARN_RATIO = {"attention_factor": (0.07 * math.log(3.0) + 1.0) / (0.04 * math.log(3.0) + 1.0)}
DEFAULT_ROPE = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ({"rope_parameters": {"rope_theta": 10000.0}, "rope_scaling": DEFAULT_ROPE}, {}),
        (
            {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": DEFAULT_ROPE, "rope_theta": 5.0},
            {"rope_theta": 5.0},
        ),
        ({"rope_parameters": LLAMA3_ROPE, "rope_scaling": LLAMA3_ROPE}, {"rope_parameters": LLAMA3_ROPE}),
        ({"rope_parameters": LLAMA3_ROPE, "rope_scaling": None}, {"rope_parameters": LLAMA3_ROPE}),
        ({"rope_parameters": None, "rope_scaling": LLAMA3_ROPE}, {"rope_parameters": LLAMA3_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"mscale": 0.7} | YARN_FACTOR}, {"rope_scaling": YARN_ROPE | YARN_FACTOR}),
        ({"rope_scaling": YARN_ROPE | {"mscale": 0.7}}, {"rope_scaling": YARN_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"mscale_all_dim": 0.7}}, {"rope_scaling": YARN_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"truncate": None}}, {"rope_scaling": YARN_ROPE | {"truncate": False}}),
        ({"rope_scaling": YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 0}}, {"rope_scaling": YARN_ROPE}),
        (
            {"rope_scaling": YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 0.4}},
            {"rope_scaling": YARN_ROPE | YARN_RATIO},
        ),
        ({"rope_scaling": YARN_ROPE | {"finetuned": True}}, {"rope_scaling": YARN_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"low_freq_factor": 5.0, "beta_fast": None}}, {"rope_scaling": YARN_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"type": "linear"}}, {"rope_scaling": YARN_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"factor": None}}, {"rope_scaling": YARN_ROPE | {"factor": 67 / 19}}),
        (
            {"rope_scaling": YARN_ROPE, "original_max_position_embeddings": 31},
            {"rope_scaling": YARN_ROPE | {"original_max_position_embeddings": 31}},
        ),
        ({"rope_scaling": LLAMA3_ROPE | {"beta_fast": 5.0} | YARN_FACTOR}, {"rope_scaling": LLAMA3_ROPE}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "truncate": False, "partial_rotary_factor": 1.0}},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        ({"rope_scaling": DEFAULT_ROPE | {"factor": 5.0}, "original_max_position_embeddings": 5}, {}),
    ],
)
def test_what_is_said_of_rotary_positions_means_what_it_means_in_transformers(said, same):
    plain = {key: value for key, value in config_of("llama2").items() if key != "rope_parameters"}
    family = find_family(plain, Path("config.json"))
    got, expected = (family.read_config(plain | fields, "config.json") for fields in (said, same))
    assert got == expected


def test_rope_scaling_beside_the_rotary_positions_of_each_kind_of_layer_is_that_of_global_ones():
    config = config_of("gemma3")
    family = find_family(config, Path("config.json"))
    expected = family.read_config(config, "config.json")
    for beside in ({"type": "linear", "factor": 2.5}, {"rope_theta": 3000.0}, {}):
        more = {"rope_scaling": beside, "original_max_position_embeddings": 5}
        assert family.read_config(config | more, "config.json") == expected


def test_all_that_is_wrong_with_a_config_is_said_at_once(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(copy_with("llama2", tmp_path, hidden_size=-1, hidden_act=3, new=1))
    assert [problem.split(" ")[0].split("=")[0] for problem in caught.value.problems] == [
        "hidden_act",
        "hidden_size",
        "new",
    ]
    with pytest.raises(CheckpointError, match="3 problems"):
        raise caught.value


def test_files_that_older_versions_wrote_are_read(tmp_path):
    """Without prefix, with buffers, a head beside tied embeddings, and rope as version 4 wrote it."""
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
    """With an untied head tie_word_embeddings is false; the table may be there three times."""
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
    """The tensors, some of them by other names."""
    return {names.get(name.replace(".", "_"), name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "table", "other"),
    [
        ("t5_variant", "shared_weight", "decoder.embed_tokens.weight"),  # as Madlad-400 has it
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


def test_an_mt5_by_the_name_of_t5_is_refused(tmp_path):
    """T5 would divide its logits by the root of the width."""
    kind = {key: config_of("t5")[key] for key in KIND}
    with pytest.raises(CheckpointError, match="tie_word_embeddings=True is of mT5.*Set model_type to 'mt5'"):
        load_pretrained(copy_with("mt5_variant", tmp_path, **kind))


def test_configs_of_t5_that_contradict_themselves_are_refused(tmp_path):
    for fields, problem in (
        ({"is_gated_act": False}, "is_gated_act must be True, as feed_forward_proj has it; got is_gated_act=False"),
        ({"dense_act_fn": "relu"}, "dense_act_fn must be 'gelu_new', as feed_forward_proj has it"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder must be True"),
        ({"relative_attention_num_buckets": 32, "relative_attention_max_distance": 11}, "max_distance must be"),
        ({"num_layers": 10**6}, "its 52 tensors are not those of num_layers=1000000"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            load_pretrained(copy_with("t5_variant", tmp_path, **fields))


def test_an_encoder_decoder_that_t5_has_no_place_for_is_refused():
    encoder = load("t5").config.encoder
    deeper = {"num_layers": 3, "tie_embeddings": True, "logit_scale": encoder.d_model**-0.5}
    for changed, shared, problem in (
        (deeper | {"d_ff": 7}, True, "decoder.d_ff=7 has no place in it; it would be read as 37"),
        (deeper, False, "share_embeddings=False has no place in it"),
        (deeper | {"logit_scale": 0.5}, True, "logit_scale must be 1 or d_model"),
    ):
        decoder = dataclasses.replace(encoder, **changed)
        model = nnx.eval_shape(
            lambda decoder=decoder, shared=shared: Transformer(
                nnx.Rngs(0), encoder=encoder, decoder=decoder, share_embeddings=shared
            )
        )
        with pytest.raises(CheckpointError, match=problem):
            save_pretrained(model, "nowhere")


MODULES = [
    {
        "idx": index,
        "name": str(index),
        "path": path,
        "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}",
    }
    for index, path in enumerate(["", "1_Pooling", "2_Normalize"])
]


@pytest.mark.parametrize(
    ("pool", "normalize"),
    [
        ("mean", True),
        ("cls", False),
        *(pytest.param(*case, marks=pytest.mark.contract) for case in (("mean", False), ("cls", True))),
    ],
)
def test_sentences_are_pooled_as_sentence_transformers_does(tmp_path, pool, normalize):
    golden, folder = outputs_of("bert"), tmp_path / "read"
    shutil.copytree(FOLDER / "bert", folder)
    (folder / "modules.json").write_text(json.dumps(MODULES if normalize else MODULES[:2]))
    modes = {"pooling_mode_mean_tokens": pool == "mean", "pooling_mode_cls_token": pool == "cls"}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**modes, "pooling_mode_max_tokens": False}))
    hidden, real = golden["outputs"], golden["real"][..., None]
    expected = hidden[:, 0] if pool == "cls" else (hidden * real).sum(1) / real.sum(1)
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    model, _ = load_pretrained(folder)
    save_pretrained(model, tmp_path / "written")
    again, _ = load_pretrained(tmp_path / "written")
    assert type(again) is SentenceEncoder and (again.pool, again.normalize) == (pool, normalize)
    np.testing.assert_allclose(run(model, golden), expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="its modules.json would make a SentenceEncoder of what is written"):
        save_pretrained(model.encoder, tmp_path / "written")


NEW_TYPES = ("base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling",
             "base.modules.normalize.Normalize")  # fmt: skip
NEW_MODULES = [
    module | {"type": f"sentence_transformers.{name}"} for module, name in zip(MODULES, NEW_TYPES, strict=True)
]
NEW_TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
NEW_POOLING = {"embedding_dimension": 30, "pooling_mode": "mean", "include_prompt": True}


def sentence_folder(folder, name="bert", modules=NEW_MODULES, pooling=NEW_POOLING, **files):
    """A golden as version 6.2 of sentence-transformers writes it, with these JSON files besides."""
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    for module in ("1_Pooling", "2_Normalize"):
        (folder / module).mkdir(exist_ok=True)
    for file, content in {"modules": modules, "1_Pooling/config": pooling, **files}.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        (NEW_POOLING, "mean"),
        (NEW_POOLING | {"pooling_mode": ["cls"]}, "cls"),
        ({"word_embedding_dimension": 30}, "mean"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": False}, "mean"),
    ],
)
def test_the_pool_of_sentences_is_that_of_sentence_transformers(tmp_path, pooling, pool):
    said = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    files = {"sentence_bert_config": NEW_TRANSFORMER, "2_Normalize/config": said}
    model, _ = load_pretrained(sentence_folder(tmp_path, pooling=pooling, **files))
    assert (type(model), model.pool, model.normalize) == (SentenceEncoder, pool, True)


@pytest.mark.parametrize("name", ["bert_masked", "roberta_masked", "xlm_roberta_masked", "distilbert_masked", "t5"])
def test_sentences_are_those_of_the_encoder_whatever_its_head(tmp_path, name):
    sentence_folder(tmp_path, name)
    config = config_of(name) | {"architectures": ["AnyForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(tmp_path) | {"classifier.weight": np.ones((2, 30), "float16")}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    check_parameters(load_pretrained(tmp_path)[0].encoder, load(name).encoder)


@pytest.mark.parametrize(
    ("files", "cut"),
    [
        ({"sentence_bert_config": {"max_seq_length": 7, "do_lower_case": True}}, 7),
        ({"sentence_roberta_config": {"max_seq_length": 7, "do_lower_case": True}}, 7),
        ({"sentence_bert_config": {"do_lower_case": True}, "tokenizer_config": {"model_max_length": 7}}, 7),
        ({"sentence_bert_config": {"max_seq_length": 999, "do_lower_case": True}}, 23),
        ({"sentence_bert_config": {"do_lower_case": True}, "tokenizer_config": {"model_max_length": 10**30}}, 23),
    ],
)
def test_texts_are_cut_and_lowered_as_sentence_transformers_does(tmp_path, files, cut):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.enable_truncation(3)
    words.enable_padding(length=64)
    sentence_folder(tmp_path, **files)
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_pretrained(tmp_path)[1]
    assert [row.ids for row in tokenizer.encode_batch(["b", "B " * 30])] == [[1] + [0] * (cut - 1), [1] * cut]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"modules": {}}, "must hold a JSON list; got a dict"),
        ({"modules": [1]}, "its modules must be Transformer, Pooling, Normalize"),
        ({"modules": [*MODULES, MODULES[2]]}, "its modules must be"),
        (
            {"modules": [MODULES[0], MODULES[1] | {"path": "../1_Pooling"}]},
            "its modules must be .* second in 1_Pooling",
        ),
        (
            {"modules": [MODULES[0] | {"type": "custom.Transformer"}, MODULES[1]]},
            "got .'custom.Transformer', 'Pooling'",
        ),
        (
            {"modules": [*MODULES[:2], {"path": "2_Dense", "type": "sentence_transformers.base.modules.dense.Dense"}]},
            "its modules must be .*; got .'Transformer', 'Pooling', 'Dense'",
        ),
        (
            {"pooling": NEW_POOLING | {"pooling_mode": ["mean", "max"]}},
            "pooling_mode must be 'mean' or 'cls'; got .'mean",
        ),
        ({"pooling": {"pooling_mode_max_tokens": True}}, "pooling_mode must be 'mean' or 'cls'; got .'max'"),
        ({"pooling": NEW_POOLING | {"pooling_mode": {}}}, "pooling_mode must be 'mean' or 'cls'; got"),
        ({"pooling": NEW_POOLING | {"include_prompt": False}}, "include_prompt must be true; got include_prompt=False"),
        ({"pooling": NEW_POOLING | {"more": 1}}, "more=1 is no field of a Pooling"),
        ({"sentence_bert_config": NEW_TRANSFORMER | {"transformer_task": "fill-mask"}}, "transformer_task must be"),
        ({"sentence_bert_config": {"modality_config": {"text": {}}}}, "modality_config must be"),
        ({"2_Normalize/config": {"module_input_name": "token_embeddings"}}, "module_input_name must be 'sentence_emb"),
    ],
)
def test_what_sentence_transformers_does_more_is_refused(tmp_path, files, problem):
    with pytest.raises(CheckpointError, match=problem):
        load_pretrained(sentence_folder(tmp_path, **files))


SIZES = {"vocab_size": 11, "d_model": 12, "num_heads": 3, "num_layers": 3, "d_ff": 20, "max_len": 16}
LLAMA = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False}


def test_a_model_is_written_as_the_family_that_has_a_place_for_all_of_it(tmp_path):
    for fields, expected in (
        (LLAMA | {"num_kv_heads": 1, "rope_scaling": {"kind": "linear", "factor": 2.0}}, "llama"),
        ({"pos_emb_type": "learned", "tie_embeddings": True, "attention_scale": 1.0}, "gpt2"),
    ):
        model = build(lambda rngs, fields=fields: TransformerLM(rngs, **SIZES, **fields))
        save_pretrained(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == expected
        read, _ = load_pretrained(tmp_path)
        assert read.config == dataclasses.replace(model.config, dropout_rate=0.0)
        check_parameters(read, model)


def test_a_model_is_written_as_what_it_was_loaded_as_while_that_fits(tmp_path):
    def written(model, **options):
        save_pretrained(model, tmp_path, **options)
        return json.loads((tmp_path / "config.json").read_text())["model_type"]

    model, scan = load("mistral_variant"), nnx.jit(with_scan_layers, static_argnums=1)
    for other in (nnx.merge(*nnx.split(model)), nnx.clone(model), copy.deepcopy(model), scan(model, True)):
        assert written(other) == "mistral"
    assert written(model, family="llama") == "llama"
    other = nnx.clone(model)
    other.config = dataclasses.replace(model.config, rope_fraction=4 / 6)
    assert written(other) == "phi3"  # mistral rotates whole heads
    assert written(SentenceEncoder(load("xlm_roberta"))) == "xlm-roberta"


def test_layers_that_are_scanned_are_written_as_others(tmp_path):
    model = load("gpt2")
    save_pretrained(nnx.jit(with_scan_layers, static_argnums=1)(model, True), tmp_path)
    check_same(load_pretrained(tmp_path)[0], model)


def test_a_model_of_two_dtypes_is_written(tmp_path):
    model = build(lambda rngs: TransformerLM(rngs, **SIZES, **LLAMA))
    for name, dtype in (("embed", jnp.bfloat16), ("norm", jnp.float16)):
        part = getattr(model.decoder, name)
        nnx.update(part, jax.tree.map(lambda array, dtype=dtype: np.asarray(array, dtype), nnx.state(part, nnx.Param)))
    save_pretrained(model, tmp_path)
    assert load_pretrained(tmp_path)[0].config.dtype == "float32"


def test_a_model_that_no_family_has_a_place_for_is_refused_in_words(tmp_path):
    def refused(model, problem, **options):
        with pytest.raises(CheckpointError, match=problem):
            save_pretrained(model, tmp_path / "new", **options)

    def lm(**fields):
        return nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), **SIZES, **fields))

    refused(
        lm(**LLAMA, attention_soft_cap=5.0), "as llama: attention_soft_cap=5.0 has no place in it; it would be .*None"
    )
    refused(
        lm(**LLAMA),
        "save_pretrained, as gpt2: ff_activation must be one of gelu_tanh, .*; got ff_activation='swiglu'",
        family="gpt2",
    )
    refused(lm(**LLAMA), "family of a TransformerLM must be one of llama, .*; got 'bert2'", family="bert2")
    refused(
        lm(**LLAMA | {"rope_scaling": {"kind": "ntk", "factor": 2.0}}), "rope_scaling must be one of default, linear"
    )
    refused(lm(**LLAMA | {"ff_activation": "relu2"}), "ff_activation must be one of")
    refused(lm(**LLAMA, layer_pattern=[{"rope_base": 5.0}, {}]), r"rope_base=\[5.0, 10000.0, 5.0\] has no place in it")
    refused(
        nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))), "model must be one of TransformerLM.*; got Linear"
    )
    refused(lm(**LLAMA, self_mask=masks.sliding_window(3)), "self_mask must be the causal one")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_every_family_has_a_golden(family):
    assert any(config_of(name)["architectures"] == [family.architecture] for name in NAMES)


def odd_value(rng):
    values = [
        None,
        True,
        -1,
        0,
        1,
        3,
        2**31,
        2**63,
        10**400,
        1.5,
        1e308,
        "",
        "silu",
        "é",
        [],
        [[]],
        {},
        {"rope_type": 3},
    ]
    return copy.deepcopy(values[rng.integers(len(values))])


def few_and_many(few, many):
    """A few mutations in `make test`, all of them beside it."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.contract)])


@few_and_many(12, 300)
@pytest.mark.parametrize("name", NAMES)
def test_of_mutated_configs_only_our_own_exception_comes_out(name, count):
    rng = np.random.default_rng(SEED)
    config = config_of(name)
    family = next(family for family in FAMILIES if [family.architecture] == config["architectures"])
    refused = 0
    for _ in range(count):
        mutated = copy.deepcopy(config)
        for _ in range(rng.integers(1, 3)):
            holders = [mutated, *(value for value in mutated.values() if isinstance(value, dict) and value)]
            holder = holders[rng.integers(len(holders))]
            key = list(holder)[rng.integers(len(holder))]
            if rng.integers(4):
                holder[key] = odd_value(rng)
            else:
                del holder[key]
        try:
            family.read_config(mutated, "config.json")
        except CheckpointError:
            refused += 1
    assert refused > count / 6


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 10),
        *(pytest.param(name, 40, marks=pytest.mark.contract) for name in ("gpt2", "t5_variant", "gemma3", "qwen3_moe")),
    ],
)
def test_of_models_that_mutated_configs_describe_only_our_own_exception_comes_out(name, count, tmp_path):
    """The config is whole JSON, and the files are compared with it."""
    rng = np.random.default_rng(2)
    config = config_of(name)
    refused = 0
    for _ in range(count):
        mutated = {key: value for key, value in config.items() if rng.integers(12)}
        key = list(config)[rng.integers(len(config))]
        mutated[key] = odd_value(rng)
        try:
            shutil.copytree(FOLDER / name, tmp_path, dirs_exist_ok=True)
            (tmp_path / "config.json").write_text(json.dumps(mutated))
            load_pretrained(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > count / 4


@few_and_many(20, 80)
def test_of_mutated_folders_only_our_own_exception_comes_out(tmp_path, count):
    """The files of a sharded checkpoint together, through the front door."""
    rng = np.random.default_rng(1 + SEED)
    shutil.copytree(FOLDER / "llama3", tmp_path, dirs_exist_ok=True)
    files = [path for path in sorted(tmp_path.iterdir()) if path.suffix in (".json", ".safetensors")]
    refused = 0
    for _ in range(count):
        path = files[rng.integers(len(files))]
        content = path.read_bytes()
        place = int(rng.integers(min(len(content), 3000)))
        path.write_bytes(content[:place] + rng.bytes(rng.integers(3)) + content[place + int(rng.integers(3)) :])
        try:
            load_pretrained(tmp_path)
        except CheckpointError:
            refused += 1
        path.write_bytes(content)
    assert refused > count / 2

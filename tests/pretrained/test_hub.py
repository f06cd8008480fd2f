"""Names of models on a hub; the tests run a hub on this machine."""

import json
import re
import shutil
import sys

import huggingface_hub
import pytest
from fake_hub import GATED, fake_hub
from golden_copies import FOLDER, load
from huggingface_hub import constants

from attnax.errors import install_command
from attnax.pretrained import CheckpointError, load_pretrained
from attnax.pretrained.hub import find_folder

BESIDE = ("tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "tokenizer.model")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Models for the tests, a new one for each, so that no test finds the cache of another."""
    folders = tmp_path_factory.mktemp("hub")
    whole = folders / "whole"
    shutil.copytree(FOLDER / "gpt2", whole)
    for file in (*BESIDE, "preprocessor_config.json", "pytorch_model.bin", "onnx/model.safetensors"):
        (whole / file).parent.mkdir(exist_ok=True)
        (whole / file).write_text("{}")
    old, pickles, adapter, empty = (folders / name for name in ("old", "pickles", "adapter", "empty"))
    for folder in (old, pickles, adapter, empty):
        folder.mkdir()
    shutil.copy(FOLDER / "gpt2" / "model.safetensors", old)
    config = json.loads((FOLDER / "gpt2" / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.25}))
    shutil.copy(FOLDER / "gpt2" / "config.json", pickles)
    (pickles / "pytorch_model.bin").write_text("")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    (adapter / "adapter_model.safetensors").write_text("")
    (empty / "README.md").write_text("")
    models = {"tiny/gpt2": {"main": whole, "v1": old}, "tiny/pickles": {"main": pickles}}
    models |= {"tiny/adapter": {"main": adapter}, "tiny/empty": {"main": empty}, "tiny/gated": {"main": GATED}}
    with fake_hub(models) as served:
        yield served


@pytest.fixture(autouse=True)
def environment(hub, tmp_path, monkeypatch):
    """The effect of HF_ENDPOINT and HF_HOME set before the import."""
    url, asked = hub
    asked.clear()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def test_the_hub_is_not_asked_for_what_should_be_in_a_folder(hub, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="runs/001: there is no such folder in runs. The hub is not"):
        find_folder("runs/001")
    assert not hub[1]


def test_a_name_is_loaded_from_the_hub_and_then_without_it(monkeypatch):
    folder = find_folder("tiny/gpt2")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", *BESIDE}
    assert not names & {"pytorch_model.bin", "onnx/model.safetensors"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_folder("tiny/gpt2") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    assert find_folder("tiny/gpt2") == folder


def test_a_revision_is_that_of_the_hub():
    assert load_pretrained("tiny/gpt2", revision="v1")[0].config.norm_eps == 0.25
    with pytest.raises(
        CheckpointError, match="tiny/gpt2: the hub has this model, but no such revision of it; got rev.*v9"
    ):
        load_pretrained("tiny/gpt2", revision="v9")


def test_a_folder_has_no_revisions(hub):
    with pytest.raises(
        CheckpointError, match="revision is of a model on the hub, and this is a folder; got revision='v1'"
    ):
        load_pretrained(FOLDER / "gpt2", revision="v1")
    assert not hub[1]


def test_a_name_that_the_hub_does_not_know_is_an_error_in_words():
    with pytest.raises(
        CheckpointError, match="tiny/none: there is no such folder, and the hub has no such public model.*auth login"
    ):
        load_pretrained("tiny/none")


def test_a_model_that_its_owner_guards_says_how_to_get_it():
    with pytest.raises(
        CheckpointError, match="access needs its owner's permission. Ask for it on http.*/tiny/gated, then: hf auth"
    ):
        load_pretrained("tiny/gated")


def test_a_hub_that_cannot_be_reached_is_an_error_in_words(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match="the cache of .* holds no such model, and the hub gave none .*Load it where there is"
    ):
        load_pretrained("tiny/gpt2")


def test_a_name_that_is_not_in_the_cache_without_a_network_is_an_error_in_words(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set. Unset it"):
        load_pretrained("tiny/gpt2")
    assert not hub[1]


def test_a_model_on_the_hub_without_safetensors_says_what_it_has():
    with pytest.raises(
        CheckpointError, match=r"tiny/pickles: .*pytorch_model.bin.*GPT2LMHeadModel.from_pretrained\('tiny/pic"
    ):
        load_pretrained("tiny/pickles")
    with pytest.raises(CheckpointError, match="tiny/empty: it must hold model.safetensors, or"):
        load_pretrained("tiny/empty")


def test_an_adapter_on_the_hub_says_that_it_is_one():
    with pytest.raises(CheckpointError, match=r"it is an adapter \(peft_type='LORA'\) of the model 'a/b', not a model"):
        load_pretrained("tiny/adapter")


def test_a_name_is_looked_up_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--tiny--gpt2", "0" * 40
    shutil.copytree(FOLDER / "gpt2", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert load_pretrained("tiny/gpt2")[0].config == load("gpt2").config
    with pytest.raises(
        CheckpointError,
        match="tiny/gpt3: there is no such folder, the cache of .* does not hold all of such a model.*HF_HUB_OFFLINE",
    ):
        load_pretrained("tiny/gpt3")
    for name in (tmp_path / "gpt3", "../gpt3", "a/b/c", "", "a" * 300, "a\0b"):
        with pytest.raises(CheckpointError, match="there is no such folder"):
            load_pretrained(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=f"hub: {re.escape(install_command('pretrained'))}"):
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

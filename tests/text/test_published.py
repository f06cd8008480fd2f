"""Models of published checkpoints that write text."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tokenizers

from attnax.cli import main
from attnax.pretrained import load_pretrained
from attnax.text import open_published

FOLDER = Path(__file__).parents[1] / "goldens" / "pretrained"


@pytest.fixture
def opened(monkeypatch):
    """How often each JSON file was opened, by its name in the folder."""
    count, original = Counter(), io.open

    def count_and_open(file, *arguments, **options):
        path = Path(file) if isinstance(file, str | Path) else Path()
        if path.suffix == ".json":
            count[path.name] += 1
        return original(file, *arguments, **options)

    monkeypatch.setattr(io, "open", count_and_open)
    return count


def copy_of(name, folder, **files):
    """A golden with a tokenizer and other JSON files."""
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.save(str(folder / "tokenizer.json"))
    for file, content in files.items():
        (folder / f"{file}.json").parent.mkdir(exist_ok=True)
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


def test_every_json_file_is_read_once(tmp_path, opened):
    folder = copy_of("llama3", tmp_path, generation_config={"eos_token_id": 1})
    names = {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"}
    opened.clear()
    open_published(folder)
    assert opened == dict.fromkeys(names, 1)
    opened.clear()
    assert main(["generate", str(folder), "--prompt", "b", "--max-new-tokens", "1"]) == 0
    assert {name: opened[name] for name in names} == dict.fromkeys(names, 1)


def test_every_json_file_of_a_sentence_encoder_is_read_once(tmp_path, opened):
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    files = {"sentence_bert_config": {"do_lower_case": True}, "tokenizer_config": {"model_max_length": 7}}
    folder = copy_of("bert", tmp_path, modules=modules, **files, **{"1_Pooling/config": {}})
    opened.clear()
    load_pretrained(folder)
    assert opened.pop("config.json") == 2  # the model's, and 1_Pooling's
    assert set(opened.values()) == {1} and opened.keys() >= {"modules.json", "sentence_bert_config.json"}

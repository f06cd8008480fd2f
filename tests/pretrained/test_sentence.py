"""Folders of sentence-transformers."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from golden_copies import FOLDER, check_parameters, config_of, load, outputs_of, run, tensors_of

from attnax.models import SentenceEncoder
from attnax.pretrained import CheckpointError, load_pretrained, save_pretrained

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
    with pytest.raises(CheckpointError, match="its modules.json would make the model a SentenceEncoder"):
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
    """A golden in the form of version 6.2 of sentence-transformers, with these JSON files added."""
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

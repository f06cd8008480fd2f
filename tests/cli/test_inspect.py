"""`attnax inspect`."""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from published_models import CODES, FOLDER, NAMES, modify
from small_tokenizers import (
    byte_level,
    copy_of,
)

from attnax.cli import main
from attnax.cli.inspect import collapse
from attnax.pretrained import CheckpointError, load_pretrained
from attnax.pretrained.inspect import inspect_folder
from attnax.training import open_run


class TestInspect:
    def test_it_shows_the_model_the_parameters_and_the_memory(self, show):
        code, text = show(FOLDER / "gpt2")
        assert code == 0 and "problems" not in text
        for line in (
            "transformers model_type='gpt2', architectures=['GPT2LMHeadModel']",
            "attnax TransformerLM",
            "config d_model=28",
            " tie_embeddings=True",
            "decoder.embed.tokens.embedding 61x28 float32 1,708 transformer.wte.weight",
            "decoder.stack.blocks.{0..1}.attention.key.bias 28 float32 56 transformer.h.{0..1}.attn.c_attn.bias",
            "decoder.stack.blocks.{0..1}.feed_forward.up.bias 37 float32 74 transformer.h.{0..1}.mlp.c_fc.bias",
            "parameters 14,634: 58.5 kB as float32, 29.3 kB as bfloat16 or float16",
            "files 28 tensors, 58.5 kB of float32",
        ):
            assert line in text.splitlines()
        assert "max_norm" not in text and "attention_soft_cap" not in text  # defaults are not printed

    def test_layers_that_differ_have_lines_of_their_own(self, show):
        _, text = show(FOLDER / "qwen3_moe")
        assert "decoder.stack.blocks.{0,2,3}.feed_forward.up.kernel" in text
        experts = "model.layers.1.mlp.experts.{0..4}.up_proj.weight"
        assert f"decoder.stack.blocks.1.feed_forward.up 5x36x11 float32 1,980 {experts}" in text
        _, text = show(FOLDER / "llama3")
        assert "bfloat16 4,320" in text and "of bfloat16" in text

    @pytest.mark.thorough
    @pytest.mark.parametrize("name", NAMES)
    def test_every_golden_can_be_loaded_and_counts_as_many_parameters(self, name, show):
        code, text = show(FOLDER / name)
        model, _ = load_pretrained(FOLDER / name)
        count = sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert code == 0 and f"parameters {count:,}:" in text and f"attnax {type(model).__name__}" in text
        table = re.findall(r"^\S+ [\dx]+ \w+ ([\d,]+) \S+$", text, re.MULTILINE)
        assert sum(int(number.replace(",", "")) for number in table) == count

    def test_halves_have_lines_of_their_own(self, show):
        code, text = show(FOLDER / "t5")
        assert code == 0 and "encoder.num_layers=2\n" in text and "decoder.num_layers=1\n" in text
        assert "share_embeddings=True" in text and "encoder.stack.blocks.{0..1}.attention.query.kernel 30x35" in text

    def test_no_tensor_is_read(self, show, monkeypatch):
        def refuse(rest, file, info):
            raise AssertionError(info)

        monkeypatch.setattr("attnax.pretrained.safetensors._fill", refuse)
        with pytest.raises(AssertionError):
            load_pretrained(FOLDER / "gpt2")
        assert show(FOLDER / "gpt2")[0] == 0

    def test_what_nothing_reads_does_not_hide_the_rest(self, show, tmp_path):
        """Unknown fields and wrong tensors are named together, and the table is printed."""

        def change(tensors):
            del tensors["model.norm.weight"]
            tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((2, 3), "f")
            return tensors | {"model.layers.0.extra": np.ones(3, "f"), "rotary_emb.inv_freq": np.ones(5, "f")}

        folder = modify("llama2", tmp_path, {"logit_scale": 0.5}, change)
        code, text = show(folder)
        table, problems = text.split("problems (4), so that it cannot be loaded")
        assert code == 1
        assert "logit_scale=0.5 is no field of llama" in problems and "'model.norm.weight' is missing" in problems
        assert "'model.layers.0.mlp.up_proj.weight' is float32(2, 3); a floating tensor of shape" in problems
        assert "'model.layers.0.extra' is float32(3,); no such tensor was expected" in problems
        assert "decoder.norm.scale 36 missing 36 model.norm.weight" in table
        unknown, extra = table.split("in the files, and not known to be a parameter")[1].split(
            "in the files without parameters"
        )
        assert "3 float32 3 model.layers.0.extra" in unknown and "inv_freq" not in unknown
        assert "5 float32 5 rotary_emb.inv_freq" in extra
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(folder)
        assert len(caught.value.problems) == 4

    def test_a_tokenizer_that_cannot_be_read_is_a_problem(self, show, tmp_path):
        folder = modify("llama2", tmp_path)
        path = folder / "tokenizer.json"
        copy_of(byte_level).save(str(path))
        assert show(folder)[0] == 0
        path.write_bytes(path.read_bytes()[:-9])
        code, text = show(folder)
        (problem,) = text.split("problems (1), so that it cannot be loaded\n ")[1].splitlines()
        assert code == 1 and problem.startswith(f"{path}: it is no tokenizer of the tokenizers library (")
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(folder)
        assert str(caught.value) == problem
        path.unlink()
        path.mkdir()
        code, text = show(folder)
        assert code == 1 and "tokenizer.json: it is no file" in text

    def test_a_head_that_differs_from_the_embeddings_is_noticed_on_loading_only(self, show, tmp_path):
        def change(tensors):
            return tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}

        folder = modify("gpt2", tmp_path, (), change)
        assert show(folder)[0] == 0
        with pytest.raises(CheckpointError, match="must repeat the embeddings"):
            load_pretrained(folder)

    def test_a_head_that_repeats_the_embeddings_is_beside(self, show, tmp_path):
        def change(tensors):
            return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}

        code, text = show(modify("gpt2", tmp_path, (), change))
        assert code == 0 and "61x28 float32 1,708 lm_head.weight" in text.split("in the files without parameters")[1]
        assert "parameters 14,634:" in text

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            ({"model_type": "mamba"}, "config.json: model_type must be one of llama, mistral"),
            ({"hidden_act": "mish"}, "config.json: hidden_act must be one of silu"),
        ],
    )
    def test_a_model_that_is_not_understood_has_tensors(self, show, tmp_path, fields, problem):
        code, text = show(modify("llama2", tmp_path, fields))
        assert code == 1 and problem in text and "problems (1)" in text
        shapes = safetensors.numpy.load_file(FOLDER / "llama2" / "model.safetensors")
        rows, columns = shapes["model.layers.0.self_attn.q_proj.weight"].shape
        line = f"{rows}x{columns} float32 {2 * rows * columns:,} model.layers.{{0..1}}.self_attn.q_proj.weight"
        assert line in text.splitlines() and "files 21 tensors" in text

    def test_another_head_is_read_as_that_of_its_family(self, show, tmp_path):
        def change(tensors):
            return tensors | {"score.weight": np.ones((2, 36), "f")}

        fields = {"architectures": ["LlamaForSequenceClassification"]}
        code, text = show(modify("llama2", tmp_path, fields, change))
        assert code == 1 and "decoder.stack.blocks.{0..1}.attention.query.kernel" in text
        assert "architectures must be one of LlamaForCausalLM" in text and "'score.weight' is" in text

    def test_folders_without_the_files(self, show, tmp_path):
        folder = modify("llama2", tmp_path)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        code, text = show(folder)
        assert code == 1 and "d_model=36" in text and "only .safetensors files are read" in text
        (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
        (folder / "config.json").unlink()
        code, text = show(folder)
        assert code == 1 and "config.json: there is no such file" in text and "files 21 tensors" in text
        (folder / "model.safetensors").unlink()

    def test_pooling_is_shown(self, show, tmp_path):
        folder = modify("bert", tmp_path)
        kinds = ("Transformer", "Pooling")
        modules = [
            {"type": f"sentence_transformers.models.{kind}", "path": path}
            for kind, path in zip(kinds, ("", "1_Pooling"), strict=True)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
        code, text = show(folder)
        assert code == 0 and "attnax SentenceEncoder of a TransformerEncoder" in text
        (folder / "1_Pooling" / "config.json").unlink()
        code, text = show(folder)
        assert code == 1 and "1_Pooling/config.json: there is no such file" in text and "encoder" in text.lower()

    def test_tensors_cannot_speak_to_the_terminal(self, show, tmp_path):
        code, text = show(modify("llama2", tmp_path, (), lambda tensors: tensors | {"\x1b[31m": np.ones(3, "f")}))
        assert code == 1 and r"\x1b[31m" in text and "\x1b" not in text

    @pytest.mark.parametrize(
        "fields",
        [
            {CODES: 1},
            {"architectures": CODES},
            {"model_type": CODES},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0, CODES: 1}},
            {"rope_parameters": {"rope_type": CODES}},
            {"hidden_act": CODES},
        ],
    )
    def test_configs_cannot_speak_to_the_terminal(self, tmp_path, capfd, fields):
        folder = modify("llama2", tmp_path, fields)
        copy_of(byte_level).save(str(folder / "tokenizer.json"))
        assert (main(["inspect", str(folder)]), main(["generate", str(folder)])) == (1, 2)
        for text in capfd.readouterr():
            assert r"\x1b[31m\nattnax: all is well\ud800" in text
            assert all(line.isprintable() and not line.startswith("attnax: all is well") for line in text.split("\n"))

    def test_names_that_no_model_has_are_shown_as_they_are(self, show, tmp_path):
        """Numbers too long for Python, a hole in place of a number, digits of other scripts."""
        long, names = "9" * 5000, ["a.{}", "a.0", "a.1", "a.01", "a.\u0663"]
        extra = {name: np.ones(3, "f") for name in [*names, f"a.{long}"]}
        code, text = show(modify("gpt2", tmp_path, (), lambda tensors: tensors | extra))
        assert code == 1
        for name, count in (("{}", 3), ("{0..1}", 6), ("01", 3), ("\u0663", 3), (long, 3)):
            assert f"3 float32 {count} a.{name}" in text.splitlines()

    def test_a_run_is_shown_too(self, run, show):
        code, text = show(run)
        count = sum(array.size for array in jax.tree.leaves(nnx.state(open_run(run).model, nnx.Param)))
        assert code == 0 and "attnax TransformerLM, a run after 12 updates" in text and f"parameters {count:,}:" in text
        assert "config d_model=16" in text and "decoder.stack.blocks.0.attention.query.kernel 16x16 float32 256" in text

    def test_the_dtype_given_is_that_of_the_model(self):
        assert inspect_folder(FOLDER / "llama3", "float32").config.dtype == "float32"
        (refusal,) = inspect_folder(FOLDER / "llama3", "float64").refusals
        assert "JAX has no float64" in str(refusal)

    @pytest.mark.parametrize(
        ("names", "name"),
        [
            (["a.0.b", "a.1.b", "a.2.b"], "a.{0..2}.b"),
            (["a.3.b", "a.7.b"], "a.{3,7}.b"),
            (["a.4"], "a.4"),
            (["a.0.b.5", "a.0.b.6", "a.1.b.5", "a.1.b.6"], "a.{0..1}.b.{5..6}"),
            (["a2.x", "a2.x"], "a2.x"),
            (["a.1234567890"], "a.1234567890"),
            (["a.{}"], "a.{}"),
        ],
    )
    def test_names_that_differ_in_numbers_are_one(self, names, name):
        assert collapse(names) == name

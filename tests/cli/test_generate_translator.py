"""`attnax generate` with an encoder-decoder."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published_models import GREEDY, refuse
from small_tokenizers import (
    END,
    START,
    UNKNOWN,
    copy_of,
    unigram,
)
from tiny import build

from attnax import Transformer, TransformerConfig
from attnax.cli import generate as generate_module
from attnax.cli import main
from attnax.errors import InputError
from attnax.pretrained import load_pretrained
from attnax.text import PublishedCodec, Translator, open_published


class TestTranslator:
    """An encoder-decoder reads the prompt and writes a text of its own."""

    @pytest.fixture
    def written(self, translator, capsys):
        def call(*options):
            capsys.readouterr()
            assert main(["generate", str(translator), "--prompt", "a time", *map(str, options)]) == 0
            return capsys.readouterr()

        return call

    def test_it_writes_the_likeliest_tokens_after_the_source(self, translator, written, streamed):
        model, tokenizer = load_pretrained(translator)
        source = np.array([tokenizer.encode("a time").ids])
        assert source[0, 0] == START and source[0, -1] == END
        out = written(*GREEDY, "--max-new-tokens", 9).out
        assert out == tokenizer.decode(streamed) + "\n" != "\n" and len(streamed) == 9  # without the prompt
        begun = np.array([[UNKNOWN, *streamed[:-1]]])
        log_probs = np.asarray(nnx.jit(Transformer.log_probs)(model, source, begun))
        assert log_probs[0].argmax(-1).tolist() == streamed

    @pytest.mark.contract
    def test_it_writes_what_the_model_makes_of_the_source(self, translator, written):
        model, tokenizer = load_pretrained(translator)
        source = jnp.array([tokenizer.encode("a time").ids])
        assert source[0, 0] == START and source[0, -1] == END
        made = model.generate(source, 9, UNKNOWN, END)
        want = tokenizer.decode(made.tokens[0, : made.lengths[0]].tolist())
        options = (*GREEDY, "--max-new-tokens", 9)
        out, error = written(*options, "--log-probs")
        assert out == want + "\n" and want, made.tokens  # without the prompt
        total = float(made.log_probs[0, : made.lengths[0]].sum())
        assert float(re.match(r"log-probability (\S+),", error)[1]) == pytest.approx(total, abs=0.02)
        assert written(*options, "--no-stream").out == out

    @pytest.mark.thorough
    def test_a_draft_and_one_beam_write_the_same(self, translator, written):
        options = (*GREEDY, "--max-new-tokens", 9)
        out = written(*options).out
        assert written(*options, "--draft", translator).out == written("--beams", 1, "--max-new-tokens", 9).out == out

    def test_relative_positions_have_no_longest_text(self, translator, written, monkeypatch):
        """Longer than the n_positions of 13, the default number of new tokens."""
        rooms = []
        monkeypatch.setattr(
            Transformer,
            "stream",
            lambda self, ids, **options: rooms.append((ids.shape[1] > 20, options["max_length"])) or iter(()),
        )
        written()
        written("--prompt", "a tree " * 9, "--max-new-tokens", 40, "--no-repeat-ngram", 30)
        assert rooms == [(False, 13), (True, 40)]

    def test_each_half_has_a_context_where_positions_have_a_longest(self):
        half = TransformerConfig(vocab_size=67, d_model=8, num_heads=2, num_layers=1, d_ff=8, max_len=13)
        model = build(lambda rngs: Transformer(rngs, encoder=half, decoder=half))
        text = Translator(Path("a"), model, PublishedCodec(copy_of(unigram), whole=True), 1)
        assert text.context == 13
        with pytest.raises(InputError, match="the encoder of a reads at most 13"):
            text.check([3] * 14)
        with pytest.raises(InputError, match="--max-new-tokens 13 is too many: .* has room for 12"):
            generate_module._read_prompt(text, None, "a", 13)

    def test_a_language_model_is_no_draft_of_it(self, translator, published, capsys):
        line = refuse(capsys, "generate", translator, "--prompt", "a", "--draft", published)
        assert "holds a TransformerLM; the draft of a Transformer must be a Transformer" in line

    @pytest.mark.parametrize(
        ("config", "generation", "start"),
        [
            ({"decoder_start_token_id": 0}, None, 0),
            ({"decoder_start_token_id": 0}, {"decoder_start_token_id": 4}, 4),
            ({"bos_token_id": 3}, None, 3),
            ({}, None, None),
        ],
    )
    def test_the_start_is_what_the_config_says(self, translator, tmp_path, config, generation, start):
        shutil.copytree(translator, tmp_path, dirs_exist_ok=True)
        said = json.loads((translator / "config.json").read_text())
        del said["decoder_start_token_id"]
        (tmp_path / "config.json").write_text(json.dumps(said | config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        if start is None:
            with pytest.raises(InputError, match="must have a decoder_start_token_id"):
                open_published(tmp_path)
            return
        opened = open_published(tmp_path)
        assert isinstance(opened, Translator) and opened.start == start and opened.codec.whole

"""One small run and two published checkpoints. All tests of the command share them, since making them takes long."""

import contextlib
import dataclasses
import io
import re

import pytest
from flax import nnx
from published_models import lm, publish, sure
from small_tokenizers import AROUND, END, UNKNOWN, byte_level, copy_of, unigram
from tiny import build
from tiny_run import TINY

from attnax import Transformer, TransformerConfig, TransformerLM
from attnax.cli import main, terminal
from attnax.training import Checkpoints, RunFolder, read_corpus


@pytest.fixture(scope="session", autouse=True)
def no_programs_are_kept(tmp_path_factory):
    """This process keeps no programs, and a process that a test starts keeps none in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "keep_programs", lambda wanted: None)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Sixty short files; their text is easy to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        (folder / f"file{index}.py").write_text(f"def number_{index}(x):\n    return x + {index}\n\n\n" * 8)
    return folder


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A finished run, and the output of the command."""
    out, printed = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["train", "--data", str(corpus), "--out", str(out), *TINY]) == 0
    return out, printed.getvalue()


@pytest.fixture(scope="session")
def run(trained):
    """A finished run."""
    return trained[0]


@pytest.fixture(scope="session")
def draw_run(run):
    """Makes a run like `run` with random weights, and another tokenizer if one is given."""

    def draw(folder, seed, tokenizer=None):
        options, its_own, _ = RunFolder(run).load()
        tokenizer = its_own if tokenizer is None else tokenizer
        model = dataclasses.replace(options.model, vocab_size=tokenizer.vocab_size)
        settings = dataclasses.replace(options, seed=seed, model=model)
        made = RunFolder.create(folder, settings, read_corpus(options.data), tokenizer, {})
        params = nnx.state(build(lambda rngs: TransformerLM(rngs, model), seed), nnx.Param)
        with Checkpoints(made.checkpoints, owner=made.owner) as checkpoints:
            checkpoints.save(1, {"params": nnx.to_pure_dict(params)})
        return folder

    return draw


@pytest.fixture(scope="session")
def other_run(draw_run, tmp_path_factory):
    """A run with another seed."""
    return draw_run(tmp_path_factory.mktemp("runs") / "other", seed=1)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A Llama with a byte-level tokenizer that puts a start token before a text and an end token after it."""
    return publish(tmp_path_factory.mktemp("published"), lm(), copy_of(byte_level, AROUND))


@pytest.fixture(scope="session")
def translator(tmp_path_factory):
    """A tiny T5 that reads and writes 13 tokens at most."""
    kind = {"num_heads": 2, "num_layers": 1, "d_ff": 16, "norm_type": "rms", "pos_emb_type": "relative"}
    kind |= {"use_bias": False, "ff_activation": "relu", "attention_scale": 1.0}
    half = TransformerConfig(vocab_size=67, d_model=16, max_len=13, **kind)
    model = sure(build(lambda rngs: Transformer(rngs, encoder=half, decoder=half, share_embeddings=True), 7))
    tokens = {"decoder_start_token_id": UNKNOWN, "eos_token_id": END}
    return publish(tmp_path_factory.mktemp("t5"), model, copy_of(unigram, AROUND), config=tokens)


@pytest.fixture
def streamed(monkeypatch):
    """The tokens that models stream, in the order in which they come."""
    tokens = []

    def noted(stream):
        def call(self, *arguments, **options):
            for token in stream(self, *arguments, **options):
                tokens.append(int(token[0]))
                yield token

        return call

    for kind in (TransformerLM, Transformer):
        monkeypatch.setattr(kind, "stream", noted(kind.stream))
    return tokens


@pytest.fixture
def write(capsys):
    """The output of `attnax generate`."""

    def call(folder, *options):
        capsys.readouterr()
        assert main(["generate", str(folder), *map(str, options)]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def show(capsys):
    """The exit code of `attnax inspect`, and its output without the spaces that align it."""

    def call(folder):
        capsys.readouterr()
        code = main(["inspect", str(folder)])
        return code, re.sub(" +", " ", capsys.readouterr().out)

    return call

"""One small run for all tests of the command: to train it compiles more than most of them."""

import contextlib
import dataclasses
import io

import pytest
from flax import nnx
from tiny import build
from tiny_run import TINY

from attnax import TransformerLM
from attnax.cli import main, terminal
from attnax.training import RunFolder, read_corpus, save_checkpoint


@pytest.fixture(scope="session", autouse=True)
def no_programs_are_kept(tmp_path_factory):
    """In this process none, and in those that tests start none where the user's are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "keep_programs", lambda wanted: None)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Sixty short files of a text that is easy to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        (folder / f"file{index}.py").write_text(f"def number_{index}(x):\n    return x + {index}\n\n\n" * 8)
    return folder


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A finished run, and what the command printed."""
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
    """Makes a run like `run` whose weights were drawn, not trained, perhaps with another tokenizer."""

    def draw(folder, seed, tokenizer=None):
        options, its_own, _ = RunFolder(run).load()
        tokenizer = its_own if tokenizer is None else tokenizer
        model = dataclasses.replace(options.model, vocab_size=tokenizer.vocab_size)
        settings = dataclasses.replace(options, seed=seed, model=model)
        made = RunFolder.create(folder, settings, read_corpus(options.data), tokenizer)
        params = nnx.state(build(lambda rngs: TransformerLM(rngs, model), seed), nnx.Param)
        save_checkpoint(made.checkpoints, 1, {"params": nnx.to_pure_dict(params)}, owner=made.owner)
        return folder

    return draw


@pytest.fixture(scope="session")
def other_run(draw_run, tmp_path_factory):
    """A run with another seed."""
    return draw_run(tmp_path_factory.mktemp("runs") / "other", seed=1)

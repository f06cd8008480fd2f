"""`attnax inspect --layout`: where each parameter lives, what is whole, and the bytes of a device."""

import re

import pytest
from published_models import FOLDER
from tiny_run import refuse

from attnax.cli import main


@pytest.fixture
def lay_out(capsys):
    """The output of `attnax inspect --layout` without the spaces that align it."""

    def call(folder, layout, *options):
        capsys.readouterr()
        assert main(["inspect", str(folder), "--layout", layout, *options]) == 0
        return re.sub(" +", " ", capsys.readouterr().out).splitlines()

    return call


def test_a_published_model_is_shown_on_more_devices_than_there_are(lay_out):
    """61 tokens are no multiple of 3; the layout has 24 devices."""
    lines = lay_out(FOLDER / "gpt2_variant", "data=2,fsdp=4,tensor=3")
    blocks = "decoder.stack.blocks.{0..1}"
    for line in (
        "parameter shape axes cut on a device",
        "decoder.embed.tokens.embedding 61x12 vocab, embed embed/fsdp=4 732 bytes",
        f"{blocks}.attention.query.kernel 12x12 embed, heads embed/fsdp=4, heads/tensor=3 96 bytes",
        f"{blocks}.attention.out.kernel 12x12 heads, embed heads/tensor=3, embed/fsdp=4 96 bytes",
        f"{blocks}.attention.key.bias 12 - replicated 96 bytes",
        " decoder.embed.tokens.embedding: vocab 61 is no multiple of tensor=3",
        "layout data=2,fsdp=4,tensor=3: 24 devices",
        "in a step 8 sequences of 67 tokens, float32; bytes that a device moves:",
    ):
        assert line in lines
    (held,) = (line for line in lines if line.startswith("on a device"))
    assert held.endswith(" of 24.2 kB, parameters") and any(" of 48.5 kB, moments of adamw" in line for line in lines)
    assert any(line.endswith("gathers of parameters, over fsdp") for line in lines)
    assert not any("over context" in line or "over expert" in line for line in lines)


def test_a_run_is_shown_with_its_own_batch_and_optimizer(lay_out, run):
    lines = lay_out(run, "fsdp=2,tensor=2")
    assert "in a step 4 sequences of 32 tokens, float32; bytes that a device moves:" in lines
    assert any("moments of muon" in line for line in lines) and any("which is not counted" in line for line in lines)
    lines = lay_out(run, "fsdp=2,context=3", "--batch-size", "6", "--length", "31")
    assert "in a step 6 sequences of 31 tokens, float32; bytes that a device moves:" in lines
    assert " length 31 is no multiple of context=3: sequences are whole" in lines


def test_layouts_that_do_not_fit_are_refused(capsys, run):
    def why(*flags):
        return refuse(capsys, "inspect", run, "--layout", *flags)

    assert "tensor must divide num_heads; got tensor=4, num_heads=2." in why("fsdp=1,tensor=4")
    assert "tensor=3 needs a multiple of 3; got 8 devices." in why("tensor=3")
    assert "Or name every size" in why("tensor=3")
    assert "data * fsdp * expert must divide the batch; got 8 of fsdp=8 and batch_size=4." in why("fsdp=8")
    assert "got 'rows=2' in 'rows=2'" in why("rows=2")
    assert refuse(capsys, "inspect", run, "--length", 8) == "attnax: --length needs --layout."
    assert "--batch-size must be at least 1; got 0." in why("fsdp=2", "--batch-size", "0")

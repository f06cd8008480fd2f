"""What `make aot-scale` reads from the text of a compiled program, and what it refuses, without libtpu."""

import dataclasses
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GATHER = "bf16[8,16]{1,0} all-gather(%y), channel_id=1, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}"
PROGRAM = f"""
HloModule jit_step

%begin (y: bf16[2,16]) -> (bf16[2,16], bf16[8,16], u32[]) {{
  %y = bf16[2,16]{{1,0:T(8,128)(2,1)}} parameter(0)
  %all-gather.1 = {GATHER}, metadata={{op_name="while/body/convert_element_type"}}
  ROOT %t.1 = (bf16[2,16], bf16[8,16], u32[]) tuple(%y, %all-gather.1, %y)
}}

%async_collective_fusion.1 (y: bf16[2,16]) -> bf16[2,3] {{
  %y = bf16[2,16]{{1,0}} parameter(0)
  %w = bf16[16,3]{{1,0}} parameter(1)
  %all-gather.2 = {GATHER}
  ROOT %convolution.1 = bf16[2,3]{{1,0}} convolution(%y, %w), dim_labels=bf_io->bf
}}

%finish (y: bf16[2,16]) -> bf16[8,16] {{
  %y = bf16[2,16]{{1,0}} parameter(0)
  ROOT %all-gather.3 = {GATHER}
}}

%all-reduce-scatter.1 (y: f32[8,16]) -> f32[2,16] {{
  %y = f32[8,16]{{1,0}} parameter(0)
  %all-reduce.1 = f32[8,16]{{1,0}} all-reduce(%y), channel_id=2, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  ROOT %cut = f32[2,16]{{1,0}} dynamic-slice(%all-reduce.1, %y), dynamic_slice_sizes={{2,16}}
}}

%body (p: (s32[], bf16[2,16])) -> (s32[], bf16[2,16]) {{
  %p = (s32[]{{:T(128)}}, bf16[2,16]{{1,0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %x = bf16[2,16]{{1,0}} get-tuple-element(%p), index=1
  %two = s32[]{{:T(128)}} constant(2)
  %next = s32[]{{:T(128)}} add(%i, %two)
  %async-collective-start.1 = (bf16[2,16], bf16[8,16], u32[]{{:S(2)}}) fusion(%x), kind=kCustom, calls=%begin
  %go = bf16[2,3]{{1,0}} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1, backend_config={{"notes":
"a second line = (not an instruction)"}}
  %async-collective-done.1 = bf16[8,16]{{1,0}} fusion(%x), kind=kCustom, calls=%finish
  %collective-permute-start.1 = (bf16[2,16], bf16[2,16]{{1,0}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%x), source_target_pairs={{{{0,1}},{{1,0}}}}, metadata={{op_name="ring/ppermute"}}
  %splash_mha_fwd.2.1 = bf16[2,16]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[], bf16[2,16]) tuple(%next, %x)
}}

%condition (p.1: (s32[], bf16[2,16])) -> pred[] {{
  %p.1 = (s32[]{{:T(128)}}, bf16[2,16]{{1,0}}) parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  %limit = s32[]{{:T(128)}} constant(6)
  ROOT %less = pred[]{{:T(512)}} compare(%i.1, %limit), direction=LT
}}

ENTRY %main (a: bf16[2,16], g: f32[8,16]) -> bf16[2,16] {{
  %a = bf16[2,16]{{1,0}} parameter(0)
  %g = f32[8,16]{{1,0}} parameter(1)
  %one = s32[]{{:T(128)}} constant(1)
  %copied = s32[]{{:T(128)}} copy(%one)
  %start = (s32[], bf16[2,16]) tuple(%copied, %a)
  %while.1 = (s32[], bf16[2,16]) while(%start), condition=%condition, body=%body
  %scattered = f32[2,16]{{1,0}} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, metadata={{op_name="transpose(jvp())/psum"}}
  ROOT %r = bf16[2,16]{{1,0}} get-tuple-element(%while.1), index=1
}}
"""  # noqa: E501


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_collectives_count_once_and_as_often_as_their_loop_turns(module):
    found = {one.kind: one for one in module("_tpu_collectives").Program(PROGRAM).collectives()}
    assert {kind: (one.devices, one.times) for kind, one in found.items()} == {
        "all-gather": (4, 3),  # at 1, 3 and 5
        "collective-permute": (2, 3),
        "reduce-scatter": (4, 1),
    }
    received = {kind: one.received for kind, one in found.items()}
    assert received == {
        "all-gather": 3 * 3 / 4 * 8 * 16 * 2,
        "collective-permute": 3 * 2 * 16 * 2,
        "reduce-scatter": 3 * 2 * 16 * 4,
    }


def test_products_and_kernels_count_as_often_as_their_loop_turns(module):
    program = module("_tpu_collectives").Program(PROGRAM)
    assert program.product_flops() == 3 * 2 * 2 * 16 * 3
    assert program.kernels() == {"splash_mha_fwd": 3}


@pytest.mark.parametrize(
    ("left", "right", "out", "window", "labels", "flops"),
    [
        ("5,7", "7,3", "5,3", "", "bf_io->bf", 2 * 5 * 7 * 3),
        ("1,5,7", "2,7,3", "2,5,3", "window={size=2 pad=1_1 rhs_reversal=1}, ", "0bf_0io->0bf", 2 * 2 * 5 * 7 * 3),
        ("2,5,7", "2,7,3", "1,5,3", "window={size=2}, ", "0bf_0io->0bf", 2 * 2 * 5 * 7 * 3),
    ],
    ids=["product", "padded", "sum of two"],
)
def test_operations_with_padding_do_not_count(module, left, right, out, window, labels, flops):
    text = f"""ENTRY %main (a: f32[{left}], b: f32[{right}]) -> f32[{out}] {{
  %a = f32[{left}] parameter(0)
  %b = f32[{right}] parameter(1)
  ROOT %convolution.1 = f32[{out}] convolution(%a, %b), {window}dim_labels={labels}
}}"""
    assert module("_tpu_collectives").Program(text).product_flops() == flops


@pytest.mark.parametrize("line", ["%less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT", "constant(1)"])
def test_a_loop_that_counts_in_another_way_is_refused(module, line):
    broken = PROGRAM.replace(line, "%less = pred[] not(%i.1)" if "less" in line else "parameter(2)")
    assert broken != PROGRAM
    with pytest.raises(ValueError, match=r"The loop while\.1 (ends|counts) in a way that is not known"):
        module("_tpu_collectives").Program(broken)


def test_an_activation_that_is_gathered_is_not_a_weight(module):
    scale = module("aot_scale")
    cut, whole = {(2, 16)}, {(8, 16)}
    (gather,) = (x for x in module("_tpu_collectives").Program(PROGRAM).collectives() if x.kind == "all-gather")
    assert scale.purpose(gather, cut, whole) == "weights"
    assert scale.purpose(gather, cut, {(16, 16)}) == "gathers activations"
    assert scale.purpose(gather._replace(arrays=(("s32", (9, 9)),)), cut, whole) == "weights"  # numbers of tokens


def test_received_bytes_have_their_purpose(module):
    scale = module("aot_scale")
    facts = scale.read(scale.Facts(), PROGRAM, {(2, 16)}, {(8, 16)})
    assert set(facts.received) == {"weights", "gradients", "ring of keys"} and not facts.gathered
    assert facts.received["gradients"] == facts.by_kind["reduce-scatter"]


def test_a_program_that_is_not_as_it_must_be_fails_in_words(module):
    scale = module("aot_scale")
    row = scale.QUICK[0]
    layers = row.model.sizes["num_layers"]
    good = scale.Facts(kernels={"splash_mha_fwd": 2 * layers, "splash_mha_dkv": layers}, arguments=10**9)
    assert scale.wrong(row, good) == ""
    for change, words in (
        ({"error": "RuntimeError: no"}, "RuntimeError: no"),
        ({"gathered": ["all-gather of x"]}, "gathers activations: all-gather of x"),
        ({"temporaries": 16 * 10**9}, "needs 17.0 GB of 16"),
        ({"kernels": {}}, f"has 0 kernels forward and 0 backward in {layers} layers"),
    ):
        assert words in scale.wrong(row, dataclasses.replace(good, **change))
    text = scale.section([(row, good), (row, scale.Facts(error="a | b"))])
    assert "does not compile: a \\| b" in text and "| small | `fsdp=2,tensor=2` | 8 x 256 |" in text


def test_formulas_of_fsdp_are_the_bytes_of_its_matrices(module):
    scale = module("aot_scale")
    row = next(row for row in scale.ROWS if row.layout == "fsdp=8")
    layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192
    table = 128_256 * 2048
    assert scale.formulas(row) == {
        "weights": 7 / 8 * 2 * (2 * 16 * layer + table),
        "gradients": 7 / 8 * (2 * 16 * layer + 8 * table),
    }

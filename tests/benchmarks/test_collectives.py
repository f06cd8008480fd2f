"""The collectives of a program of XLA, for a program that one can count by hand."""

from pathlib import Path

import pytest


@pytest.fixture
def collectives(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import _collectives

    return _collectives


PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: (s32[], bf16[3,5])) -> (s32[], bf16[3,5]) {
  %carry = (s32[], bf16[3,5]{1,0}) parameter(0)
  %part = bf16[3,5]{1,0} get-tuple-element(%carry), index=1
  %next = bf16[3,5]{1,0} collective-permute(%part), channel_id=1, source_target_pairs={{0,1},{1,2},{2,0}}
  ROOT %made = (s32[], bf16[3,5]{1,0}) tuple(%count, %next)
}

%much (x: f32[7]) -> f32[7] {
  %x.1 = f32[7]{0} parameter(0)
  ROOT %all = f32[7]{0} all-reduce(%x.1), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}

%none (x: f32[7]) -> f32[7] {
  ROOT %x.2 = f32[7]{0} parameter(0)
}

ENTRY %main (x: f32[2,6], y: f32[7]) -> f32[8,6] {
  %x.3 = f32[2,6]{1,0} parameter(0)
  %loop = (s32[], bf16[3,5]{1,0}) while(%start), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %either = f32[7]{0} conditional(%which, %y, %y), branch_computations={%none, %much}
  %parts = f32[2,6]{1,0} reduce-scatter(%w), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %alone = f32[2,6]{1,0} all-reduce(%x.3), replica_groups=mesh['data'=1,'fsdp'=8] {'data'}, to_apply=%add
  %norm = (f32[], f32[]) all-reduce(%a, %b), channel_id=4, replica_groups=[1,8]<=[8], to_apply=%add
  %two = (f32[4]{0}, /*index=1*/f32[3,2]{1,0}) all-reduce(%c, %d), replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, to_apply=%add
  ROOT %whole = f32[8,6]{1,0} all-gather(%x.3), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(step)/gather" stack_frame_id=2}
}
"""  # noqa: E501


def test_collectives_are_counted_by_hand(collectives):
    found = {(each.kind, each.shapes): each for each in collectives.collectives_of(PROGRAM)}
    assert {key: (each.num_bytes, each.group, each.runs) for key, each in found.items()} == {
        ("collective-permute", ((3, 5),)): (7 * 15 * 2, 2, 7),
        ("all-reduce", ((7,),)): (28, 4, 1),
        ("reduce-scatter", ((2, 6),)): (4 * 12 * 4, 4, 1),
        ("all-reduce", ((4,), (3, 2))): (40, 8, 1),
        ("all-gather", ((8, 6),)): (48 * 4 * 3 / 4, 4, 1),
    }
    assert found["all-gather", ((8, 6),)].op_name == "jit(step)/gather"
    assert collectives.bytes_by_kind(found.values()) == {
        "collective-permute": 210,
        "all-reduce": 68,
        "reduce-scatter": 192,
        "all-gather": 144,
    }

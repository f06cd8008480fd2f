"""Any safetensors file is read exactly or refused in words."""

import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny import SEED

from attnax.pretrained import CheckpointError
from attnax.pretrained.checkpoint import open_checkpoint
from attnax.pretrained.layout import Places, arrange, find_places, reverse
from attnax.pretrained.safetensors import empty_aligned, read_header, read_into, write_tensors

DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (64, 32, 16, 8)] + ["bool"]


def random_tensors(seed, dtypes=DTYPES):
    rng = np.random.default_rng(seed)
    tensors = {"scalar": np.array(3.5, np.float32), "empty": np.zeros((3, 0), np.float16), "é": np.ones(1, np.int8)}
    for dtype in dtypes:
        shape = rng.integers(1, 6, rng.integers(1, 4))
        tensors[f"layer.{dtype}"] = rng.integers(0, 2, shape).astype(getattr(ml_dtypes, dtype, dtype))
    return tensors


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def read(info, dtype=None):
    array = empty_aligned(info.shape, info.dtype if dtype is None else dtype)
    read_into(Places((array,)), info)
    return array


def problems_of(path):
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_reads_what_the_library_writes(tmp_path):
    tensors = random_tensors(0)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = {name: read(info) for name, info in read_header(tmp_path / "model.safetensors").items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["as it is", "converted"])
@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        ("O I -> I O", [(37, 70)]),
        ("O I -> I O", [(37, 41), (37, 11), (37, 18)]),
        (None, [(37, 41), (37, 11), (37, 11)]),
        (None, [(70,)]),
        ("(N 3 H) I -> I (3 N H)", [(37, 10)] * 3),
        ("E D (F 2) -> E D (2 F)", [(3, 11, 13)] * 2),
        ("D C h w -> (h w C) D", [(42, 37)]),
        ("1 T D -> T D", [(5, 37)]),
    ],
)
def test_parameters_are_read_in_blocks(tmp_path, monkeypatch, layout, shapes, dtype):
    """Blocks are a few rows, or less than a row; the elements are those of a tensor read at once and rearranged."""
    sizes = {"N": 5, "H": 2, "h": 2, "w": 7}
    wanted = np.random.default_rng(0).standard_normal((*shapes[0][:-1], sum(shape[-1] for shape in shapes)), "f")
    tensor = wanted if layout is None else arrange(wanted, reverse(layout), sizes)
    safetensors.numpy.save_file({"a": np.ascontiguousarray(tensor)}, tmp_path / "model.safetensors")
    info = read_header(tmp_path / "model.safetensors")["a"]
    for block_bytes in (1, 40, 3000):
        monkeypatch.setattr("attnax.pretrained.safetensors.BLOCK_BYTES", block_bytes)
        arrays = [np.zeros(shape, dtype) for shape in shapes]
        read_into(find_places(arrays, layout, sizes), info)
        assert np.array_equal(np.concatenate(arrays, -1), wanted.astype(dtype))


@pytest.mark.parametrize("size", [1001, (1 << 20) + 1])
def test_jax_takes_memory_as_it_is(size):
    array = empty_aligned((size,), np.float32)
    array[...] = 1
    taken = jax.device_put(array)
    assert taken.unsafe_buffer_pointer() == array.ctypes.data and taken.sum() == size


def test_a_transposed_tensor_takes_the_memory_of_its_result(tmp_path):
    safetensors.numpy.save_file({"a": np.ones((4096, 1024), "f")}, tmp_path / "model.safetensors")
    info = read_header(tmp_path / "model.safetensors")["a"]
    tracemalloc.start()
    array = np.empty((1024, 4096), "f")
    read_into(find_places([array], "O I -> I O", {}), info)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert array.all() and peak < array.nbytes + (3 << 20)


def test_writes_the_bytes_that_the_library_writes(tmp_path):
    tensors = random_tensors(1)
    types = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "ours.safetensors", types, lambda name: tensors[name])
    assert (tmp_path / "ours.safetensors").read_bytes() == safetensors.numpy.save(tensors, {"format": "pt"})


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    float32 = np.dtype(np.float32)
    with pytest.raises(ValueError, match=r"write_tensors: b must be float32\(3,\); got float32\(4,\)\."):
        write_tensors(path, {"a": (float32, (3,)), "b": (float32, (3,))}, lambda name: np.zeros(3 + (name == "b"), "f"))
    with pytest.raises(ValueError, match="dtypes must be among .*; got complex64"):
        write_tensors(path, {"a": (np.dtype(np.complex64), (3,))}, lambda name: np.zeros(3))
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        (b"", b"", "not JSON"),
        (b"[]", b"", "must hold a JSON object; got a list"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a": NaN}', b"", "NaN is no number"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "not JSON"),
        (b'{"\xff": 1}', b"", "not JSON"),
        (b'{"a": 1, "a": 2, "b": {"c": 1, "c": 1}}', b"", "the key 'c' comes twice"),
        ({"__metadata__": {"format": 1}}, b"", "'__metadata__' must hold text"),
        ({"a": 3}, b"", "'a': its entry must hold dtype, shape and data_offsets"),
        ({"a": entry() | {"more": 1}}, bytes(24), "'a': its entry must hold"),
        ({"a": entry("F31")}, bytes(24), "'a': dtype must be one of .*; got 'F31'"),
        ({"a": entry(["F32"])}, bytes(24), "'a': dtype must be one of"),
        ({"a": entry(shape=(2, -3))}, bytes(24), r"'a': shape must be a list of .* sizes; got \[2, -3\]"),
        ({"a": entry(shape=(2, 3.0))}, bytes(24), "'a': shape must be"),
        ({"a": entry(shape=(2, True))}, bytes(24), "'a': shape must be"),
        ({"a": entry(shape=(1,) * 9, offsets=(0, 4))}, bytes(4), "'a': shape must be a list of at most 8"),
        ({"a": entry(offsets=(0,))}, bytes(24), "'a': data_offsets must be a pair"),
        ({"a": entry(offsets=(0, 2**60))}, bytes(24), "'a': data_offsets must be a pair of sizes"),
        ({"a": entry(offsets=(24, 0))}, bytes(24), r"'a': float32\(2, 3\) has 24 bytes; got data_offsets=\[24, 0\]"),
        ({"a": entry(shape=(2**40, 2**40))}, bytes(24), "'a': float32.* has"),
        ({"a": entry(offsets=(4, 28))}, bytes(28), "'a': its data must begin at byte"),
        ({"a": entry(), "b": entry()}, bytes(24), "'b': its data must begin at byte"),
        ({"a": entry(), "b": entry(offsets=(20, 44))}, bytes(44), "'b': its data must begin at byte"),
        ({"a": entry()}, bytes(23), "its tensors must end where it ends"),
        ({"a": entry()}, bytes(25), "its tensors must end where it ends"),
        ({}, b"x", "its tensors must end where it ends"),
    ],
)
def test_a_damaged_file_is_refused_in_words(tmp_path, header, data, problem):
    with pytest.raises(CheckpointError, match=problem):
        read_header(write(tmp_path / "model.safetensors", header, data))


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    header = {"a": entry("F31"), "b": entry(shape=(2, 4)), "c": {}, "__metadata__": []}
    found = problems_of(write(tmp_path / "model.safetensors", header, bytes(24)))
    assert [problem.split(":")[0] for problem in found] == [
        "'__metadata__' must hold text by name.",
        "'a'",
        "'b'",
        "'c'",
    ]


def test_lengths_are_checked_before_anything_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for content, problem in (
        (b"", "cut off"),
        (b"\2\0\0", "cut off"),
        ((2**63).to_bytes(8, "little") + b"{}", "cut off"),
    ):
        path.write_bytes(content)
        assert problem in problems_of(path)[0]
    with path.open("wb") as file:  # a hole, not 17 MiB
        file.write((17 << 20).to_bytes(8, "little"))
        file.truncate(8 + (17 << 20))
    assert "at most 16777216 bytes" in problems_of(path)[0]


def test_tensors_are_counted_before_anything_is_parsed(tmp_path):
    """The text is cut off too; a parser would report that first."""
    for part in (b'"a": {}, ', b'"a": [], [], '):
        path = write(tmp_path / "model.safetensors", b"{" + part * 100_003)
        assert problems_of(path) == ("it must hold at most 100000 tensors.",)


def test_tensors_are_counted_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr("attnax.pretrained.safetensors.MAX_TENSORS", 7)
    header = {str(index): entry(shape=(0,), offsets=(0, 0)) for index in range(7)}
    assert len(read_header(write(tmp_path / "model.safetensors", header))) == 7
    one_more = write(tmp_path / "model.safetensors", header | {"7": header["0"]})
    assert problems_of(one_more) == ("it must hold at most 7 tensors; got 8.",)


def test_a_claim_of_a_terabyte_takes_no_memory(tmp_path):
    path = write(tmp_path / "model.safetensors", {"a": entry(shape=(2**38,), offsets=(0, 2**40))}, bytes(24))
    tracemalloc.start()
    problems_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_cut_off_after_its_header_was_read_is_noticed(tmp_path):
    path = write(tmp_path / "model.safetensors", {"a": entry()}, bytes(24))
    info = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut off after its header was read"):
        read(info)
    with pytest.raises(CheckpointError, match="cut off after its header was read"):
        read(info, np.float16)


def write_shards(folder, places, **files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for file, names in files.items():
        safetensors.numpy.save_file({name: np.ones(3, np.float32) for name in names}, folder / f"{file}.safetensors")


def test_shards_are_one_checkpoint(tmp_path):
    write_shards(tmp_path, {"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"}, x="ac", y="b")
    checkpoint = open_checkpoint(tmp_path, {})
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    assert read(checkpoint.tensors["b"]).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", ".x.safetensors", "x.bin", "",
     "x" * 300 + ".safetensors", "\0.safetensors", "\ud800.safetensors"],
)  # fmt: skip
def test_a_shard_is_a_bare_name_in_its_folder(tmp_path, file):
    folder = tmp_path / "checkpoint" / "deep"
    folder.mkdir(parents=True)
    write_shards(tmp_path / "checkpoint", {}, x="a")
    write_shards(folder, {"a": file})
    with pytest.raises(CheckpointError, match="weight_map may name .safetensors files in its own folder only"):
        open_checkpoint(folder, {})


def test_a_tensor_of_a_shard_that_the_index_does_not_name_is_read(tmp_path):
    write_shards(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x="ac", y="b", z="d")
    assert sorted(open_checkpoint(tmp_path, {}).tensors) == ["a", "b", "c"]


def test_an_index_and_its_files_must_agree(tmp_path):
    places = {"a": "x.safetensors", "b": "x.safetensors", "z": "gone.safetensors", "d": "y.safetensors"}
    write_shards(tmp_path, places, x="ac", y="cd")
    (tmp_path / "torn.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path, {})
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["gone.safetensors:", "'b'", "'c'"]
    write_shards(tmp_path, {"a": "x.safetensors", "b": 3})
    with pytest.raises(CheckpointError, match="weight_map must be an object"):
        open_checkpoint(tmp_path, {})


def test_other_formats_are_refused_with_a_hint(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors"):
        open_checkpoint(tmp_path, {})
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(
        CheckpointError, match=r"only \.safetensors files are read; got pytorch_model\.bin.*can run code"
    ):
        open_checkpoint(tmp_path, {})


def test_missing_unexpected_and_wrong_tensors_are_told_together(tmp_path):
    tensors = {
        "short": np.zeros(3, np.float32),
        "whole": np.zeros((2, 3), np.int32),
        "extra": np.zeros((2, 3), np.float32),
        "buffer": np.zeros(1, np.int64),
        "fine": np.zeros((2, 3), ml_dtypes.bfloat16),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    expected = dict.fromkeys(("short", "whole", "fine", "gone"), (2, 3))
    assert open_checkpoint(tmp_path, {}).check(expected, harmless=["buffer"]) == [
        "'short' is float32(3,); a floating tensor of shape (2, 3) was expected.",
        "'whole' is int32(2, 3); a floating tensor of shape (2, 3) was expected.",
        "'gone' is missing; a floating tensor of shape (2, 3) was expected.",
        "'extra' is float32(2, 3); no such tensor was expected.",
    ]
    fine = read(open_checkpoint(tmp_path, {}).tensors["fine"], np.float32)
    assert fine.dtype == np.float32 and not fine.any()


def odd_value(rng):
    values = [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63,
        2**64,
        1.5,
        1e300,
        "",
        "F32",
        "F64",
        "é",
        [],
        [[]],
        {},
        [0, 4],
        [2**62] * 3,
    ]
    return values[rng.integers(len(values))]


def mutate_header(rng, content):
    """The file with one entry of its header changed, and its length corrected or not."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = list(header)[rng.integers(len(header))]
    kind = rng.integers(6)
    if kind == 0:
        header[name] = odd_value(rng)
    elif kind == 1:
        del header[name]
    elif kind == 2:
        header[str(odd_value(rng))] = header[name]
    elif kind == 3 and name != "__metadata__":
        header[name][["dtype", "shape", "data_offsets", "new"][rng.integers(4)]] = odd_value(rng)
    elif kind == 4 and name != "__metadata__":
        values = header[name][["shape", "data_offsets"][rng.integers(2)]]
        if values:
            values[rng.integers(len(values))] += int(rng.integers(-9, 9))
    text = json.dumps(header).encode()
    if kind == 5:
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(odd_value(rng))}}}".encode()
    changed = length if rng.integers(8) == 0 else len(text)
    return changed.to_bytes(8, "little") + text + content[8 + length :]


def mutate_bytes(rng, content):
    """The file with some bytes changed, removed, doubled or added, mostly at its start."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(content) + 1) * rng.random() ** 2)
        match rng.integers(5):
            case 0 if place < len(content):
                content[place] ^= 1 << rng.integers(8)
            case 1 if place < len(content):
                content[place] = rng.integers(256)
            case 2:
                content[place:place] = rng.bytes(rng.integers(1, 9))
            case 3:
                del content[place : place + int(rng.integers(1, 9))]
            case 4:
                del content[place:]
    return bytes(content)


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 300), *(pytest.param(seed, 1000, marks=pytest.mark.contract) for seed in range(6))]
)
def test_of_mutated_files_only_our_own_exception_comes_out(tmp_path, seed, count):
    """Six thousand files in all; three hundred of them run in `make test`."""
    rng = np.random.default_rng(seed + SEED)
    tensors = random_tensors(seed, rng.choice(DTYPES, 3, replace=False))
    path = tmp_path / "model.safetensors"
    content = safetensors.numpy.save(tensors, {"format": "pt"})
    refused = 0
    for _ in range(count):
        path.write_bytes((mutate_header if rng.integers(2) else mutate_bytes)(rng, content))
        try:
            checkpoint = open_checkpoint(tmp_path, {})
            checkpoint.check({name: tensor.shape for name, tensor in tensors.items()})
            held = sum(read(info).nbytes for info in checkpoint.tensors.values())
            assert held < path.stat().st_size  # no tensor is larger than the file
        except CheckpointError as error:
            refused += 1
            assert error.problems and all(error.problems)
    assert count / 2 < refused < count

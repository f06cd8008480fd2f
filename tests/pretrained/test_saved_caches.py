"""Caches in a file come back bit for bit, and any other file is refused in words."""

import dataclasses
import json
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from tiny import SEED

import attnax.cache
import attnax.paged_cache
from attnax.cache import (
    EmptyCache,
    StoredTokens,
    init_kv_layer_cache,
    init_linear_layer_cache,
    init_ring_kv_cache,
    init_scalar_cache,
)
from attnax.generation.text import Text
from attnax.paged_cache import init_paged_kv_cache
from attnax.pretrained import CheckpointError, load_caches, save_caches
from attnax.pretrained.caches import _OWN, MAX_DEPTH
from attnax.pytrees import pytree_dataclass

SIZES = 2, 3, 5, 7  # rows, heads, head_dim, slots
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (32, 16, 8)] + ["bool"]


def filled(make, seed=0):
    """The caches that `make` returns, with random bits in all arrays; as floats some of the bits are NaN."""
    rng = np.random.default_rng(seed + SEED)

    def fill(like):
        if like.dtype == np.bool_:
            return jax.device_put(rng.integers(0, 2, like.shape).astype(bool))
        size = like.size * like.dtype.itemsize
        return jax.device_put(np.frombuffer(rng.bytes(size), like.dtype).reshape(like.shape))

    return jax.tree.map(fill, jax.eval_shape(make))


def paged(dtype=jnp.float32):
    sizes = {"num_blocks": 11, "block_size": 2, "num_kv_heads": 3, "head_dim": 5, "max_blocks_per_seq": 4}
    return init_paged_kv_cache(**sizes, batch_size=2, value_dim=7, dtype=dtype)


def stored(window):
    cache = init_kv_layer_cache(*SIZES, "int8")
    return StoredTokens(cache.keys, cache.values, cache.positions, window)


KINDS = {
    "kv": lambda: init_kv_layer_cache(*SIZES, value_head_dim=11),
    "kv bfloat16": lambda: init_kv_layer_cache(*SIZES, jnp.bfloat16),
    "kv int8": lambda: init_kv_layer_cache(*SIZES, "int8"),
    "ring": lambda: init_ring_kv_cache(*SIZES, jnp.float16),
    "ring with a window": lambda: init_ring_kv_cache(*SIZES, window=4),
    "paged": paged,
    "paged int8": lambda: paged("int8"),
    "linear": lambda: init_linear_layer_cache(*SIZES[:3], value_head_dim=11),
    "empty": lambda: EmptyCache(init_kv_layer_cache(*SIZES)),
    "scalars": lambda: init_scalar_cache(init_ring_kv_cache(*SIZES, window=4), 5),
    "stored": lambda: stored(4),
    "text": lambda: Text(*(jnp.zeros(shape, jnp.int32) for shape in ((2, 3), (2,), (2,)))),
    "layers": lambda: tuple(init_ring_kv_cache(*SIZES, window=window) for window in (3, None, 5)),
    "containers": lambda: {"a": [paged(), None, (), {}], "b": (jnp.zeros(3), [jnp.zeros((0, 2))]), "": [[]]},
    "one array": lambda: jnp.zeros((2, 3)),
    "nothing": lambda: None,
}


def bits(caches):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(caches)]


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_caches_come_back_bit_for_bit(tmp_path, make):
    caches = filled(make)
    save_caches(tmp_path / "caches.safetensors", caches)
    found = load_caches(tmp_path / "caches.safetensors")
    assert jax.tree.structure(found) == jax.tree.structure(caches)
    assert bits(found) == bits(caches)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_with_all_its_bits(tmp_path, dtype):
    caches = filled(lambda: jnp.zeros((13, 17), getattr(ml_dtypes, dtype, dtype)))
    save_caches(tmp_path / "caches.safetensors", caches)
    assert bits(load_caches(tmp_path / "caches.safetensors")) == bits(caches)


def test_64_bits_come_back_only_where_jax_has_them(tmp_path):
    path, array = tmp_path / "caches.safetensors", np.array([1 + 2**-50])
    save_caches(path, [array])
    with jax.enable_x64(True):
        assert bits(load_caches(path)) == bits([array])
    assert "'0': JAX has no float64 unless jax_enable_x64 is set" in refusal(path)


def test_every_cache_of_the_library_is_known():
    public = [kind for package in (attnax.cache, attnax.paged_cache) for kind in vars(package).values()]
    caches = {kind for kind in public if dataclasses.is_dataclass(kind) and hasattr(kind, "select_rows")}
    assert caches <= set(_OWN) and len(caches) >= 6


def test_tensors_are_named_by_their_paths(tmp_path):
    cache = filled(KINDS["kv int8"])
    save_caches(
        tmp_path / "caches.safetensors", {"layers": (cache,), "a.b": cache.length, "__metadata__": cache.length}
    )
    found = safetensors.numpy.load_file(tmp_path / "caches.safetensors")
    layer = ["keys.codes", "keys.scales", "values.codes", "values.scales", "length", "positions", "overflowed"]
    assert found.keys() == {*(f"layers.0.{name}" for name in layer), '"a.b"', '"__metadata__"'}
    assert found["layers.0.keys.codes"].tobytes() == np.asarray(cache.keys.codes).tobytes()


def test_keys_that_would_give_one_name_give_two(tmp_path):
    caches = filled(
        lambda: {"a": {"b": jnp.zeros(3)}, "a.b": jnp.zeros(5), '"a.b"': jnp.zeros(7), "\ud800é": jnp.ones(2)}
    )
    save_caches(tmp_path / "caches.safetensors", caches)
    found = load_caches(tmp_path / "caches.safetensors")
    assert jax.tree.structure(found) == jax.tree.structure(caches) and bits(found) == bits(caches)


@pytree_dataclass
class Latents:
    """A user's cache, whose constructor is more than its fields."""

    latents: Any
    scale: float = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="", metadata={"static": True})
    made: ClassVar[list] = []

    def __post_init__(self):
        if self.scale == 0:
            raise ValueError("scale must not be 0")
        self.made.append(self)


def test_own_kinds_are_given(tmp_path):
    path, caches = tmp_path / "caches.safetensors", (Latents(jax.device_put(np.arange(3)), 0.1, "é"),)
    save_caches(path, caches)
    (found,) = load_caches(path, kinds=[Latents])
    assert (type(found), found.scale, found.name) == (Latents, 0.1, "é") and found is Latents.made[-1]
    assert bits(found) == bits(caches)
    assert "'0': the class 'Latents' is not known here. Give your own class in kinds=(...,)" in refusal(path)


def test_kinds_must_be_dataclasses_with_names_of_their_own(tmp_path):
    clash = dataclasses.make_dataclass("KVLayerCache", [])
    with pytest.raises(ValueError, match="load_caches: kinds must have names of their own; got .*KVLayerCache"):
        load_caches(tmp_path / "caches.safetensors", kinds=[clash])
    with pytest.raises(ValueError, match="load_caches: kinds must be dataclasses; got kinds=.*int"):
        load_caches(tmp_path / "caches.safetensors", kinds=[int])
    with pytest.raises(CheckpointError, match="'0' is a .*, and Attnax has a class of this name. Rename yours"):
        save_caches(tmp_path / "caches.safetensors", [clash()])


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (3, "'0' must be an array, .* got int. Make a number an array"),
        (jax.random.key, "'0' must be an array"),
        ({1: None}, "'0' must be an array, .* a dict with text as keys or None; got dict"),
        (np.zeros(3, np.complex64), "'0' must have a dtype among uint64, .*; got dtype=complex64"),
        (np.zeros(3, ">f4"), "'0' must have a dtype among .*; got dtype=>f4"),
        (jax.random.key(0), "'0' must have a dtype among .*; got dtype=key<fry>"),
        (Latents(None, float("nan")), "'0': static fields must be numbers, text or None .*; got scale=nan"),
        (Latents(None, 1.0, ("a",)), r"'0': static fields must be .*; got name=\('a',\)"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_nothing_is_written(tmp_path, part, problem):
    with pytest.raises(CheckpointError, match=rf"^save_caches: {problem}"):
        save_caches(tmp_path / "caches.safetensors", [part])
    assert list(tmp_path.iterdir()) == []


def test_containers_may_not_hold_themselves(tmp_path):
    caches = []
    caches.append(caches)
    with pytest.raises(CheckpointError, match=f"at most {MAX_DEPTH} containers deep; got 0.0.0"):
        save_caches(tmp_path / "caches.safetensors", caches)


def test_traced_arrays_are_refused_in_words(tmp_path):
    with pytest.raises(CheckpointError, match="'0' is traced, and has no values. Call save_caches outside of jit"):
        jax.eval_shape(lambda x: save_caches(tmp_path / "caches.safetensors", [x]), np.zeros(3))


def test_donated_arrays_are_refused_in_words(tmp_path):
    array = jnp.zeros(3)
    array.delete()
    with pytest.raises(CheckpointError, match="'0' was donated to a program, and is gone"):
        save_caches(tmp_path / "caches.safetensors", [array])


def test_arrays_on_several_devices_of_this_process_are_gathered(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    array = np.arange(6, dtype=np.float32)
    placed = jax.device_put(array, jax.NamedSharding(mesh, jax.P("x")))
    save_caches(tmp_path / "caches.safetensors", [placed])
    assert bits(load_caches(tmp_path / "caches.safetensors")) == bits([array])


def test_arrays_of_other_processes_are_refused_in_words(tmp_path, monkeypatch):
    array = jnp.zeros(3)
    monkeypatch.setattr(type(array), "is_fully_addressable", False)
    with pytest.raises(CheckpointError, match="'0' lies on devices of other processes. Gather it first"):
        save_caches(tmp_path / "caches.safetensors", [array])


def test_a_folder_is_made_and_a_file_replaced(tmp_path):
    path = tmp_path / "new" / "caches.safetensors"
    for caches in ([], (None,)):
        save_caches(str(path), caches)
        assert load_caches(str(path)) == caches
    with pytest.raises(CheckpointError, match="it is a folder; caches are one file"):
        save_caches(path.parent, [])
    assert list(path.parent.iterdir()) == [path]


# Files that save_caches did not write.

LEAF = "float32(2, 3)"


def write(path, structure, tensors=None, **more):
    """A file of the safetensors library with caches of this structure."""
    text = structure if isinstance(structure, str) else json.dumps({"version": 1, "caches": structure} | more)
    safetensors.numpy.save_file(tensors or {}, path, {"attnax.caches": text})
    return path


def refusal(path, **options):
    with pytest.raises(CheckpointError) as caught:
        load_caches(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_file_of_the_safetensors_library_is_read(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write(tmp_path / "caches.safetensors", {"tuple": [{"dict": {"a": LEAF}}, None]}, {"0.a": array})
    ((found, nothing),) = [load_caches(path)]
    assert nothing is None and bits(found) == bits({"a": array})


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_of_a_model_is_refused_with_advice(tmp_path, metadata):
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "model.safetensors", metadata)
    assert "it holds no caches. Give a file that save_caches wrote" in refusal(tmp_path / "model.safetensors")


def test_a_missing_or_truncated_file_is_refused_in_words(tmp_path):
    path = tmp_path / "caches.safetensors"
    assert "there is no such file" in refusal(path)
    save_caches(path, [np.zeros(3)])
    whole = path.read_bytes()
    for size in (0, 5, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        refusal(path)


@pytest.mark.parametrize("version", [2, 0, "1", True, None])
def test_another_version_is_refused_with_advice(tmp_path, version):
    path = write(tmp_path / "caches.safetensors", None, version=version)
    assert f"must be of version 1; got {version!r}. Update Attnax" in refusal(path)


@pytest.mark.parametrize(
    ("structure", "problem"),
    [
        ({"list": [LEAF, LEAF, LEAF]}, "'2': the tensor is missing; float32(2, 3) was expected"),
        ({"list": [LEAF]}, "'1' is float32(2, 3); no such tensor was expected"),
        ({"list": [LEAF, "int32(2, 3)"]}, "'1': the tensor is float32(2, 3); int32(2, 3) was expected"),
        ({"list": [LEAF, "float32(3, 2)"]}, "'1': the tensor is float32(2, 3); float32(3, 2) was expected"),
    ],
)
def test_structure_and_tensors_must_agree(tmp_path, structure, problem):
    tensors = {name: np.zeros((2, 3), np.float32) for name in "01"}
    assert problem in refusal(write(tmp_path / "caches.safetensors", structure, tensors))


@pytest.mark.parametrize(
    ("structure", "problem"),
    [
        ("[1, 2]", "must hold a JSON object; got a list"),
        ("{", "it is not JSON"),
        ('{"version": 1, "version": 1, "caches": null}', "the key 'version' comes twice"),
        ('{"version": 1}', "must hold version and caches, and nothing else"),
        (3, "'caches': no part of caches is described so; got 3"),
        ({"tuple": [], "list": []}, "'caches': no part of caches is described so; got a dict"),
        ({"set": []}, "'caches': no part of caches is described so"),
        ({"list": {"0": None}}, "'caches': no part of caches is described so"),
        ({"class": ["os"], "fields": {}}, "'caches': no part of caches is described so"),
        ({"class": "os.system", "fields": {}}, "'caches': the class 'os.system' is not known here"),
        ({"class": "Latents", "fields": {"scale": 1.5}}, "a Latents must have the fields latents, scale, name; got"),
        ({"class": "Latents", "fields": {"latents": None, "scale": [], "name": ""}}, "text or null; got scale=a list"),
        (
            {"class": "Latents", "fields": {"latents": None, "scale": 0, "name": ""}},
            "Latents refuses its fields (scale",
        ),
        ({"list": [3, {"list": [4]}]}, "2 problems.\n  '0': no part"),
    ],
)
def test_a_damaged_structure_is_refused_in_words(tmp_path, structure, problem):
    assert problem in refusal(write(tmp_path / "caches.safetensors", structure), kinds=[Latents])


def test_half_a_surrogate_pair_is_refused_in_words(tmp_path):
    text = b'{"__metadata__":{"attnax.caches":"\\ud800"}}'
    (tmp_path / "caches.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert "it is not JSON" in refusal(tmp_path / "caches.safetensors")


def test_the_depth_of_a_structure_is_bounded(tmp_path):
    too_deep = json.loads("[" * 900 + "]" * 900)
    assert "got a list" in refusal(write(tmp_path / "caches.safetensors", {"list": [too_deep]}))
    for depth, problem in ((MAX_DEPTH + 2, f"at most {MAX_DEPTH} containers deep"), (50_000, "it is not JSON")):
        text = '{"version":1,"caches":' + '{"list":[' * depth + "]}" * depth + "}"
        assert problem in refusal(write(tmp_path / "caches.safetensors", text))


def test_a_bool_is_0_or_1(tmp_path):
    path = tmp_path / "caches.safetensors"
    save_caches(path, [np.array([True, False, True])])
    path.write_bytes(path.read_bytes()[:-1] + b"\2")
    assert "'0': a bool must be 0 or 1" in refusal(path)


def test_of_mutated_structures_only_our_own_exception_comes_out(tmp_path):
    rng, path = np.random.default_rng(SEED), tmp_path / "caches.safetensors"
    save_caches(path, filled(KINDS["ring with a window"]))
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        text = file.metadata()["attnax.caches"]
    refused = 0
    for _ in range(60):
        changed, place = list(text), rng.integers(len(text))
        changed[place : place + rng.integers(2)] = [chr(rng.integers(32, 126)) for _ in range(rng.integers(3))]
        write(path, "".join(changed), tensors)
        try:
            load_caches(path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 30


def test_more_than_a_reader_takes_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="at most 100000 tensors, and a header of .*; got 1 tensors .* several files"):
        save_caches(tmp_path / "caches.safetensors", {"a" * (17 << 20): np.zeros(3)})
    with pytest.raises(ValueError, match="a tensor must have at most 8 axes; got more in 0"):
        save_caches(tmp_path / "caches.safetensors", [np.zeros((1,) * 9)])
    assert list(tmp_path.iterdir()) == []

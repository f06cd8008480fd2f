"""Checkpoints: they come back bit for bit on any devices, damage is found, and what is kept survives every failure."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from attnax.errors import InputError
from attnax.training import (
    Checkpoints,
    DamagedCheckpointError,
    best_checkpoint,
    checkpoint_arrays,
    checkpoint_steps,
    checkpoints,
    latest_checkpoint,
    manifest,
    restore,
    restore_items,
)
from attnax.training.manifest import Manifest

STATE = {
    "params": {"a": np.arange(6, dtype="f").reshape(2, 3), "b": (np.int32(7), {"c": np.ones(5, jnp.bfloat16)})},
    "counters": np.int32(3),
    "ema": (),
}
ITEMS = jax.device_put(STATE)


def save(folder, *updates, items=ITEMS, **options):
    with Checkpoints(folder, **options) as saving:
        for update in updates:
            saving.save(update, items)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def check_equal(have, want):
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for one, two in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def files_of(folder, step):
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of the steps 3 and 5, which no test changes."""
    made = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(made, 3, 5)
    return made


@pytest.fixture
def folder(saved, tmp_path):
    """Checkpoints of the steps 3 and 5."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.fixture
def without_arrays(monkeypatch):
    """Restoring checks everything and reads no array, which takes most of the time."""
    monkeypatch.setattr(restore, "read_items", lambda target, likes: likes)


class TestRestoring:
    def test_all_comes_back_exactly_and_any_item_alone(self, folder):
        likes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ITEMS)
        step, items = restore_items(folder, likes)
        assert step == 5 and items.keys() == STATE.keys()
        check_equal(items, STATE)
        check_equal(restore_items(folder, {"params": likes["params"]}, step=3)[1], {"params": STATE["params"]})
        assert checkpoint_arrays(folder, 3, "params")["b.1.c"] == ((5,), "bfloat16")
        assert latest_checkpoint(folder) == 5 and latest_checkpoint(folder / "nowhere") is None

    def test_arrays_of_numpy_may_change_after_a_save(self, tmp_path):
        tree = {"w": np.zeros((300, 1000), "f")}
        with Checkpoints(tmp_path) as saving:
            saving.save(1, {"params": tree})
            tree["w"] += 1
        assert not restore_items(tmp_path, {"params": tree})[1]["params"]["w"].any()

    def test_a_step_may_donate_the_arrays_as_soon_as_a_save_returns(self, tmp_path):
        step = jax.jit(lambda x: jax.tree.map(lambda x: x + 1, x), donate_argnums=0)
        state = jax.device_put({"a": np.zeros((700, 1000), "f"), "b": np.zeros(7, "f")})
        with Checkpoints(tmp_path, keep_last=9) as saving:
            for update in range(1, 6):
                state = step(state)
                saving.save(update, {"params": state})
                for _ in range(3):
                    state = step(state)
        for number in range(1, 6):
            saved = restore_items(tmp_path, {"params": state}, step=number)[1]["params"]
            assert all((np.asarray(x) == 4 * number - 3).all() for x in saved.values())

    def test_a_state_is_put_on_any_layout_bit_for_bit(self, tmp_path):
        """From 1 device to 8, in two axes, and to 2."""
        rng = np.random.default_rng(0)
        state = {"w": rng.normal(size=(24, 16)).astype("f"), "v": rng.normal(size=16).astype("f")}

        def placed(count, **axes):
            devices = np.array(jax.devices()[:count]).reshape(tuple(axes.values()))
            mesh = jax.sharding.Mesh(devices, tuple(axes))
            specs = {"w": jax.P(*axes), "v": jax.P(list(axes)[-1])}
            shape = jax.ShapeDtypeStruct
            return {
                name: shape(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, specs[name]))
                for name, x in state.items()
            }

        save(tmp_path, 1, items={"params": jax.device_put(state)})
        for update, layout in enumerate(
            [placed(8, fsdp=4, tensor=2), placed(2, fsdp=2), placed(8, fsdp=2, tensor=4), placed(1, fsdp=1)], 2
        ):
            _, items = restore_items(tmp_path, {"params": layout})
            assert all(items["params"][name].sharding == like.sharding for name, like in layout.items())
            check_equal(items["params"], state)
            save(tmp_path, update, items=items)

    def test_another_model_is_refused_by_name_shape_and_dtype(self, folder):
        params = STATE["params"]
        for change, words in (
            ({"a": np.zeros((2, 4), "f")}, r"a is float32\(2, 3\) in the checkpoint and float32\(2, 4\) in the model"),
            ({"a": np.zeros((2, 3), "i")}, r"float32\(2, 3\) in the checkpoint and int32\(2, 3\)"),
            ({"d": np.zeros(1)}, r"d is absent in the checkpoint"),
        ):
            with pytest.raises(InputError, match=words):
                restore_items(folder, {"params": {**params, **change}})
        with pytest.raises(InputError, match="has no nothing; it has counters, ema, params"):
            restore_items(folder, {"nothing": params})
        with pytest.raises(InputError, match="has no nothing"):
            checkpoint_arrays(folder, 3, "nothing")

    def test_only_its_owner_gets_it(self, tmp_path):
        save(tmp_path, 1, owner="this run")
        check_equal(restore_items(tmp_path, ITEMS, owner="this run")[1], STATE)
        for read in (restore_items, lambda folder, likes, **options: Checkpoints(folder).restore(likes)):
            with pytest.raises(InputError, match="belongs to another run"):
                read(tmp_path, ITEMS, owner="that run")
        with pytest.raises(InputError, match="1 belongs to another run"):
            save(tmp_path, 2, owner="that run")

    def test_what_is_not_there_is_said(self, folder, tmp_path):
        with pytest.raises(InputError, match=r"step must be one of 3, 5; got step=4\."):
            restore_items(folder, ITEMS, step=4)
        with pytest.raises(InputError, match="holds no checkpoint"):
            restore_items(tmp_path / "empty", ITEMS)
        assert Checkpoints(tmp_path / "empty").restore(ITEMS) is None

    def test_another_version_is_named(self, folder, monkeypatch):
        monkeypatch.setattr(manifest, "FORMAT", "attnax checkpoint 3")
        for changes in ({}, {"sha256": "as that version makes it"}, {"update": "five"}):
            content = json.loads((folder / "5.attnax.json").read_text())
            (folder / "5.attnax.json").write_text(json.dumps(content | changes))
            with pytest.raises(InputError, match=r"5\.attnax\.json was written by another version of attnax") as caught:
                Checkpoints(folder).restore(ITEMS)
            assert not isinstance(caught.value, DamagedCheckpointError) and checkpoint_steps(folder) == [3, 5]

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("device_kind", "TPU v5 lite", "saved on TPU v5 lite, and this process runs on cpu"),
            ("num_cores", 131, r"saved on 131 CPU cores, and this process runs on \d+"),
        ],
    )
    def test_another_machine_is_a_warning_where_training_goes_on(self, folder, monkeypatch, field, value, words):
        machine = checkpoints._machine
        monkeypatch.setattr(checkpoints, "_machine", lambda items: machine(items) | {field: value})
        save(folder, 7)
        monkeypatch.undo()
        with Checkpoints(folder) as going_on, pytest.warns(UserWarning, match=words + ".* in their last bits"):
            assert going_on.restore(ITEMS)[0] == 7
        assert restore_items(folder, ITEMS)[0] == 7  # to write with a model, that does not matter


class TestDamage:
    def check_found(self, folder, whole=3):
        """The newest checkpoint is not taken."""
        with pytest.warns(UserWarning, match=f"5 is damaged: .* That of step {whole} is taken") as caught:
            assert restore_items(folder, ITEMS)[0] == whole
        assert len(caught) == 1

    def check_bit_flips(self, folder, count, seed):
        rng = random.Random(seed)
        paths = [path for path in [*files_of(folder, 5), folder / "5.attnax.json"] if path.stat().st_size]
        for _ in range(count):
            path = rng.choice(paths)
            content = path.read_bytes()
            changed = bytearray(content)
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            self.check_found(folder)
            path.write_bytes(content)
        assert restore_items(folder, ITEMS)[0] == 5

    @pytest.mark.usefixtures("without_arrays")
    def test_a_changed_bit_is_found_and_the_step_before_is_taken(self, folder):
        self.check_bit_flips(folder, 20, seed=0)

    @pytest.mark.contract
    @pytest.mark.usefixtures("without_arrays")
    def test_100_changed_bits_are_found(self, folder):
        self.check_bit_flips(folder, 100, seed=1)

    @pytest.mark.thorough
    @pytest.mark.usefixtures("without_arrays")
    def test_2000_changed_bits_are_found(self, folder):
        self.check_bit_flips(folder, 2000, seed=2)

    def check_truncations(self, folder, count):
        rng = random.Random(0)
        paths = [path for path in [*files_of(folder, 5), folder / "5.attnax.json"] if path.stat().st_size]
        for _ in range(count):
            path = rng.choice(paths)
            content = path.read_bytes()
            path.write_bytes(content[: rng.randrange(len(content))])
            self.check_found(folder)
            path.write_bytes(content)

    @pytest.mark.usefixtures("without_arrays")
    def test_a_truncated_file_is_found(self, folder):
        self.check_truncations(folder, 20)

    @pytest.mark.thorough
    @pytest.mark.usefixtures("without_arrays")
    def test_200_truncated_files_are_found(self, folder):
        self.check_truncations(folder, 200)

    @pytest.mark.usefixtures("without_arrays")
    def test_each_deleted_or_added_file_is_found(self, folder):
        for path in files_of(folder, 5):
            content = path.read_bytes()
            path.unlink()
            self.check_found(folder)
            path.write_bytes(content)
        (folder / "5" / "params" / "extra").write_text("x")
        with pytest.warns(UserWarning, match="5 is damaged: params/extra was not saved with it"):
            assert restore_items(folder, ITEMS)[0] == 3
        assert restore_items(folder, {"counters": ITEMS["counters"]})[0] == 5  # no file of that was changed
        shutil.rmtree(folder / "5")
        self.check_found(folder)
        (folder / "5.attnax.json").unlink()
        assert restore_items(folder, ITEMS)[0] == 3

    @pytest.mark.usefixtures("without_arrays")
    def test_a_manifest_of_other_content_is_damaged(self, folder):
        of_three, of_five = ((folder / f"{step}.attnax.json").read_text() for step in (3, 5))
        changed_bits = [of_five.replace("checkpoint 2", name) for name in ("checkpoint 3", "checkpoinu 2")]
        for content in ("", "[]", "{}", "null", '{"sha256": 3}', "{" * 9, of_three, *changed_bits):
            (folder / "5.attnax.json").write_text(content)
            self.check_found(folder)

    def test_the_process_that_goes_on_deletes_what_is_damaged(self, folder):
        (folder / "5" / "_CHECKPOINT_METADATA").unlink()
        with Checkpoints(folder) as going_on, pytest.warns(UserWarning, match="_CHECKPOINT_METADATA is missing"):
            step, items = going_on.restore(ITEMS)
            assert step == 3 and names(folder) == ["3", "3.attnax.json"]
            going_on.save(5, items)
        check_equal(restore_items(folder, ITEMS, step=5)[1], STATE)

    def test_damage_of_the_step_that_was_asked_for_is_an_error_with_the_newest_whole_one(self, folder):
        for step, whole in ((5, 3), (3, None)):
            (folder / str(step) / "_CHECKPOINT_METADATA").write_text("")
            words = "None is whole" if whole is None else f"That of step {whole} is whole"
            with pytest.raises(DamagedCheckpointError, match=f"has changed since it was saved. {words}") as caught:
                restore_items(folder, ITEMS, step=step)
            assert caught.value.whole == whole
        with pytest.raises(DamagedCheckpointError, match="5 is damaged.* None is whole"):
            Checkpoints(folder).restore(ITEMS)
        assert checkpoint_steps(folder) == [3, 5]

    @pytest.mark.usefixtures("without_arrays")
    @pytest.mark.parametrize(("place", "name"), [(manifest, "_hash"), (Path, "read_bytes")])
    @pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
    def test_a_file_that_the_disk_fails_to_read_once_is_not_damage(self, folder, monkeypatch, place, name, code):
        original = getattr(place, name)

        def failing(path):
            if path.relative_to(folder).parts[0].startswith("5"):
                raise OSError(code, os.strerror(code), str(path))
            return original(path)

        with Checkpoints(folder) as going_on:
            with monkeypatch.context() as patch:
                patch.setattr(place, name, failing)
                for read in (going_on.restore, partial(restore_items, folder)):
                    with pytest.raises(OSError, match=os.strerror(code)) as caught:
                        read(ITEMS)
                    assert caught.value.errno == code and "/5" in caught.value.filename
                assert going_on.restore(ITEMS, step=3)[0] == 3
            assert going_on.restore(ITEMS)[0] == 5

    @pytest.mark.usefixtures("without_arrays")
    def test_a_file_that_goes_while_it_is_read_is_damage(self, folder, monkeypatch):
        original = manifest._hash

        def gone(path):
            if "5" in path.relative_to(folder).parts[0]:
                path.unlink(missing_ok=True)
            return original(path)

        monkeypatch.setattr(manifest, "_hash", gone)
        self.check_found(folder)

    @pytest.mark.usefixtures("without_arrays")
    def test_a_checkpoint_that_training_deletes_while_it_is_read_is_not_damaged(self, folder, monkeypatch):
        original = manifest.Manifest.check_files

        def deleted_first(self, place, *rest):
            if self.update == 5:
                checkpoints.delete(place, 5)
            original(self, place, *rest)

        monkeypatch.setattr(manifest.Manifest, "check_files", deleted_first)
        assert restore_items(folder, ITEMS)[0] == 3  # a warning would be an error


class TestKeeping:
    def test_the_last_the_best_and_every_few_are_kept(self, tmp_path):
        metrics = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.1, 5: 0.3, 6: None, 7: 0.8}
        with Checkpoints(tmp_path, keep_last=1, keep_best=2, keep_every=3) as saving:
            for update, metric in metrics.items():
                saving.save(update, {"params": ITEMS["counters"]}, metric=metric)
        assert names(tmp_path) == sorted(f"{step}{end}" for step in (2, 3, 4, 6, 7) for end in ("", ".attnax.json"))
        assert best_checkpoint(tmp_path) == 4 and best_checkpoint(tmp_path / "nowhere") is None
        (tmp_path / "4.attnax.json").write_text("damaged")  # so it is none of the best
        save(tmp_path, 8, items={"params": ITEMS["counters"]}, keep_last=1, keep_best=1)
        assert checkpoint_steps(tmp_path) == [2, 8]

    def test_training_that_went_back_says_so_before_it_saves(self, folder):
        with Checkpoints(folder) as saving:
            assert saving.restore(ITEMS, step=3)[0] == 3
            with pytest.raises(
                ValueError, match=r"above the newest checkpoint, 5; got update=4\. If training went back"
            ):
                saving.save(4, ITEMS)
            saving.discard_after(3)
            assert checkpoint_steps(folder) == [3]
            saving.save(4, ITEMS)
        assert checkpoint_steps(folder) == [3, 4]

    OTHERS = ("2024-01", "6.txt", "6.parquet", "7.json", "8.json.tmp", "mine.attnax.json", "mine")

    @pytest.mark.usefixtures("without_arrays")
    @pytest.mark.parametrize("start", ["restore", "restore a step", "save", "discard_after"])
    def test_remains_of_interruptions_are_deleted_and_other_files_are_not(self, folder, start):
        for name in ("7", "8.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-1731", "9", "2024-01"):
            (folder / name / "params").mkdir(parents=True)
        for step in (5, 6, 7, 8, 9):  # that of step 5 is whole, as in a copy that was made during a save
            (folder / f"{step}.attnax.json.tmp").write_text("{" if step == 6 else "")
        for name in self.OTHERS[1:]:
            (folder / name).write_text("x")
        assert checkpoint_steps(folder) == [3, 5]
        with Checkpoints(folder) as saving:
            match start:
                case "restore":
                    assert saving.restore(ITEMS)[0] == 5
                case "restore a step":
                    assert saving.restore(ITEMS, step=3)[0] == 3
                case "save":
                    with broken(checkpoints, "mark", FULL), pytest.raises(OSError, match="No space"):
                        saving.save(11, ITEMS)
                case "discard_after":
                    saving.discard_after(5)
        assert names(folder) == sorted(["3", "3.attnax.json", "5", "5.attnax.json", *self.OTHERS])

    def test_the_first_start_deletes_what_the_first_save_left(self, tmp_path):
        (tmp_path / "1.orbax-checkpoint-tmp").mkdir()
        (tmp_path / "1.attnax.json.tmp").touch()
        assert Checkpoints(tmp_path).restore(ITEMS) is None
        assert not names(tmp_path)

    @pytest.mark.usefixtures("without_arrays")
    @pytest.mark.parametrize("name", ["2024", "7", "007", "7.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-1731"])
    @pytest.mark.parametrize("start", ["restore", "save"])
    def test_what_has_the_name_of_a_step_and_was_not_saved_is_refused_and_stays(self, folder, name, start):
        (folder / name).mkdir()
        (folder / name / "mine.txt").write_text("x")
        before = sorted(folder.rglob("*"))
        with (
            Checkpoints(folder) as saving,
            pytest.raises(InputError, match=f"/{name} has the name of a checkpoint, .* Nothing was deleted. Move it"),
        ):
            saving.restore(ITEMS) if start == "restore" else saving.save(7, ITEMS)
        Checkpoints(folder).discard_after(5)
        assert sorted(folder.rglob("*")) == before

    @pytest.mark.usefixtures("without_arrays")
    @pytest.mark.parametrize("by_hand", ["deleted", "moved elsewhere"])
    @pytest.mark.parametrize("step", [3, 5])
    def test_a_checkpoint_whose_folder_was_deleted_by_hand_goes_without_an_error(self, folder, by_hand, step):
        if by_hand == "deleted":
            shutil.rmtree(folder / str(step))
        else:
            (folder / str(step)).rename(folder.parent / "elsewhere")
            (folder / str(step)).symlink_to(folder.parent / "elsewhere")
            (folder.parent / "elsewhere" / "_CHECKPOINT_METADATA").write_text("damaged")
        with Checkpoints(folder, keep_last=1) as going_on:
            if step == 5:
                with pytest.warns(UserWarning, match="5 is damaged: _CHECKPOINT_METADATA .* That of step 3 is taken"):
                    assert going_on.restore(ITEMS)[0] == 3
                assert names(folder) == ["3", "3.attnax.json"]
            going_on.save(7, {"params": ITEMS["counters"]})
        assert names(folder) == ["7", "7.attnax.json"]
        assert by_hand == "deleted" or (folder.parent / "elsewhere" / "params").is_dir()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"keep_last": 0}, "keep_last must be at least 1; got keep_last=0"),
            ({"keep_best": -1}, "keep_best must be at least 0; got keep_best=-1"),
            ({"keep_every": 0}, "keep_every must be at least 1; got keep_every=0"),
        ],
    )
    def test_wrong_numbers_are_refused_in_words(self, tmp_path, options, words):
        with pytest.raises(ValueError, match=words):
            Checkpoints(tmp_path, **options)

    def test_a_metric_that_is_not_finite_and_names_that_collide_are_refused(self, tmp_path):
        with Checkpoints(tmp_path) as saving:
            with pytest.raises(ValueError, match="metric must be finite; got metric=nan"):
                saving.save(1, ITEMS, metric=float("nan"))
            with pytest.raises(ValueError, match=r"paths of two arrays must differ; got a\.b twice"):
                saving.save(1, {"params": {"a": {"b": ITEMS["counters"]}, "a.b": ITEMS["counters"]}})
        assert not checkpoint_steps(tmp_path)


@contextlib.contextmanager
def broken(place, name, error):
    """A function that fails."""

    def fail(*arguments, **options):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, fail)
        yield


@contextlib.contextmanager
def limited_files(size):
    """Files may have this many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def read_only(folder):
    """The folder cannot be changed, also not by root, whose rights are dropped."""
    user = os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")


class TestFailures:
    @pytest.fixture
    def folder(self, saved):
        """Other users may read it, which they may not in pytest's folders."""
        with tempfile.TemporaryDirectory() as made:
            Path(made).chmod(0o755)
            yield shutil.copytree(saved, Path(made) / "checkpoints")

    def check_fails_and_goes_on(self, folder, failure, words, filename):
        """The error of a save comes at the next call, the steps before are whole, and the next save succeeds."""
        with Checkpoints(folder) as saving:
            with failure, pytest.raises(OSError, match=words) as caught:
                saving.save(7, ITEMS)
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    saving.check()
            assert filename in caught.value.filename
            saving.check()  # it was said
            assert checkpoint_steps(folder) == [3, 5]
            check_equal(restore_items(folder, ITEMS)[1], STATE)
            saving.save(8, ITEMS)
        assert names(folder) == ["5", "5.attnax.json", "8", "8.attnax.json"]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the other files of Orbax
    def test_files_that_the_disk_refuses(self, folder):
        self.check_fails_and_goes_on(folder, limited_files(100), "File too large", str(folder))

    @pytest.mark.parametrize("place", ["_hash_and_sync", "write_durable"])
    def test_a_disk_that_is_full_when_files_or_the_manifest_are_written(self, folder, place):
        self.check_fails_and_goes_on(folder, broken(manifest, place, FULL), "No space left on device", "the file")

    def test_a_folder_that_is_read_only(self, folder):
        self.check_fails_and_goes_on(folder, read_only(folder), "Permission denied", str(folder))

    def test_too_little_room_is_found_before_anything_is_written(self, folder, monkeypatch):
        usage = shutil.disk_usage(folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3))
        with (
            Checkpoints(folder) as saving,
            pytest.raises(OSError, match=r"a checkpoint takes 0\.0 MB, and 0\.0 MB") as no,
        ):
            saving.save(7, ITEMS)
        assert no.value.errno == errno.ENOSPC and no.value.filename == str(folder)
        assert names(folder) == ["3", "3.attnax.json", "5", "5.attnax.json"]

    def test_a_deletion_that_fails_is_said_and_loses_nothing(self, folder):
        with Checkpoints(folder) as saving:
            with broken(checkpoints.shutil, "rmtree", FULL), pytest.raises(OSError, match="No space left"):
                saving.save(7, ITEMS)
                saving.wait()
            assert checkpoint_steps(folder) == [5, 7]
            saving.save(8, ITEMS)
        assert names(folder) == ["7", "7.attnax.json", "8", "8.attnax.json"]

    @pytest.mark.parametrize(("place", "name"), [(manifest, "_hash_and_sync"), (ocp.AsyncCheckpointer, "save")])
    def test_what_is_no_error_of_the_disk_is_raised_as_it_is(self, folder, place, name):
        saving = Checkpoints(folder)
        with broken(place, name, ValueError("another")), pytest.raises(ValueError, match="another"):
            saving.save(7, ITEMS)
            saving.close()


def test_a_save_returns_before_it_is_on_the_disk_and_the_next_one_waits(tmp_path, monkeypatch):
    may_go_on, saved = threading.Event(), []
    original = Manifest.write

    def write(self, folder):
        assert may_go_on.wait(60)
        saved.append(self.update)
        original(self, folder)

    monkeypatch.setattr(Manifest, "write", write)
    with Checkpoints(tmp_path) as saving:
        saving.save(1, ITEMS)
        saving.check()
        assert not saved and not checkpoint_steps(tmp_path)
        may_go_on.set()
        saving.save(2, ITEMS)
        assert saved[:1] == [1] and checkpoint_steps(tmp_path)[0] == 1
    assert checkpoint_steps(tmp_path) == [1, 2]


def note(monkeypatch, made, before):
    """Adds each operation on files of a save to `made`, after `before()`."""

    def noting(place, name, path_of):
        original = getattr(place, name)

        def call(*arguments, **options):
            before()
            made.append((name, path_of(arguments[0])))
            return original(*arguments, **options)

        monkeypatch.setattr(place, name, call)

    noting(os, "fsync", lambda file: os.readlink(f"/proc/self/fd/{file}"))
    for name in ("replace", "unlink", "rmdir"):
        noting(os, name, str)


def test_all_is_on_the_disk_before_the_manifest_and_the_manifest_goes_first(tmp_path, monkeypatch):
    """So a power failure, too, leaves no checkpoint that is listed and cannot be read."""
    save(tmp_path, 1)
    made = []
    note(monkeypatch, made, lambda: None)
    save(tmp_path, 2, keep_last=1)
    place = {operation: number for number, operation in enumerate(made)}
    published = place["replace", f"{tmp_path}/2.attnax.json.tmp"]
    files = [tmp_path / "2", *(tmp_path / "2").rglob("*")]
    assert len(files) > 20 and all(place["fsync", str(path)] < published for path in files)
    assert place["fsync", f"{tmp_path}/2.attnax.json.tmp"] < published
    syncs = [number for number, operation in enumerate(made) if operation == ("fsync", str(tmp_path))]
    assert made[:2] == [("fsync", f"{tmp_path}/2.attnax.json.tmp"), ("fsync", str(tmp_path))]  # before Orbax begins
    unlisted = place["replace", f"{tmp_path}/1.attnax.json"]
    first_gone = min(
        number for number, (name, _) in enumerate(made) if name in ("unlink", "rmdir") and number > unlisted
    )
    assert syncs[1] < published < syncs[2] < unlisted < syncs[3] < first_gone
    assert first_gone < place["rmdir", f"{tmp_path}/1"] < syncs[4]
    assert made[syncs[4] + 1 :] == [("unlink", f"{tmp_path}/1.attnax.json.tmp")]


class Killed(BaseException):
    """Like kill -9: no operation on files comes after it."""


class TestDeath:
    """The process dies before an fsync, a rename or a deletion of its second save, which deletes the first."""

    counter, params = {"params": ITEMS["counters"]}, {"params": ITEMS["params"]}

    @pytest.fixture
    def first(self, tmp_path):
        save(tmp_path / "first", 1, items=self.counter)
        return tmp_path / "first"

    def save_and_die(self, folder, count=10**6):
        """Returns the operations made, at most `count`."""
        made = []

        def before():
            if len(made) >= count:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            note(patch, made, before)
            with contextlib.suppress(Killed):
                save(folder, 2, items=self.params, keep_last=1)
        return [(name, path.replace(f"{folder}/", "")) for name, path in made]

    def check_nothing_is_lost(self, first, counts):
        """What is listed is whole, the second is listed once it is published, and nothing else is left."""
        for count in counts:
            folder = shutil.copytree(first, first.parent / str(count))
            made = self.save_and_die(folder, count)
            steps = checkpoint_steps(folder)
            assert steps[-1] == (2 if ("replace", "2.attnax.json.tmp") in made else 1)
            for step in steps:
                likes = self.counter if step == 1 else self.params
                check_equal(restore_items(folder, likes, step=step)[1], likes)
            with Checkpoints(folder) as going_on:
                going_on.discard_after(2)
            assert names(folder) == sorted(f"{step}{end}" for step in steps for end in ("", ".attnax.json"))

    def test_it_loses_nothing(self, first, tmp_path):
        operations = self.save_and_die(shutil.copytree(first, tmp_path / "undisturbed"))
        published, unlisted = (
            operations.index(("replace", "2.attnax.json.tmp")),
            operations.index(("replace", "1.attnax.json")),
        )
        assert 10 < published < unlisted < len(operations) - 5
        self.check_nothing_is_lost(first, [3, published, unlisted, unlisted + 1, unlisted + 4])

    @pytest.mark.contract
    def test_it_loses_nothing_at_any_operation(self, first, tmp_path):
        operations = self.save_and_die(shutil.copytree(first, tmp_path / "undisturbed"))
        self.check_nothing_is_lost(first, range(len(operations)))


def test_several_processes_that_are_not_joined_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="Checkpoints: several processes must be joined; got 2 that are not. Call att"):
        Checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ({"w": {"epoch": 3}}, r"the leaves of an item must be arrays; got \['w'\]\['epoch'\]=3. Take np.asarray of it"),
        ([1], r"items must be pytrees by name; got list. Give \{'state': ...\} with it."),
    ],
)
def test_what_is_no_item_is_refused(tmp_path, items, words, unchecked_shapes):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=f"Checkpoints.save: {words}"):
            checkpoints.save(1, items)
        with pytest.raises(ValueError, match="Checkpoints.restore: "):
            checkpoints.restore(items)


def test_a_step_may_be_a_number_of_numpy(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(np.int64(3), {"w": np.ones(2)})
    assert checkpoint_steps(tmp_path) == [3]

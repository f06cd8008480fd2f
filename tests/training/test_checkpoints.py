"""Checkpoints: they come back bit for bit on any devices, and damage is found."""

import errno
import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from saved_state import ITEMS, STATE, check_equal, names, save

from attnax.errors import InputError
from attnax.training import (
    Checkpoints,
    DamagedCheckpointError,
    checkpoint_arrays,
    checkpoint_steps,
    checkpoints,
    latest_checkpoint,
    manifest,
    restore_items,
)


def files_of(folder, step):
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


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

"""Checkpoints: what is kept survives every failure of the disk and every death of the process."""

import contextlib
import errno
import os
import resource
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from saved_state import ITEMS, STATE, check_equal, names, save

from attnax.errors import InputError
from attnax.training import (
    Checkpoints,
    best_checkpoint,
    checkpoint_steps,
    checkpoints,
    manifest,
    restore_items,
)
from attnax.training.manifest import Manifest


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

    def test_an_error_that_names_no_file_names_the_folder(self, folder):
        nameless = OSError(errno.EFBIG, "File too large")
        with broken(ocp.AsyncCheckpointer, "close", nameless), pytest.raises(OSError, match="File too large") as caught:
            save(folder, 7)
        assert caught.value.filename == str(folder)

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

    def test_files_that_a_thread_still_makes_after_a_failure_are_deleted(self, folder):
        with Checkpoints(folder) as saving:
            with broken(manifest, "_hash_and_sync", FULL), pytest.raises(OSError, match="No space left"):
                saving.save(7, ITEMS)
                saving.wait()
            (folder / "7.orbax-checkpoint-tmp").mkdir()
            saving.save(8, ITEMS)
        assert names(folder) == ["5", "5.attnax.json", "8", "8.attnax.json"]

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


def test_a_step_may_be_a_number_of_numpy(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(np.int64(3), {"w": np.ones(2)})
    assert checkpoint_steps(tmp_path) == [3]


def test_a_launcher_learns_of_a_checkpoint_when_it_is_whole(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(checkpoints, "beat", lambda checkpoint: told.append((checkpoint, checkpoint_steps(tmp_path))))
    save(tmp_path, 3, 7)
    assert told == [(3, [3]), (7, [3, 7])]

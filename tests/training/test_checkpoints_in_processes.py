"""Two real processes save, restore, fail and die together, at the loopback; one process reads what they saved."""

import contextlib
import io
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from two_savers import VALUES

from attnax.launcher import Job, attempts, crew, run
from attnax.training import Checkpoints, restore_items

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes work; `alone` has what one process saved."""
    made = tmp_path_factory.mktemp("two")
    with Checkpoints(made / "alone") as saving:
        saving.save(1, {"state": VALUES, "empty": ()})
    return made


@pytest.fixture(scope="module")
def printed(folder):
    """The lines of each process by their first word, after both attempts."""
    line = [sys.executable, str(Path(__file__).with_name("two_savers.py")), str(folder)]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent))
        patch.setattr(attempts, "_LONGEST_PAUSE", 0.0)
        patch.setattr(attempts, "_LOOK", 0.01)
        patch.setattr(crew, "_FOR_STACKS", 0.3)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(Job(words=lambda again: line, processes=2, devices=1, restarts=1, stall=100.0))
    text, errors = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert code == 0, text + errors
    found = ({}, {})
    for process, name, words in re.findall(r"^\[([01])\] (\w+): (.*)$", text, re.MULTILINE):
        found[int(process)].setdefault(name, []).append(words.replace(f"{folder}/", ""))
    return found


def names(*steps, remains=()):
    return str(sorted([*(f"{step}{end}" for step in steps for end in ("", ".attnax.json")), *remains]))


def both(printed, name):
    """The lines that both processes printed alike."""
    one, two = (lines[name] for lines in printed)
    assert one == two
    return one


def test_the_last_and_the_best_are_kept_and_come_back_where_they_lay(printed):
    assert both(printed, "kept") == [names(2, 3, 4)]
    assert both(printed, "devices") == ["2"]
    assert both(printed, "pulse") == ["4"]


def test_one_process_reads_and_waits_for_none(printed):
    assert both(printed, "alone") == ["process 0 has read"]


def test_two_processes_read_what_one_saved(printed):
    assert both(printed, "resharded") == ["1"]


def test_an_error_of_process_0_is_that_of_all(printed):
    update, step, owner, mark = both(printed, "refused")
    assert "ValueError Checkpoints.save: update must be above the newest checkpoint, 4; got update=4." in update
    assert step == "InputError checkpoints: step must be one of 2, 3, 4; got step=9."
    assert owner == "InputError the checkpoint checkpoints/4 belongs to another run."
    assert mark == "PermissionError [Errno 13] Permission denied: 'the mark'"


def test_an_error_of_another_kind_ends_the_call_in_all(printed):
    first, second = (lines["bug"] for lines in printed)
    assert (first, second) == (["ProcessError process 1 failed: TypeError: a bug"], ["TypeError a bug"])


def test_a_changed_bit_is_found_and_both_take_the_step_before(printed):
    damaged = "the checkpoint checkpoints/4 is damaged: state/manifest.ocdbt has changed since it was saved."
    assert [lines["damaged"] for lines in printed] == [[f"3 ['{damaged} That of step 3 is taken.']"], ["3 []"]]
    assert both(printed, "asked") == [f"DamagedCheckpointError {damaged} That of step 3 is whole."]


def test_a_full_disk_in_one_process_fails_the_save_in_both_and_the_next_one_succeeds(printed):
    of_orbax, *others = both(printed, "full")
    assert of_orbax == "OSError [Errno 27] File too large: 'checkpoints'"
    assert others == ["OSError [Errno 28] No space left on device: 'a file'"] * 3
    assert both(printed, "left") == [names(2, 3, 4, remains=["5.attnax.json.tmp"]), names(3, 4, 6)]


def test_a_process_that_fails_where_orbax_waits_is_not_waited_for_without_limit(printed):
    assert both(printed, "orbax") == ["OSError [Errno 28] No space left on device: 'a folder'"]
    first, second = (lines["late"] for lines in printed)
    assert first == ["OSError [Errno 28] No space left on device: 'a folder'"]
    assert second == [
        "ProcessError checkpoints/7: all 2 processes must come to the beginning of a save within 300 s; "
        "one or more did not. Look at their logs."
    ]


def test_a_folder_that_is_not_shared_is_said(printed):
    words = "InputError {} must be on a disk that all processes share; process 1 does not see {} as process 0 does."
    at_a_save, at_a_restore = both(printed, "apart")
    assert at_a_save.startswith(words.format("local", "1.attnax.json.tmp"))
    assert at_a_restore.startswith(words.format("copy", "6.attnax.json"))


def test_a_process_that_is_killed_during_a_save_loses_nothing(printed):
    assert both(printed, "remains") == [names(6, 7, remains=["8", "8.attnax.json.tmp"])]
    assert both(printed, "found") == [f"7 {names(6, 7)}"]


@pytest.mark.usefixtures("printed")
def test_another_process_reads_it_bit_for_bit_on_other_devices(folder):
    mesh = jax.make_mesh((3,), ("data",), devices=jax.devices()[:3], axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.ShapeDtypeStruct((2, 3), np.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "data")))
    step, items = restore_items(folder / "checkpoints", {"state": {**VALUES, "cut": cut}})
    assert step == 7 and items["state"]["cut"].sharding == cut.sharding
    for name, value in VALUES.items():
        assert np.asarray(items["state"][name]).tobytes() == value.tobytes()

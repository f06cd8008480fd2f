"""What processes decide together, with threads in the place of processes."""

import errno
import hashlib
import itertools
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from attnax.distributed import ProcessError
from attnax.errors import InputError
from attnax.training import DamagedCheckpointError, rounds, same_disk
from attnax.training.manifest import hash_files
from attnax.training.rounds import Rounds

COUNT = 3
me = threading.local()


@pytest.fixture
def together(monkeypatch):
    """Runs a function of `Rounds` and the number of the process in each of three; returns results or errors."""
    barrier, sent, counts = threading.Barrier(COUNT), {}, defaultdict(itertools.count)

    def gather(name, text, seconds):
        assert name == "a name" and seconds == 3600.0
        key = next(counts[me.number])
        sent[key, me.number] = text
        barrier.wait(30)
        return tuple(sent[key, number] for number in range(COUNT))

    def run(function):
        def one(number):
            me.number = number
            try:
                return function(Rounds("a name"), number)
            except (OSError, ValueError, RuntimeError, TypeError) as error:
                return error

        with ThreadPoolExecutor(COUNT) as threads:
            return list(threads.map(one, range(COUNT)))

    monkeypatch.setattr(jax, "process_count", lambda: COUNT)
    monkeypatch.setattr(rounds, "gather", gather)
    monkeypatch.setattr(rounds, "is_main", lambda: me.number == 0)
    return run


def raising(error, *numbers):
    """A function of rounds in which these processes fail in the second one; nobody comes to the third."""

    def fail():
        raise error

    def function(these, number):
        assert these.each(lambda: number) == [0, 1, 2]
        if number in numbers:
            these.each(fail)
        these.agree()
        these.agree(pytest.fail("a round after an error"))

    return function


def test_all_know_what_each_found_and_what_process_0_decided(together):
    found = together(lambda these, number: (these.each(lambda: number**2), these.lead(lambda: [number, "words", None])))
    assert found == [([0, 1, 4], [0, "words", None])] * COUNT


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a file"),
        OSError("no number"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a file"),
        InputError("another run"),
        DamagedCheckpointError("damaged", 7),
        ValueError("a metric"),
    ],
)
def test_an_error_of_one_is_raised_in_all_as_it_is(together, error):
    found = together(raising(error, 1))
    assert found[1] is error
    for other in found:
        assert type(other) is type(error) and str(other) == str(error)
        assert vars(other) == vars(error) and getattr(other, "errno", None) == getattr(error, "errno", None)


def test_another_kind_of_error_says_whose_it_was(together):
    found = together(raising(TypeError("a bug"), 2))
    assert [type(error) for error in found] == [ProcessError, ProcessError, TypeError]
    assert str(found[0]) == "process 2 failed: TypeError: a bug"


def test_of_several_errors_all_raise_that_of_the_first_process(together):
    def function(these, number):
        with these.part():
            if number:
                raise OSError(errno.EIO, "Input/output error", f"file {number}")

    assert [error.filename for error in together(function)] == ["file 1"] * COUNT


def test_process_0_asks_and_may_pass_over_what_it_hears(together):
    def decide(ask):
        assert ask(3) == [30, 31, 32]
        assert ask(5) == [50, 51, 52]
        return "decided"

    def fail(ask):
        ask(7)
        raise InputError("nothing is whole")

    found = together(lambda these, number: these.lead_and_ask(decide, lambda question: 10 * question + number))
    assert found == ["decided"] * COUNT
    found = together(lambda these, number: these.lead_and_ask(fail, lambda question: None))
    assert [(type(error), str(error)) for error in found] == [(InputError, "nothing is whole")] * COUNT


def test_nobody_is_told_twice(together):
    def function(these, number):
        try:
            raising(OSError(errno.EIO, "Input/output error", "a file"), 1)(these, number)
        except OSError as error:
            these.fail(error)  # as in a thread that hears of the error from another one

    assert [error.errno for error in together(function)] == [errno.EIO] * COUNT


def test_an_error_is_not_hidden_by_others_that_do_not_come(together, monkeypatch):
    def gather(*_):
        raise ProcessError("process 1 did not")

    monkeypatch.setattr(rounds, "gather", gather)
    found = together(lambda these, number: these.fail(OSError(errno.EIO, "Input/output error", "a file")))
    assert [error.errno for error in found] == [errno.EIO] * COUNT
    assert [type(error) for error in together(lambda these, number: these.agree())] == [ProcessError] * COUNT


def test_a_process_alone_sends_nothing(monkeypatch):
    monkeypatch.setattr(rounds, "gather", None)
    these = Rounds("a name")
    assert these.agree((1, 2)) == [(1, 2)] and these.lead(lambda: {3}) == {3}
    with pytest.raises(KeyError), these.part():
        raise KeyError


def test_each_file_is_the_share_of_one_process(tmp_path, monkeypatch):
    names = [f"file{number}" for number in range(7)]
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(jax, "process_count", lambda: COUNT)
    shares = []
    for number in range(COUNT):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        shares.append(same_disk.my_share(tmp_path, names))
    assert shares == [names[0::3], names[1::3], names[2::3]]


def test_a_file_that_comes_late_is_waited_for_and_another_one_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(same_disk, "is_main", lambda: False)
    path = tmp_path / "mark"
    threading.Timer(0.2, path.touch).start()
    nothing = (0, hashlib.sha256().hexdigest())
    same_disk.require_seen(path, nothing)
    path.write_text("of another disk")
    monkeypatch.setattr(same_disk, "_LATE", 0.1)
    with pytest.raises(InputError, match="must be on a disk that all processes share; process 0 does not see mark as"):
        same_disk.require_seen(path, nothing)


def test_process_0_hashes_what_the_others_do_not_find(tmp_path):
    target, names = tmp_path / "5", ["a", "b"]
    target.mkdir()
    for path in (tmp_path / "5.attnax.json", target / "a", target / "b"):
        path.write_text(path.name)
    want = hash_files(target, names)
    asked = []

    def ask(question):
        asked.append(question)
        return [{"digests": {}}, {"digests": {"a": list(want["a"])}}]

    assert same_disk.hash_by_asking(ask)(target, names) == want
    (question,) = asked
    assert same_disk.answer_with_digests(tmp_path, question) == {"digests": want}
    (tmp_path / "5.attnax.json").write_text("of another disk")
    answer = same_disk.answer_with_digests(tmp_path, question)
    with pytest.raises(InputError, match=r"must be on a disk that all .* does not see 5\.attnax\.json"):
        same_disk.hash_by_asking(lambda question: [{"digests": {}}, answer])(target, names)


def test_a_checkpoint_that_was_deleted_meanwhile_is_no_disk_that_is_not_shared(tmp_path):
    def ask(question):
        (tmp_path / "5.attnax.json").unlink()
        return [same_disk.answer_with_digests(tmp_path, question)]

    (tmp_path / "5.attnax.json").touch()
    with pytest.raises(FileNotFoundError, match=r"5\.attnax\.json"):
        same_disk.hash_by_asking(ask)(tmp_path / "5", [])

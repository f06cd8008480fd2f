"""The times in the rows of metrics: what an update took, the share of the peak, and goodput."""

import pytest

from attnax.cli import stopwatch as module
from attnax.cli.stopwatch import TIMED, Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test moves on."""

    class Clock:
        now = 1000.0

        def time(self):
            return self.now

        perf_counter = time

    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def make(rows=(), started=1000.0, peak=50.0):
    return Stopwatch(started=started, rows=rows, tokens=12, flops=100.0, peak=peak)


def test_an_update_lasts_from_the_end_of_the_one_before_and_pauses_do_not_count(clock):
    watch = make()
    clock.now += 30  # compiles
    assert watch.measure() == {"seconds": 30.0, "goodput": 0.0}
    clock.now += 4
    row = watch.measure()
    assert row == {"seconds": 34.0, "step_seconds": 4.0, "tokens_per_second": 3.0, "mfu": 0.5, "goodput": 0.117647}
    with watch.paused():
        clock.now += 100
    clock.now += 2
    assert (row := watch.measure())["step_seconds"] == 2.0 and row["mfu"] == 1.0
    assert row["seconds"] == 136.0 and row["goodput"] == pytest.approx(6 / 136, rel=1e-5)
    assert set(row) < set(TIMED)


def test_goodput_counts_the_updates_that_are_kept_over_all_seconds_since_the_start(clock):
    """The run began 200 s before this process, which goes on after ten updates of 5 s."""
    rows = [{"step": n, "step_seconds": 5.0, "seconds": 7.0 * n} for n in range(1, 11)]
    watch = make([*rows, {"step": 10, "held_out_bits_per_byte": 2.0}], started=800.0)
    clock.now += 10
    assert watch.measure() == {"seconds": 80.0, "goodput": pytest.approx(50 / 210, rel=1e-5)}
    clock.now += 5
    assert watch.measure()["goodput"] == pytest.approx(55 / 215, rel=1e-5)


def test_without_a_known_start_goodput_counts_from_the_training_on(clock):
    watch = make([{"step": 1, "step_seconds": 3.0, "seconds": 6.0}], started=None, peak=None)
    clock.now += 2
    watch.measure()
    clock.now += 4
    row = watch.measure()
    assert row["goodput"] == pytest.approx(7 / 12, rel=1e-5) and "mfu" not in row


def test_a_clock_that_was_set_back_gives_no_more_than_1(clock):
    watch = make(started=5000.0)
    watch.measure()
    clock.now += 1
    assert watch.measure()["goodput"] == 1.0


def test_a_device_that_knows_its_memory_says_its_peak(clock, monkeypatch):
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 7}

    monkeypatch.setattr(module.jax, "local_devices", lambda: [Device()])
    assert make().measure()["memory"] == 7

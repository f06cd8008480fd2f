"""The GPU benchmark, rehearsed: its results and its exit codes, on a machine without a GPU."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from attnax import standard_attention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def gpu(*arguments):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_pairs_is_the_number_of_pairs_that_the_mask_allows(load):
    cases = load("_gpu_cases")
    for name, case in cases.CASES.items():
        for length in (7, 101, 1103):
            q, kv = np.indices((length, length))
            kept = np.ones((length, length)) if case.keep is None else case.keep(0, 0, q, kv, case.extra(length, 4))
            assert cases.PAIRS[name](length) == kept.sum()


class Process:
    """Answers like a side, with made-up figures."""

    def __init__(self, seconds=1.0, value=1.0, check=None):
        self.seconds, self.value, self.check, self.times = seconds, value, check, 0

    def send(self, **request):
        self.request = request

    def answer(self):
        if "check" in self.request:
            return {"checks": [self.check] * len(self.request["check"])}
        if "prepare" in self.request:
            said = {"sample": [[self.value] * 512], "compile_seconds": 0.1}
            return {"forward": said, "forward + backward": {"reason": "no backward"} if self.value == 2 else said}
        self.times += 1
        return {"seconds": self.seconds * (3.5 if "backward" in self.request["time"] else 1.0)}

    def ask(self, **request):
        self.send(**request)
        return self.answer()


def result(ratio):
    return [{"result": "out", "ratio": 1.0, "allowed": 2.0}, {"result": "dv", "ratio": ratio, "allowed": 2.0}]


@pytest.mark.parametrize("wrong", [result(float("nan")), result(2.1), {"reason": "ValueError: no"}])
def test_a_wrong_kernel_is_not_timed_and_peers_that_differ_are_not_compared(load, tmp_path, capsys, wrong):
    bench = load("gpu")
    options = bench.parse(["--rehearse", "--cases", "full"])
    report = bench.Report({}, list(bench.SIDES), tmp_path / "figures.json", tmp_path / "table.md")
    sides = {
        "pallas": Process(check=wrong),
        "automatic": Process(0.5, check=result(0.9)),
        "cudnn": Process(0.25),
        "sdpa": Process(value=2.0),
        "flex": Process(value=1.01),
    }
    bench.run(options, report, sides, {})
    found = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert sides["pallas"].times == 0 and sides["sdpa"].times == 0 and sides["automatic"].times == 4
    cells = found[0]["sides"]
    assert cells["pallas"] == {"reason": "FAILED its check"} and "another result" in cells["sdpa"]["reason"]
    assert cells["automatic"]["ms"] == pytest.approx(500) and "ms" in cells["flex"]
    assert cells["automatic"]["tflops"] == pytest.approx(4 * 40**2 * 2 * 4 * 16 / 0.5 / 1e12)
    assert found[1]["sides"]["automatic"]["tflops"] == pytest.approx(cells["automatic"]["tflops"])
    assert found[2]["sides"]["sdpa"] == {"reason": "no backward"}
    assert (
        found[0]["ratios"]["automatic / best peer"] == pytest.approx(0.5)
        and found[0]["ratios"]["Pallas / Flex"] is None
    )
    text = (tmp_path / "table.md").read_text()
    assert "FAILED: " in text and "- [1] " in text and "FAILED: " in capsys.readouterr().out
    assert any("Attnax Pallas" in failure for failure in report.failures())


def test_the_check_finds_a_slightly_wrong_kernel(load, monkeypatch):
    cases = load("_gpu_cases")
    job = cases.Job("causal", 40, 16, 8, 2, 2)
    ratios = {}
    for scale in (0.25, 0.252):

        def kernel(*args, scale=scale, **options):
            return standard_attention(*args, scale=scale, **options)

        monkeypatch.setattr(cases, "attnax_kernel", lambda *_, kernel=kernel, **__: kernel)
        ratios[scale] = [result["ratio"] for result in cases.check("pallas", job, rehearse=True)]
    assert max(ratios[0.25]) <= 1.5 and min(ratios[0.252][:3]) > 2.0


@pytest.mark.contract
def test_rehearsal_checks_times_and_writes(tmp_path):
    figures, table = tmp_path / "figures.json", tmp_path / "table.md"
    options = ["--rehearse", "--sides", "pallas", "cudnn", "--cases", "alibi", "--json", str(figures)]
    done = gpu(*options, "--markdown", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    [check], [line] = found["checks"], found["lines"]
    assert check["passed"] and [result["result"] for result in check["all"]][-1] == "gradient of slopes"
    assert (line["case"], line["length"], line["head_dim"], line["heads"], line["batch"]) == ("alibi", 40, 16, 4, 2)
    assert len(line["sides"]["pallas"]["forward"]["seconds"]) == 2
    assert "cuDNN is not detected" in line["sides"]["cudnn"]["forward"]["reason"]
    assert [row["pass"] for row in found["rows"]] == ["forward", "backward", "forward + backward"]
    assert "| alibi | 16 | 4/4 | 2 | 40 | forward |" in table.read_text()
    assert "RuntimeError: cuDNN is not detected" in table.read_text()
    again = gpu(*options, "--resume", "--limit-seconds", "0")
    assert again.returncode == 0 and json.loads(figures.read_text())["lines"] == [line]


@pytest.mark.contract
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="for machines without a GPU")
def test_without_a_gpu_the_command_says_so():
    for options in ([], ["--tiles"]):
        done = gpu(*options, "--sides", "pallas")
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == (
            "gpu.py: needs an NVIDIA GPU, but JAX computes on cpu; --rehearse runs it tiny on a CPU.\n"
        )

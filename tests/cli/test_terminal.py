"""The command at a terminal: encodings, closed streams, Ctrl-C, names on a hub, and waiting."""

import errno
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import fake_hub
from small_tokenizers import byte_level, copy_of
from tiny import build

from attnax import TransformerLM
from attnax.cli import main, terminal
from attnax.pretrained import save_pretrained


def run_python(code, **variables):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, env={**os.environ, **variables}, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny published model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    sizes = {"vocab_size": 310, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "max_len": 64}
    kind = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False}
    save_pretrained(build(lambda rngs: TransformerLM(rngs, **sizes, **kind)), folder)
    copy_of(byte_level).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def silent(monkeypatch):
    """Models write nothing after their prompt."""
    monkeypatch.setattr(TransformerLM, "stream", lambda self, ids, **options: iter(()))


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", rb"\xe9\u65e5"), ("latin-1", b"\xe9\\u65e5"), ("utf-8", "é日".encode())]
)
def test_what_an_encoding_lacks_is_spelled(model, silent, monkeypatch, encoding, expected):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    assert main(["generate", str(model), "--prompt", "é日"]) == 0
    assert written.getvalue() == expected + b"\n"
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="replace"))  # the user asked for it
    assert main(["generate", str(model), "--prompt", "é日"]) == 0
    assert (b"?" in written.getvalue()) == (encoding != "utf-8")


def test_an_output_that_is_full_is_named(model, monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["generate", str(model), "--prompt", "x"]) == 2
    assert capsys.readouterr().err == "attnax: standard output: No space left on device.\n"


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_closed_stream_is_written_to_in_vain(model, silent, monkeypatch, command):
    """Python has no stream in a process that was started without it, as with >&-."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main([command, str(model)] + ["--prompt", "x"] * (command == "generate")) == 0
    assert main(["generate", "./nowhere"]) == 2
    sys.stdout.close(), sys.stderr.close()


WRITES = """
import sys
from attnax import TransformerLM
from attnax.cli import main
TransformerLM.stream = lambda self, ids, **options: iter(())
sys.exit(main(["generate", sys.argv[1], "--prompt", "é日"]))
"""


def test_ctrl_c_while_packages_are_imported_is_quiet():
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore for what runs in their background
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "tyro":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["attnax", "--help"]
os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
from attnax.cli import entry
entry()
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, b"", b"")


@pytest.mark.contract
def test_published_models_need_no_package_of_the_training(model):
    absent = "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'tqdm'])); "
    done = run_python(absent + WRITES.replace("sys.argv[1]", repr(str(model))))
    assert (done.returncode, done.stderr) == (0, b"")
    done = run_python(absent + f"from attnax.cli import main; main(['inspect', {str(model)!r}])")
    assert done.returncode == 0 and done.stdout and not done.stderr
    extras = (Path(__file__).parents[2] / "pyproject.toml").read_text().partition("pretrained = [")[2].partition("]")[0]
    assert {"tyro", "tokenizers", "huggingface_hub"} == {line.strip(' ",').partition(">")[0] for line in extras.split()}


def test_what_is_waited_for_is_said_at_a_terminal_only(model, silent, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "compile_cache", lambda: "/somewhere")
    assert main(["generate", str(model), "--prompt", "x"]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["generate", str(model), "--prompt", "x"]) == 0
    out, error = capsys.readouterr()
    assert out == "x\n"
    assert error.splitlines() == [f"loading    {model}", "compiling  (programs are kept in /somewhere)"]
    monkeypatch.setattr(terminal, "compile_cache", lambda: None)
    assert terminal.compiling() == "compiling"


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    code = """
import json, os, sys
import jax
from attnax.cli import terminal
found = []
for variables, set_by_hand, wanted in json.loads(sys.argv[1]):
    os.environ.update({"XDG_CACHE_HOME": ""} | variables)
    jax.config.update("jax_compilation_cache_dir", set_by_hand)
    terminal.keep_programs(wanted)
    found.append(terminal.compile_cache())
print(json.dumps(found))
"""
    (tmp_path / "file").touch()
    cases = [
        ({}, None, True, f"{tmp_path}/.cache/attnax/programs"),
        ({"XDG_CACHE_HOME": "relative"}, None, True, f"{tmp_path}/.cache/attnax/programs"),
        ({"XDG_CACHE_HOME": f"{tmp_path}/mine"}, None, True, f"{tmp_path}/mine/attnax/programs"),
        ({}, "/set/by/hand", True, "/set/by/hand"),  # as JAX_COMPILATION_CACHE_DIR does
        ({}, None, False, None),
        ({"XDG_CACHE_HOME": f"{tmp_path}/file"}, None, True, None),
    ]
    done = run_python(code.replace("sys.argv[1]", repr(json.dumps([case[:3] for case in cases]))), HOME=str(tmp_path))
    assert json.loads(done.stdout) == [expected for *_, expected in cases], done.stderr
    words = (
        f"attnax: {tmp_path}/file/attnax/programs cannot be made (Not a directory), so compiled programs are not kept."
    )
    assert done.stderr.decode().splitlines() == [words]


@pytest.mark.parametrize(("flags", "wanted"), [([], True), (["--no-compile-cache"], False)])
def test_the_cache_folder_can_be_switched_off(model, silent, monkeypatch, flags, wanted):
    asked = []
    monkeypatch.setattr(terminal, "keep_programs", asked.append)
    assert main(["generate", str(model), "--prompt", "x", *flags]) == 0
    assert main(["train", "--data", "", *flags]) == 2
    assert asked == [wanted]


@pytest.fixture(scope="module")
def hub(model, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "llama"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"unheard_of": 3, "n_special": 0}))
    with fake_hub({"tiny/llama": {"main": model, "v2": other}}) as (url, asked):
        home = str(tmp_path_factory.mktemp("hf"))
        yield {"HF_ENDPOINT": url, "HF_HOME": home, "NO_PROXY": "127.0.0.1"}, asked


@pytest.mark.contract
def test_a_name_on_the_hub_is_as_good_as_a_folder(hub):
    """The variables of huggingface_hub, its cache and its offline mode."""
    variables, asked = hub
    code = WRITES.replace('"generate", sys.argv[1]', '"generate", "tiny/llama", "--draft", "tiny/llama"').replace(
        "TransformerLM.stream =", "TransformerLM.generate ="
    )
    code = code.replace("iter(())", "NONE").replace(
        "TransformerLM.generate",
        "import numpy as np; from attnax.generation import Generation\n"
        "NONE = Generation(*(np.zeros((1, 1), int), np.zeros(1, int), np.zeros((1, 1)), np.zeros(1, int)))\n"
        "TransformerLM.generate",
    )
    done = run_python(code, **variables)
    assert (done.returncode, done.stdout.decode()) == (0, "é日\n"), done.stderr
    assert any("model.safetensors" in path for path in asked)
    asked.clear()
    done = run_python("from attnax.cli import main; main(['inspect', 'tiny/llama'])", **variables, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and b"LlamaForCausalLM" in done.stdout and not asked
    done = run_python(
        "from attnax.cli import main\n"
        "a = main(['inspect', 'tiny/llama', '--revision', 'v2'])\n"
        "b = main(['inspect', 'tiny/llama', '--revision', 'v2', '--ignore', 'unheard_of'])\n"
        "c = main(['inspect', 'tiny/nothing'])\n"
        "d = main(['generate', 'tiny/llama', '--revision', 'v3'])\n"
        "print(a, b, c, d)",
        **variables,
    )
    out, error = done.stdout.decode(), done.stderr.decode()
    assert out.splitlines()[-1] == "1 0 2 2"
    assert "unheard_of" in out and "passed over   n_special" in out
    assert (
        "tiny/nothing: there is no such folder, and the hub has no such public model" in error
        and "Traceback" not in error
    )
    assert "no such revision of it; got revision='v3'" in error


def test_keys_that_are_passed_over_are_a_line_on_standard_error(model, silent, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"unheard_of": 3, "n_special": 0}))
    assert main(["generate", str(folder), "--prompt", "x"]) == 2
    assert "attnax generate --ignore unheard_of" in capsys.readouterr().err
    assert main(["generate", str(folder), "--prompt", "x", "--ignore", "unheard_of"]) == 0
    out, error = capsys.readouterr()
    assert out == "x\n" and error.startswith("attnax: ") and "n_special" in error and error.count("\n") == 1


def test_what_is_of_a_checkpoint_is_refused_for_a_run(run, capsys):
    assert main(["generate", str(run), "--ignore", "x"]) == 2
    assert "--ignore is of a published checkpoint" in capsys.readouterr().err
    assert main(["generate", str(run), "--revision", "x"]) == 2
    assert "a revision is of a model on the hub" in capsys.readouterr().err
    assert main(["inspect", ""]) == 2 and "there is no such folder" in capsys.readouterr().err


def test_an_adapter_says_that_it_is_one(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    assert main(["generate", str(tmp_path)]) == 2
    assert "it is an adapter (peft_type='LORA') of the model 'a/b'" in capsys.readouterr().err


def test_logs_of_orbax_are_dropped_and_no_others():
    terminal.silence_orbax()
    records = [logging.LogRecord("absl", logging.ERROR, path, 1, "", None, None) for path in ("/orbax/a.py", "/b/c.py")]
    assert [bool(logging.getLogger("absl").filter(record)) for record in records] == [False, True]

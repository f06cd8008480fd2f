"""Runs a command as on a processor without AVX-512: the command and its children find AVX2 only.

    python benchmarks/without_avx512.py python benchmarks/attention.py
    make bench KIND=avx2

It is an imitation: the instructions are hidden (`without_avx512.c` says how), but clocks and caches are those of the
processor. Tables then say "AVX-512 hidden". Needs Linux on x86-64, a processor with the flag cpuid_fault, and a C
compiler, `cc`. A processor without AVX-512 runs the command as it is.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


def cpu_flags() -> list[str]:
    """The flags that Linux lists for the first processor; none on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])


def why_not(flags: Collection[str]) -> str | None:
    """Why AVX-512 cannot be hidden on this machine, whose processor has these flags; None if it can."""
    where = f"{platform.system()} on {platform.machine()}"
    if where != "Linux on x86_64":
        return f"needs Linux on x86_64; got {where}"
    if "cpuid_fault" not in flags:
        return "the processor, or its virtual machine, lacks the flag cpuid_fault in /proc/cpuinfo"
    if shutil.which("cc") is None:
        return "needs a C compiler, cc. On Debian and Ubuntu, type: apt-get install gcc libc6-dev"
    return None


def main(command: Sequence[str]) -> int:
    """Runs the command; returns its exit code, or 2 with a message if AVX-512 cannot be hidden."""
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if command else 2
    flags = cpu_flags()
    if flags and "avx512f" not in flags:
        return subprocess.run(command, check=False).returncode
    reason = why_not(flags)
    if reason is not None:
        print(f"without_avx512: {reason}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/without_avx512.so"
        compiler = ["cc", "-O1", "-shared", "-fPIC", "-o", library, str(SOURCE), "-ldl"]
        if subprocess.run(compiler, check=False).returncode != 0:
            print(f"without_avx512: cc could not compile {SOURCE}; its messages are above.", file=sys.stderr)
            return 2
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(filter(None, [library, os.environ.get("LD_PRELOAD")])),
            # torch.compile keeps its programs without the instructions that they use.
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/programs",
        }
        return subprocess.run(command, check=False, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

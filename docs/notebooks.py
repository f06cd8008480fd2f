"""Executes the notebooks of docs/learn and stores their outputs: `make notebooks`.

A notebook runs in an empty folder, on the CPU. An error, a warning and a path of the machine in an output are errors.

    python docs/notebooks.py                      all of them, in place
    python docs/notebooks.py --check NAME ...     some of them; writes nothing

Both name the cells whose text differs from the stored one: the last digits of another processor, or a change of the
library.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent / "learn"
PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|Users|private|var|opt|mnt)/|[A-Z]:\\\\")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def text_of(output):
    """What an output says as text; its pictures left out."""
    data = output.get("data", {})
    return "".join(output.get("text", "")) + "".join(data.get("text/plain", "")) + "".join(data.get("text/html", ""))


def problems(notebook):
    """What is wrong with a notebook as JSON, a line each."""
    cells = notebook["cells"]
    first = "".join(cells[0]["source"]) if cells else ""
    if not (cells and cells[0]["cell_type"] == "markdown" and first.startswith("# ")):
        yield "the first cell must be text that begins with a title"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    if not any(cell["outputs"] for cell in code):
        yield "no cell has an output; type: make notebooks"
    for number, cell in enumerate(code, 1):
        if cell["execution_count"] != number:
            yield f"code cell {number} was not executed in its turn; type: make notebooks"
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"code cell {number} ends in an error"
            if output.get("name") == "stderr":
                yield f"code cell {number} warns: {text_of(output).strip()}"
            if PATH.search(json.dumps(output)):
                yield f"code cell {number} shows a path of the machine"


def execute(path):
    """The notebook with the outputs of a run, as JSON."""
    import nbformat
    from jupyter_client import KernelManager
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run").mkdir()
        # Sockets in the folder: other users of the machine cannot reach them, as they could reach a port.
        kernel = KernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        resources = {"metadata": {"path": f"{folder}/run"}}
        try:
            NotebookClient(notebook, km=kernel, timeout=900, resources=resources, record_timing=False).execute()
        finally:
            kernel.shutdown_kernel(now=True)
    notebook.metadata = METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "mystnb"}  # words for pictures
        if cell.cell_type == "code":
            cell.outputs = join_streams(cell.outputs)
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = small_png(output.data["image/png"])
    return json.loads(nbformat.writes(notebook))


def small_png(encoded):
    """A picture, base64 of a PNG, at most 520 pixels wide and with a palette of 64 colours."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    if picture.width > 520:
        picture = picture.resize((520, round(picture.height * 520 / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(64, dither=Image.Dither.NONE).save(written := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def join_streams(outputs):
    """The outputs, with text that came in several pieces as one: how it is cut depends on time."""
    joined = []
    for output in outputs:
        if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def changed(before, after):
    """The numbers of the code cells whose text differs."""
    texts = ([cell for cell in notebook["cells"] if cell["cell_type"] == "code"] for notebook in (before, after))
    pairs = zip(*texts, strict=True)
    return [
        number
        for number, pair in enumerate(pairs, 1)
        if len({tuple(text_of(output) for output in cell["outputs"]) for cell in pair}) > 1
    ]


def processor_time():
    """Seconds of all processors for this process and the kernels that have ended."""
    return sum(os.times()[:4])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of notebooks, without .ipynb; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(FOLDER.parent.parent)}
    os.environ.pop("XLA_FLAGS", None)  # a notebook sets its own
    failed = False
    paths = [FOLDER / f"{name}.ipynb" for name in options.names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        before, began, used = json.loads(path.read_text()), time.perf_counter(), processor_time()
        after = execute(path)
        took, used = time.perf_counter() - began, processor_time() - used
        print(
            f"{path.stem}: {took:.0f} s, {used:.0f} s of processors, {len(json.dumps(after)) / 1024:.0f} KiB",
            flush=True,
        )
        for problem in problems(after):
            print(f"  {problem}")
            failed = True
        if cells := changed(before, after):
            print(f"  other text in code cells {', '.join(map(str, cells))}")
        if not options.check:
            path.write_text(json.dumps(after, indent=1, ensure_ascii=False) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

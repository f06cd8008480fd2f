"""Copies of the stored checkpoints, with other fields in their config.json."""

import json
import shutil
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "goldens" / "pretrained"


def copy_with(name, folder, **fields):
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder

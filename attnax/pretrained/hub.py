"""Where a checkpoint is: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from attnax.pretrained.errors import CheckpointError, quoted

__all__ = ["find_folder"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
# No format that can run code, no code, and not the same weights again for other programs.
_FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
]


def find_folder(name: str | Path) -> Path:
    """The folder `name`, or that of the model of this name in the cache of the hub, where it is loaded into if needed.

    Raises:
        CheckpointError: there is no such folder and the hub cannot be asked, or knows none.
    """
    folder = Path(name)
    try:
        if str(name) and folder.is_dir():
            return folder
    except (OSError, ValueError) as error:
        raise CheckpointError(quoted(str(name)), f"there is no such folder ({error}).") from error
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(name, "there is no such folder.")
    try:
        import huggingface_hub  # of the extra
        from huggingface_hub.errors import HfHubHTTPError
    except ModuleNotFoundError as error:
        raise CheckpointError(
            name,
            "there is no such folder. To look for it on the Hugging Face hub: pip install 'attnax[pretrained]'",
        ) from error
    try:
        # What is cached is not loaded again.
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:  # it cannot be reached, or has no such model
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            name,
            "there is no such folder, nor such a model in the cache of the Hugging Face hub, and the hub gave none "
            f"({type(error).__name__}: {reason}). Load it where there is a network, and give its folder.",
        ) from error

"""The place of a checkpoint: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from attnax.errors import install_command
from attnax.pretrained.checkpoint import WANTED
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.foreign import ADAPTER, no_tensors
from attnax.pretrained.json_object import read_object

__all__ = ["find_folder"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
# No code, no format that can run code, and no second copy of the weights for other programs.
_FILES = [
    *("config.json", "generation_config.json", ADAPTER),
    *("modules.json", "1_Pooling/config.json", "2_Normalize/config.json", "sentence_*_config.json"),
    "config_sentence_transformers.json",
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "preprocessor_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
]


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder `name`, or the folder of the model `name` in the cache of the hub, downloaded if needed.

    The environment variables of huggingface_hub choose the cache, the network and the account: HF_HOME, HF_HUB_OFFLINE,
    HF_ENDPOINT, HF_TOKEN.

    Args:
        name: of a folder, or, if it is a string and no folder has this name, of a model.
        revision: of a model: a branch, a tag or a commit; by default its main branch.

    Raises:
        CheckpointError: there is no such folder, and the hub cannot be reached, has no such model, or has no readable
            file; or a revision of a folder is given.
    """
    folder = Path(name)
    try:
        if str(name) and folder.is_dir():
            if revision is not None:
                problem = f"a revision is of a model on the hub, and this is a folder; got revision={revision!r}."
                raise CheckpointError(name, problem)
            return folder
    except OSError as error:
        raise CheckpointError(quoted(str(name)), f"there is no such folder ({error}).") from error
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(name, "there is no such folder.")
    if "/" in name and folder.parent.is_dir():  # such as runs/001
        why = f"The hub is not asked, since {folder.parent} is a folder."
        raise CheckpointError(name, f"there is no such folder in {folder.parent}. {why}")
    try:
        import huggingface_hub  # an optional dependency
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever HTTP library it uses
    except ModuleNotFoundError as error:
        advice = f"To look for it on the Hugging Face hub: {install_command('pretrained')}"
        raise CheckpointError(name, f"there is no such folder. {advice}") from error
    try:  # cached files are not downloaded again
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (HTTPError, OSError, ValueError) as error:
        raise CheckpointError(name, _reason(name, revision, error)) from error
    if not any(folder.glob("*.safetensors")) and not (folder / ADAPTER).exists():
        try:
            names = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
        except (HTTPError, OSError, ValueError):  # then the advice does not name the model's files
            names = []
        config = folder / "config.json"
        raise no_tensors(name, names, read_object(config) if config.exists() else {}, WANTED)
    return folder


def _reason(name: str, revision: str | None, error: Exception) -> str:
    """The reason why the hub gave no model, with advice."""
    from huggingface_hub import constants, errors

    said = next(iter(str(error).strip().splitlines()), "")
    log_in = "then: hf auth login"
    if isinstance(error, errors.GatedRepoError):
        return f"access needs its owner's permission. Ask for it on {constants.ENDPOINT}/{name}, {log_in} ({said})."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "there is no such folder, and the hub has no such public model. To read a private one, make a token on "
            f"{constants.ENDPOINT}/settings/tokens, {log_in} ({said})."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has this model, but no such revision of it; got revision={revision!r}."
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the hub refuses your token, or got none. Make one on its page, {log_in} ({said})."
    if constants.HF_HUB_OFFLINE:
        return (
            "there is no such folder, the cache of the Hugging Face hub does not hold all of such a model, and "
            "HF_HUB_OFFLINE is set. Unset it, or load the model where there is a network and give its folder."
        )
    return (
        "there is no such folder, the cache of the Hugging Face hub holds no such model, and the hub gave none "
        f"({type(error).__name__}: {said}). Load it where there is a network, and give its folder."
    )

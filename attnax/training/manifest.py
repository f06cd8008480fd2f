"""The manifest of a checkpoint: whose it is, where it was made, the type of each array and the digest of each file.

It holds its own digest too, so that a changed bit is found anywhere. It is written when all files of the checkpoint are
on the disk, and gone before they are: a checkpoint is complete if and only if it has a manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, cast

from attnax.errors import InputError
from attnax.training.durable import sync, write_durable

__all__ = [
    "MANIFEST",
    "DamagedCheckpointError",
    "HashFiles",
    "Manifest",
    "array_types",
    "hash_durably",
    "hash_files",
    "list_files",
    "manifest_path",
    "steps_with",
]

_FAMILY = "attnax checkpoint "
FORMAT = f"{_FAMILY}2"
MANIFEST = ".attnax.json"  # a name that no other program gives to a file
_THREADS = 4  # two hash as fast as a disk reads; the others wait for the disk

ArrayType: TypeAlias = tuple[tuple[int, ...], str]  # shape and dtype
FileDigest: TypeAlias = tuple[int, str]  # bytes and SHA-256
HashFiles: TypeAlias = Callable[[Path, list[str]], dict[str, FileDigest]]


class DamagedCheckpointError(InputError):
    """A file of a checkpoint is missing or was changed.

    A file that the disk fails to read is an OSError: the next attempt may succeed.

    Attributes:
        whole: the step of the newest complete checkpoint, or None.
    """

    def __init__(self, message: str, whole: int | None = None):
        self.whole = whole
        super().__init__(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a checkpoint beside its arrays.

    Attributes:
        owner: name of the run.
        update: number of updates that made the state.
        layout: of the devices, in words, or "".
        device_kind: of the devices that held the state, such as "cpu" or "TPU v5 lite".
        num_devices: number of devices that held the state.
        num_cores: number of cores that the process could use. Sums on a CPU depend on it in their last bits.
        metric: the figure on held-out data by which the best are kept, or None.
        types: shape and dtype of each array, by item and name. An item without arrays is empty.
        files: bytes and SHA-256 of each file, by its path in the folder of the checkpoint.
    """

    owner: str
    update: int
    layout: str
    device_kind: str
    num_devices: int
    num_cores: int
    metric: float | None
    types: dict[str, dict[str, ArrayType]]
    files: dict[str, FileDigest]

    def write(self, folder: Path) -> None:
        """Writes the manifest of step number `update`: with this, the checkpoint exists.

        Raises:
            OSError: the disk is full or fails.
        """
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_durable(manifest_path(folder, self.update), _text(content))

    @classmethod
    def read(cls, folder: Path, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            DamagedCheckpointError: it is missing or was changed.
            InputError: another version of Attnax wrote it.
            OSError: the disk fails; the error names the file.
        """
        path = manifest_path(folder, step)
        text, content = "", cast(Any, None)
        with contextlib.suppress(FileNotFoundError, ValueError):
            text = path.read_bytes().decode()
            content = json.loads(text)
        if _is_of_another_version(content):
            raise InputError(f"{path} was written by another version of attnax. Use that version.")
        if not _is_whole(content, text) or content["update"] != step:
            raise DamagedCheckpointError(
                f"the checkpoint {folder / str(step)} is damaged: {path} is not as it was saved."
            )
        del content["sha256"], content["format"]
        types = {
            item: {name: (tuple(shape), dtype) for name, (shape, dtype) in arrays.items()}
            for item, arrays in content.pop("types").items()
        }
        files = {name: (size, digest) for name, (size, digest) in content.pop("files").items()}
        return cls(**content, types=types, files=files)

    def check_files(self, folder: Path, items: Collection[str], hashing: HashFiles) -> None:
        """Reads the files of these items, and those that belong to all items, and compares their digests.

        Args:
            folder: of the checkpoints.
            items: names of items.
            hashing: `hash_files`, or a function that has several processes do its work.

        Raises:
            DamagedCheckpointError: a file is missing, new or changed.
            OSError: the disk fails; the error names the file.
        """
        target = folder / str(self.update)

        def is_of_items(name: str) -> bool:
            return "/" not in name or name.partition("/")[0] in items

        try:
            found = hashing(target, [name for name in list_files(target) if is_of_items(name)])
        except FileNotFoundError as error:  # it was listed a moment before
            raise DamagedCheckpointError(f"the checkpoint {target} is damaged: {error.filename} is gone.") from error
        saved = {name: digest for name, digest in self.files.items() if is_of_items(name)}
        wrong = sorted(name for name in found.keys() | saved.keys() if found.get(name) != saved.get(name))
        if not wrong:
            return
        what = "has changed since it was saved"
        if wrong[0] not in found:
            what = "is missing"
        if wrong[0] not in saved:
            what = "was not saved with it"
        more = f"; {len(wrong) - 1} more files are not as they were saved" if len(wrong) > 1 else ""
        raise DamagedCheckpointError(f"the checkpoint {target} is damaged: {wrong[0]} {what}{more}.")


def manifest_path(folder: Path, step: int) -> Path:
    """The file of a manifest. It lies beside the folder of the step, which holds only what Orbax wrote."""
    return folder / f"{step}{MANIFEST}"


def steps_with(folder: Path, ending: str) -> list[int]:
    """The steps that have a file with this ending, such as `MANIFEST`, in order."""
    steps = (path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))
    return sorted(int(step) for step in steps if step.isdecimal())


def array_types(arrays: Mapping[str, Any]) -> dict[str, ArrayType]:
    """The shapes and dtypes of these arrays."""
    return {name: (tuple(array.shape), str(array.dtype)) for name, array in arrays.items()}


def list_files(target: Path) -> list[str]:
    """The paths of all files in a folder, sorted; none if there is no folder."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found = (Path(folder, name) for folder, _, names in os.walk(target, onerror=refuse) for name in names)
    return sorted(path.relative_to(target).as_posix() for path in found)


def hash_durably(target: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """The bytes and the digests of these files of a folder; when this returns, the files are on the disk.

    Raises:
        OSError: the disk is full or fails; the error names the file.
    """
    return _hash_all(target, names, _hash_and_sync)


def hash_files(target: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """The bytes and the digests of these files of a folder.

    Raises:
        OSError: the disk fails; the error names the file.
    """
    return _hash_all(target, names, _hash)


def _hash_all(target: Path, names: Iterable[str], hashing: Callable[[Path], FileDigest]) -> dict[str, FileDigest]:
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(hashing, (target / name for name in names)), strict=True))


def _hash(path: Path) -> FileDigest:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _hash_and_sync(path: Path) -> FileDigest:
    sync(path)
    return _hash(path)


def _text(content: dict[str, Any]) -> str:
    """The text of a manifest: its own digest, then its content."""
    return json.dumps({"sha256": _digest(content), **content}, indent=1) + "\n"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _is_whole(content: Any, text: str) -> bool:
    """Whether this is the content of a manifest of this format, and its text."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return False
    return _text({name: value for name, value in content.items() if name != "sha256"}) == text


def _is_of_another_version(content: Any) -> bool:
    """Whether the format is another one; how that one has its digest does not matter.

    A changed bit in the name of this format is damage: the digest is then still that of this format.
    """
    if not isinstance(content, dict):
        return False
    rest = {name: value for name, value in content.items() if name != "sha256"}
    name = rest.get("format")
    if not isinstance(name, str) or not name.startswith(_FAMILY) or name == FORMAT:
        return False
    return _digest({**rest, "format": FORMAT}) != content.get("sha256")

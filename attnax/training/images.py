"""A folder of images with a folder for each class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from attnax.errors import InputError

__all__ = ["ImageFolder", "image_folder"]

_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))


class ImageFolder:
    """Images by number: `images[i]` is {"images": (height, width, channels), "labels": an int32 scalar}.

    An image is read from its file each time, so that only a batch of them is in memory.

    Attributes:
        classes: the names of the classes; `labels` are their places.
        paths: of the images, in the order of their numbers.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        paths: tuple[Path, ...],
        labels: np.ndarray,
        size: tuple[int, int],
        channels: int,
        dtype: Literal["uint8", "float32"],
    ):
        self.classes, self.paths = classes, paths
        self._labels, self._size, self._channels, self._dtype = labels, size, channels, dtype

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        from PIL import Image  # an optional dependency, as in `image_folder`

        height, width = self._size
        try:
            with Image.open(self.paths[index]) as image:
                plain = image.convert("RGB" if self._channels == 3 else "L")
                pixels = np.asarray(plain.resize((width, height), Image.Resampling.BILINEAR))
        except OSError as error:
            raise InputError(f"{self.paths[index]} is no image that Pillow can read: {error}.") from error
        pixels = pixels.reshape(height, width, self._channels)
        values = pixels.astype(np.float32) / 255 if self._dtype == "float32" else pixels
        return {"images": values, "labels": self._labels[index]}


def image_folder(
    path: str | Path,
    size: int | tuple[int, int],
    *,
    channels: Literal[1, 3] = 3,
    dtype: Literal["uint8", "float32"] = "uint8",
) -> ImageFolder:
    """The images in a folder that has a folder for each class, for `classification`.

    Args:
        path: of the folder. Each folder in it is a class, and all images inside of that, at any depth, are of the
            class; they are known by their suffixes, such as .png and .jpg. Hidden files do not count.
        size: (height, width) of the images, or one number for both. Images are resized by bilinear interpolation, and
            not cut.
        channels: 3 for red, green and blue, 1 for grey.
        dtype: uint8 are numbers from 0 to 255, a quarter of the bytes of float32, which are numbers from 0 to 1.

    Raises:
        InputError: there is no folder with images of two classes; or, from a row, a file that is no image.
        ValueError: a size below 1, or other channels or types.
        ModuleNotFoundError: Pillow is not installed; the extra `images` of Attnax has it.
    """
    import PIL.Image  # noqa: F401  # an optional dependency: refused here, not in a thread that reads

    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"image_folder: size must be at least 1; got size={size}.")
    if channels not in (1, 3):
        raise ValueError(f"image_folder: channels must be 1 or 3; got channels={channels}.")
    if dtype not in ("uint8", "float32"):
        raise ValueError(f"image_folder: dtype must be uint8 or float32; got dtype={dtype!r}.")
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"no such folder: {path}.")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    places = [(file, file.relative_to(path).parts) for file in found]
    named = [(file, parts[0]) for file, parts in places if len(parts) > 1 and not any(p.startswith(".") for p in parts)]
    classes = sorted({name for _, name in named})
    if len(classes) < 2:
        raise InputError(
            f"{path} must hold a folder of images for each of at least two classes; got {len(classes)} with images"
            f"{f' ({classes[0]})' if classes else ''}."
        )
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[name] for _, name in named], np.int32)
    return ImageFolder(tuple(classes), tuple(file for file, _ in named), labels, (height, width), channels, dtype)

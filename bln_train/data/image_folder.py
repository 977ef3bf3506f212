"""Image folders, train/<class>/* and test/<class>/*: their images, and all their problems in one error.

Files are decoded as jpeg, png, bmp, webp or gif, whatever their names, and as nothing else.

    grey, palette, CMYK, 1-bit         become RGB
    alpha                              is dropped; a transparent pixel has the colour stored under it
    a moving image                     gives its first frame
    EXIF rotation                      is not applied
    one channel of more than 8 bits    is refused
    colour channels of 16 bits         are read by their upper 8 bits
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from bln_train.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# PIL goes by a file's content and would, for PostScript, run Ghostscript on it.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")
_MAX_NAMED = 10
_LAYOUT = "An image folder holds train/<class>/* and test/<class>/*"

Classes = dict[str, list[Path]]


def list_folder(root: Path) -> tuple[Classes, Classes]:
    """Training and test images of each class; both sorted by name, since file systems list in any order.

    Hidden files and files of other kinds are passed over.

    Raises:
        DataError: naming every folder that is absent, unreadable or without images, every class that is not in both parts, and
            whatever is called like an image and is no file.
    """
    problems: list[str] = []
    train, test = (_list_classes(root / part, problems) for part in ("train", "test"))
    if train and test and train.keys() != test.keys():
        lacking = (("train", train.keys() - test.keys()), ("test", test.keys() - train.keys()))
        only = [f"{_named(sorted(names))} only in {part}" for part, names in lacking if names]
        problems.append(f"the classes of {root / 'train'} and {root / 'test'} differ: {'; '.join(only)}")
    if problems:
        raise DataError(_lines(problems), f"{_LAYOUT}, the same classes in both: {' '.join(IMAGE_SUFFIXES)}.")
    assert train
    assert test
    return train, test


def _list_classes(folder: Path, problems: list[str]) -> Classes | None:
    """Image files of each class; None with problems reported where there are no classes."""
    classes = _entries(folder, problems)
    if classes is None:
        return None
    names = [entry.name for entry in classes if _is(entry.is_dir)]
    if len(names) < 2:
        found = f"only {names[0]}" if names else "none"
        loose = len(classes) - len(names)
        beside = f" (and {loose} file{'s' * (loose > 1)})" if loose else ""
        problems.append(f"{folder} needs at least 2 class folders, but holds {found}{beside}")
    files: Classes = {}
    for name in names:
        entries = _entries(folder / name, problems)
        if entries is None:
            continue
        images = [entry for entry in entries if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES]
        # Read, a pipe would wait for ever; passed over, a broken link would be an image less that nobody misses.
        odd = [entry.name for entry in images if not _is(entry.is_file)]
        if odd:
            problems.append(f"in {folder / name}, no file, or a link to none: {_named(odd)}")
        elif not images:
            others = f", but files of other kinds: {_named([entry.name for entry in entries])}" if entries else ""
            problems.append(f"class folder {folder / name} holds no images{others}")
        files[name] = [folder / name / entry.name for entry in images]
    return files


def _entries(folder: Path, problems: list[str]) -> list[os.DirEntry[str]] | None:
    """What is in a folder and not hidden, by name; None with the problem reported where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        problems.append(f"cannot list {folder}: {error.strerror}")
        return None


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link that leads to itself
        return False


def _named(names: Sequence[str]) -> str:
    """Some of many names."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _lines(problems: Sequence[str]) -> str:
    """Some of many problems, a line each."""
    more = [f"and {len(problems) - _MAX_NAMED} more such problems"] if len(problems) > _MAX_NAMED else []
    return "\n".join([*problems[:_MAX_NAMED], *more])


def decode(parts: Sequence[Sequence[Path]], side: int, *, resize: bool) -> list[Tensor]:
    """Decode the images of each part to (N, 3, side, side) uint8, their centre squares scaled where `resize`.

    Raises:
        DataError: naming every file that cannot be decoded or, not to be scaled, has another size.
    """
    from PIL import Image

    problems: list[str] = []
    decoded = []
    # Below twice its limit PIL only warns of a decompression bomb. Threads share the filters: set before they start.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.filterwarnings(
            "ignore", category=UserWarning, module=r"PIL\."
        )  # of transparency and EXIF, unused here
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for paths in parts:
            images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
            for i, image in enumerate(pool.map(lambda path: _decode_file(path, side, resize), paths)):
                if isinstance(image, str):
                    problems.append(image)
                else:
                    images[i] = image
            decoded.append(images)
    if problems:
        number = sum(map(len, parts))
        raise DataError(
            _lines(problems),
            f"{len(problems)} of {number} images cannot be used: repair or remove them, or convert them to 8-bit RGB."
            + ("" if resize else " Images of other sizes are scaled with --set data.name=folder."),
        )
    return decoded


def _decode_file(path: Path, side: int, resize: bool) -> Tensor | str:
    """Decode one image to (3, side, side) uint8, or say what is wrong with it."""
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if not resize and (width, height) != (side, side):
                return f"{path} is {width}x{height}, but CIFAR images are {side}x{side}"
            if image.mode.startswith(("I", "F")):  # to RGB, PIL would clip all but the darkest values to white
                return f"{path} has more than 8 bits per channel"
            rgb = image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return f"{path} is too large to decode: {error}"
    except Exception as error:  # whatever a damaged file makes PIL's decoders trip over
        return f"{path} is not a readable image: {error or type(error).__name__}"
    if resize:
        # Crop first, then scale: the same picture, and a long thin image cannot grow huge on the way.
        square = min(width, height)
        left, top = (width - square) / 2, (height - square) / 2
        box = (left, top, left + square, top + square)
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)

"""Data sets as uint8 tensors on the CPU, class-balanced subsets, and the order of an epoch.

Subsets and order are each a function of what they are for (see `rng.py`), so no split of a batch can change them.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bln_train.errors import DataError
from bln_train.rng import instance_seeds

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Not the run's: every norm and training seed sees the same images, so their spread measures training only.
SUBSET_SEED, VALIDATION_SEED = 0, 1
SHAPES_TRAIN_SEED, SHAPES_TEST_SEED = 0, 1
_DOWNLOAD_TIMEOUT_SECONDS = 30.0
_CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, H, W) uint8 and labels (N,) int64, both contiguous on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """Training and test images, the names of their classes, and a sentence on where they come from."""

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    source: str
    validation: ImageSet | None = None
    """Held out of the training images; see `hold_out`."""


def default_root() -> Path:
    """Where data sets live unless a recipe says otherwise: $BLN_DATA, else ~/.cache/bln-train."""
    return Path(os.environ.get("BLN_DATA") or "~/.cache/bln-train").expanduser()


def load_dataset(
    name: str,
    *,
    root: str | None = None,
    download: bool = True,
    num_train: int | None = None,
    num_test: int | None = None,
    image_size: int | None = None,
) -> DataSet:
    """Load `cifar10`, `cifar100`, an image `folder`, or draw `shapes`; never one in place of another.

    Args:
        name: which of the four.
        root: where the images are; default `default_root()`.
        download: whether CIFAR may be fetched when it is not at `root`.
        num_train: size of a class-balanced subset of the training images; default all (shapes: 5000).
        num_test: the same for the test images (shapes: 1000).
        image_size: side to which the images of a `folder` are scaled; default 32.

    Raises DataError where the images are absent, damaged or too few, with the ways out.
    """
    if name == "shapes":
        return _load_shapes(5000 if num_train is None else num_train, 1000 if num_test is None else num_test)
    folder = default_root() if root is None else Path(root).expanduser()
    if name == "folder":
        return _load_folder(name, folder, num_train, num_test, image_size or 32, resize=True)
    if name not in _CIFAR_CLASSES:
        raise ValueError(f"unknown data set {name!r}: cifar10, cifar100, folder or shapes")
    for candidate in (folder / name, folder):
        if (candidate / "train").is_dir():
            return _load_folder(name, candidate, num_train, num_test, 32, resize=False)
    return _load_cifar(name, folder, download, num_train, num_test)


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixel / 255 for each channel, from exact integer sums.

    Args:
        images: (N, C, H, W) uint8.

    Returns: mean (C,) and std (C,), float64; std divides by the number of pixels.
    Raises DataError if a channel is constant, which no scale can standardise.
    """
    num_channels = images.shape[1]
    counts = torch.zeros(num_channels, 256, dtype=torch.int64)
    for chunk in images.split(2048):
        for channel in range(num_channels):
            counts[channel] += torch.bincount(chunk[:, channel].reshape(-1), minlength=256)
    value = torch.arange(256)
    means, variances = [], []
    for channel in range(num_channels):
        n, first = int(counts[channel].sum()), int((counts[channel] * value).sum())
        scaled_variance = n * int((counts[channel] * value**2).sum()) - first**2  # n^2 * variance, a Python integer
        if scaled_variance == 0:
            raise DataError(
                f"channel {channel} has the same value in every training image",
                "Check the images, or normalise to [-1, 1] with --set data.normalize=symmetric.",
            )
        means.append(first / (255 * n))
        variances.append(scaled_variance / (255 * n) ** 2)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64).sqrt()


def epoch_order(num_images: int, *, seed: int, epoch: int) -> Tensor:
    """Order of the training images in an epoch: a permutation (N,) int64 that (seed, epoch) determines."""
    state = int(instance_seeds(seed, epoch, torch.tensor([-1])))  # -1 is no image: apart from all their draws
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(state))


def balanced_subset(labels: Tensor, num: int, *, seed: int = SUBSET_SEED) -> Tensor:
    """Choose `num` images whose class counts differ by at most one, as a function of (labels, num, seed).

    Args:
        labels: (N,) int64, each class from 0 to the largest label present.
        num: how many images to choose.
        seed: of the ranking of the images within their class.

    Returns: (num,) int64 positions, rising.
    Raises DataError if a class has too few images.
    """
    available = torch.bincount(labels)
    quota = torch.full_like(available, num // len(available))
    # The remainder goes to classes that can still give, in the order of a draw.
    draw = instance_seeds(seed, 1, torch.arange(len(available)))
    by_draw = draw.argsort(stable=True)
    by_draw = by_draw[(available[by_draw] <= quota[by_draw]).long().argsort(stable=True)]
    quota[by_draw[: num % len(available)]] += 1
    if bool((quota > available).any()):
        short = int((quota - available).argmax())
        raise DataError(
            f"a balanced subset of {num} images needs {int(quota[short])} of class {short}, which has "
            f"{int(available[short])} (of {len(labels)} images in {len(available)} classes)",
            "Lower data.num_train or data.num_test, or leave it out to take all images.",
        )
    return _first_of_each_class(labels, quota, seed).sort().values


def hold_out(data: DataSet, fraction: float, *, seed: int = VALIDATION_SEED) -> DataSet:
    """Move a fraction of each class's training images to `validation`, as a function of (labels, fraction, seed).

    Args:
        fraction: of each class, above 0 and below 1; a half image is rounded up.
        seed: of the draw.

    Returns: the data set with both parts in their old order; together they are the old training images.
    Raises DataError if a class would have no image in one of the two.
    """
    labels = data.train.labels
    available = torch.bincount(labels, minlength=len(data.class_names))
    quota = (available.double() * fraction + 0.5).long()
    empty = (quota == 0) | (quota == available)
    if bool(empty.any()):
        short = int(empty.long().argmax())
        raise DataError(
            f"data.validation_fraction {fraction:g} of the {int(available[short])} training images of class "
            f"{data.class_names[short]} is {int(quota[short])}: each class needs an image to train on and one to validate on",
            "Change data.validation_fraction, or raise data.num_train, from which it is taken.",
        )
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[_first_of_each_class(labels, quota, seed)] = True
    train, validation = (ImageSet(data.train.images[part], labels[part]) for part in (~held_out, held_out))
    source = f"{data.source}; {len(validation)} of {len(labels)} training images held out for validation"
    return replace(data, train=train, validation=validation, source=source)


def _first_of_each_class(labels: Tensor, quota: Tensor, seed: int) -> Tensor:
    """Positions of the first `quota` images of each class in the order of a draw."""
    available = torch.bincount(labels, minlength=len(quota))
    order = instance_seeds(seed, 0, torch.arange(len(labels))).argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    rank = torch.arange(len(labels)) - (available.cumsum(0) - available)[labels[order]]
    return order[rank < quota[labels[order]]]


def _load_shapes(num_train: int, num_test: int) -> DataSet:
    from bln_train.shapes import CLASS_NAMES, draw_shapes

    train = ImageSet(*draw_shapes(num_train, seed=SHAPES_TRAIN_SEED))
    test = ImageSet(*draw_shapes(num_test, seed=SHAPES_TEST_SEED))
    source = f"shapes: drawn with seed {SHAPES_TRAIN_SEED} (train) and {SHAPES_TEST_SEED} (test)"
    return DataSet(train, test, CLASS_NAMES, source)


def _load_cifar(name: str, root: Path, download: bool, num_train: int | None, num_test: int | None) -> DataSet:
    import http.client
    import tarfile

    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    archive = root / cifar.filename
    try:
        # With download=True torchvision extracts an archive that is already there; that fetches nothing.
        fetch = download or (archive.is_file() and check_integrity(archive, cifar.tgz_md5))
        with _quiet_download():
            train, test = (cifar(root, train=is_train, download=fetch) for is_train in (True, False))
    except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
        reason = f"{name} is not at {root}"
        if archive.is_file() and not check_integrity(archive, cifar.tgz_md5):
            reason = f"{archive} is damaged or incomplete: its MD5 checksum is not {cifar.tgz_md5}"
        if download:
            reason += f"; downloading {cifar.url} failed: {error or type(error).__name__}"
        raise DataError(
            reason,
            f"Put {cifar.filename} at {archive} (it is extracted if its checksum is right), or\n"
            "name an image folder with train/<class>/* and test/<class>/* inside: --set data.root=DIR, or\n"
            + ("" if download else "allow the download: --set data.download=true, or\n")
            + "use images that need no download: --set data.name=shapes",
        ) from error
    sets = []
    for part, num in ((train, num_train), (test, num_test)):
        labels = torch.tensor(part.targets)
        chosen = torch.arange(len(labels)) if num is None else balanced_subset(labels, num)
        images = torch.from_numpy(part.data[chosen.numpy()]).permute(0, 3, 1, 2).contiguous()
        sets.append(ImageSet(images, labels[chosen]))
    return DataSet(sets[0], sets[1], tuple(train.classes), f"{name}: {root / cifar.base_folder}")


@contextmanager
def _quiet_download() -> Iterator[None]:
    """Keep stdout for data, bound the wait for a silent server, and pass over numpy's word on CIFAR's old pickles."""
    import socket

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            yield
    finally:
        socket.setdefaulttimeout(timeout)


def _load_folder(
    name: str, root: Path, num_train: int | None, num_test: int | None, side: int, *, resize: bool
) -> DataSet:
    train_files, test_files = _list_classes(root / "train"), _list_classes(root / "test")
    class_names = tuple(train_files)
    if class_names != tuple(test_files):
        only = [f"{name} only in train" for name in class_names if name not in test_files]
        only += [f"{name} only in test" for name in test_files if name not in train_files]
        raise DataError(
            f"the classes of {root / 'train'} and {root / 'test'} differ: {', '.join(only[:5])}",
            "Each class needs a folder of the same name in both.",
        )
    if name in _CIFAR_CLASSES and len(class_names) != _CIFAR_CLASSES[name]:
        raise DataError(
            f"{root} is an image folder of {len(class_names)} classes, but {name} has {_CIFAR_CLASSES[name]}",
            "Name another folder with --set data.root=DIR, or train on this one with --set data.name=folder.",
        )
    sets = []
    for files, num in ((train_files, num_train), (test_files, num_test)):
        paths = [path for of_class in files.values() for path in of_class]
        labels = torch.arange(len(files)).repeat_interleave(torch.tensor([len(f) for f in files.values()]))
        chosen = torch.arange(len(labels)) if num is None else balanced_subset(labels, num)
        sets.append(ImageSet(_decode([paths[i] for i in chosen.tolist()], side, resize), labels[chosen]))
    return DataSet(sets[0], sets[1], class_names, f"{name}: image folder {root}")


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Image files of each class; both sorted by name, since file systems list in any order."""
    layout = "An image folder holds train/<class>/* and test/<class>/*"
    try:
        classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = {
            c.name: sorted(p for p in c.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
            for c in classes
        }
    except OSError as error:
        raise DataError(f"cannot list {error.filename or folder}: {error.strerror}", f"{layout}.") from error
    if len(classes) < 2:
        found = f"only {classes[0].name}" if classes else "none"
        raise DataError(f"{folder} needs at least 2 class folders, but holds {found}", f"{layout}.")
    for name, of_class in files.items():
        if not of_class:
            raise DataError(f"class folder {folder / name} holds no images", f"{layout}: {' '.join(IMAGE_SUFFIXES)}.")
    return files


def _decode(paths: list[Path], side: int, resize: bool) -> Tensor:
    from PIL import Image

    images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    # Below twice its limit PIL only warns of a decompression bomb. Threads share the filters: set before they start.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, image in enumerate(pool.map(lambda path: _decode_file(path, side, resize), paths)):
            images[i] = image
    return images


def _decode_file(path: Path, side: int, resize: bool) -> Tensor:
    """Decode one image to (3, side, side) uint8: RGB, its centre square scaled, or refused if it has to be."""
    from PIL import Image

    remedy = "Repair or remove the file."
    try:
        with Image.open(path) as image:
            width, height = image.size
            if not resize and (width, height) != (side, side):
                raise DataError(
                    f"{path} is {width}x{height}, but CIFAR images are {side}x{side}",
                    "Images of other sizes are scaled with --set data.name=folder.",
                )
            if image.mode.startswith(("I", "F")):  # to RGB, PIL would clip all but the darkest values to white
                raise DataError(f"{path} has more than 8 bits per channel", "Convert it to 8 bits per channel.")
            rgb = image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path} is too large to decode: {error}", remedy) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # PIL's decoders raise each of these
        raise DataError(f"{path} is not a readable image: {error}", remedy) from error
    if resize:
        # Crop first, then scale: the same picture, and a long thin image cannot grow huge on the way.
        square = min(width, height)
        left, top = (width - square) / 2, (height - square) / 2
        box = (left, top, left + square, top + square)
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)

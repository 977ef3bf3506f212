"""Data sets as uint8 tensors on the CPU, class-balanced subsets, and the order of an epoch.

Subsets and order are each a function of what they are for (see `system/rng.py`), so no split of a batch can change them.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bln_train.data.image_folder import decode, list_folder
from bln_train.errors import DataError
from bln_train.system.rng import instance_seeds

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
    try:
        found = next((c for c in (folder / name, folder) if (c / "train").is_dir()), None)
        is_file = folder.exists() and not folder.is_dir()
    except OSError as error:
        raise DataError(
            f"cannot look into {folder}: {error.strerror}", "Change data.root, or its permissions."
        ) from error
    if is_file:
        raise DataError(f"data.root, {folder}, is a file, not a folder", "Name a folder with --set data.root=DIR.")
    if found is not None:
        return _load_folder(name, found, num_train, num_test, 32, resize=False)
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


def balanced_subset(
    labels: Tensor, num: int, *, seed: int = SUBSET_SEED, class_names: Sequence[str] | None = None
) -> Tensor:
    """Choose `num` images whose class counts differ by at most one, as a function of (labels, num, seed).

    Args:
        labels: (N,) int64, each class from 0 to the largest label present.
        num: how many images to choose.
        seed: of the ranking of the images within their class.
        class_names: for the message; default their numbers.

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
        name = short if class_names is None else class_names[short]
        raise DataError(
            f"a balanced subset of {num} images needs {int(quota[short])} of class {name}, which has "
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
    from bln_train.data.shapes import CLASS_NAMES, draw_shapes

    train = ImageSet(*draw_shapes(num_train, seed=SHAPES_TRAIN_SEED))
    test = ImageSet(*draw_shapes(num_test, seed=SHAPES_TEST_SEED))
    source = f"shapes: drawn with seed {SHAPES_TRAIN_SEED} (train) and {SHAPES_TEST_SEED} (test)"
    return DataSet(train, test, CLASS_NAMES, source)


def _load_cifar(name: str, root: Path, download: bool, num_train: int | None, num_test: int | None) -> DataSet:
    import http.client
    import tarfile

    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, download_url

    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    archive = root / cifar.filename
    try:
        with _quiet_download():
            try:
                train, test = (cifar(root, train=is_train) for is_train in (True, False))
            except RuntimeError:  # it is not there yet, or not whole
                if download:
                    download_url(cifar.url, root, cifar.filename, cifar.tgz_md5)
                _extract(archive, root, cifar.tgz_md5)
                train, test = (cifar(root, train=is_train) for is_train in (True, False))
    except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
        reason = f"{name} is not at {root}"
        if isinstance(error, tarfile.FilterError):
            reason = f"{archive} was refused, and nothing extracted: {error}"
        elif archive.is_file() and not check_integrity(archive, cifar.tgz_md5):
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


def _extract(archive: Path, to: Path, md5: str) -> None:
    """Extract an archive of known checksum, all of it or, where a member would lie or point outside `to`, nothing.

    Raises:
        RuntimeError: it is not there, or another file.
        tarfile.FilterError: a member is refused.
    """
    import tarfile

    from torchvision.datasets.utils import check_integrity

    if not check_integrity(archive, md5):
        raise RuntimeError(f"{archive} is absent or has another checksum")
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            tarfile.data_filter(member, str(to))
        tar.extractall(to, filter="data")


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
    files = list_folder(root)
    class_names = tuple(files[0])
    if name in _CIFAR_CLASSES and len(class_names) != _CIFAR_CLASSES[name]:
        raise DataError(
            f"{root} is an image folder of {len(class_names)} classes, but {name} has {_CIFAR_CLASSES[name]}",
            "Name another folder with --set data.root=DIR, or train on this one with --set data.name=folder.",
        )
    paths, labels = [], []
    for of_part, num in zip(files, (num_train, num_test), strict=True):
        every = [path for of_class in of_part.values() for path in of_class]
        label = torch.arange(len(of_part)).repeat_interleave(torch.tensor([len(f) for f in of_part.values()]))
        chosen = torch.arange(len(label)) if num is None else balanced_subset(label, num, class_names=class_names)
        paths.append([every[i] for i in chosen.tolist()])
        labels.append(label[chosen])
    train, test = map(ImageSet, decode(paths, side, resize=resize), labels)
    return DataSet(train, test, class_names, f"{name}: image folder {root}")

"""Data: every draw is a function of what it is for, loaders find what is there and say what is not."""

from __future__ import annotations

import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from bln_train.data.augment import CUTOUT, FLIP_AND_CROP, Preprocess
from bln_train.data.datasets import balanced_subset, channel_moments, default_root, epoch_order, load_dataset
from bln_train.data.shapes import CLASS_NAMES, draw_shapes
from bln_train.errors import DataError
from bln_train.system.rng import draw_integers, instance_seeds

MEAN = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64)
STD = torch.tensor([0.2, 0.25, 0.3], dtype=torch.float64)


def random_images(n: int, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def seeds_of(n: int, seed: int = 0) -> Tensor:
    return instance_seeds(seed, 0, torch.arange(n))


# Preprocess


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_split_does_not_change_an_image(dtype: torch.dtype, channels_last: bool, micro_batch_size: int) -> None:
    """An image's augmentation is bitwise the same whichever micro-batch it is in."""
    preprocess = Preprocess(MEAN, STD, flip=True, crop_padding=4, cutout=7, dtype=dtype, channels_last=channels_last)
    images, seeds = random_images(17), seeds_of(17)
    whole = preprocess.train(images, seeds)
    parts = zip(images.split(micro_batch_size), seeds.split(micro_batch_size), strict=True)
    assert torch.equal(torch.cat([preprocess.train(*part) for part in parts]), whole)
    assert whole.dtype == dtype
    assert whole.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize(("flip", "padding", "cutout"), [(True, 4, 8), (False, 3, 0), (True, 0, 5), (True, 15, 40)])
def test_augmentation_equals_a_naive_reference(flip: bool, padding: int, cutout: int) -> None:
    """Mirror, reflect-pad, crop, standardise, cut out: image by image with torch's own padding."""
    n, side = 64, 16
    images, seeds = random_images(n, side), seeds_of(n)
    preprocess = Preprocess(MEAN, STD, flip=flip, crop_padding=padding, cutout=cutout, dtype=torch.float64)
    num_columns = (2 if flip else 1) * (2 * padding + 1)
    place = draw_integers(seeds, FLIP_AND_CROP, (2 * padding + 1) * num_columns).tolist()
    centre = draw_integers(seeds, CUTOUT, side * side).tolist()
    for i, out in enumerate(preprocess.train(images, seeds)):
        top, column = divmod(place[i], num_columns)
        mirrored, left = divmod(column, 2 * padding + 1)
        padded = torch.nn.functional.pad(images[i].double(), [padding] * 4, mode="reflect")
        x = padded[:, top : top + side, left : left + side]
        x = x.flip(2) if mirrored else x
        x = (x / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
        if cutout:
            y0, x0 = (c - cutout // 2 for c in divmod(centre[i], side))
            x[:, max(0, y0) : max(0, y0 + cutout), max(0, x0) : max(0, x0 + cutout)] = 0
        torch.testing.assert_close(out, x, rtol=1e-12, atol=1e-12)


def test_augmentation_is_uniform() -> None:
    """Every mirror and shift, and every centre of the cut-out square, is equally likely."""
    n = 20000
    ramp = (torch.arange(8).view(8, 1) * 8 + torch.arange(8)).to(torch.uint8).expand(n, 3, 8, 8)
    preprocess = Preprocess(torch.zeros(3), torch.ones(3), flip=True, crop_padding=1)
    out = (preprocess.train(ramp, seeds_of(n))[:, 0] * 255).round().long()
    kinds, counts = out.reshape(n, -1).unique(dim=0, return_counts=True)
    assert len(kinds) == 2 * 9
    assert (counts - n / 18).abs().max() < 5 * (n / 18) ** 0.5
    cut = Preprocess(torch.full((3,), -1.0), torch.ones(3), cutout=1).train(ramp, seeds_of(n))[:, 0] == 0
    assert bool((cut.sum((1, 2)) == 1).all())
    assert (cut.sum(0) - n / 64).abs().max() < 5 * (n / 64) ** 0.5


def test_without_augmentation_train_is_test() -> None:
    """With everything off, training images are only normalised; another seed changes augmented ones."""
    images = random_images(9)
    plain = Preprocess(MEAN, STD)
    assert torch.equal(plain.train(images, seeds_of(9)), plain.test(images))
    expected = (images.double() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(plain.test(images).double(), expected, rtol=0, atol=1e-6)
    augment = Preprocess(MEAN, STD, flip=True, crop_padding=4)
    assert not torch.equal(augment.train(images, seeds_of(9)), augment.train(images, seeds_of(9, seed=1)))
    assert images.equal(random_images(9)), "the data set itself was changed"


def test_preprocess_refuses_what_it_cannot_do() -> None:
    """A border as wide as the image has no reflection; a standard deviation of 0 no inverse."""
    with pytest.raises(ValueError, match="crop_padding 8"):
        Preprocess(MEAN, STD, crop_padding=8).train(random_images(1, side=8), seeds_of(1))
    with pytest.raises(ValueError, match="std"):
        Preprocess(MEAN, torch.zeros(3))


# Moments, order, subsets


def test_channel_moments_are_exact() -> None:
    """Moments equal the float64 reference, over several chunks."""
    images = random_images(5000, side=4)
    mean, std = channel_moments(images)
    pixels = images.double() / 255
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(std, pixels.std((0, 2, 3), correction=0), rtol=1e-12, atol=0)
    with pytest.raises(DataError, match="channel 0"):
        channel_moments(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_epoch_order_is_a_function_of_seed_and_epoch() -> None:
    """Each (seed, epoch) has its own permutation, the same at every call, whatever the global generator did."""
    first = epoch_order(100, seed=3, epoch=2)
    torch.rand(5)
    assert torch.equal(epoch_order(100, seed=3, epoch=2), first)
    assert torch.equal(first.sort().values, torch.arange(100))
    orders = {tuple(epoch_order(100, seed=s, epoch=e).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("num", [1, 9, 10, 57, 91])
def test_subset_is_balanced(num: int) -> None:
    """Class counts differ by at most one, positions are distinct, and small subsets are not the first images."""
    labels = torch.arange(10).repeat(10)[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    chosen = balanced_subset(labels, num)
    counts = torch.bincount(labels[chosen], minlength=10)
    assert len(chosen.unique()) == num
    assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(chosen, balanced_subset(labels, num))
    assert num in (1, 91) or not torch.equal(chosen, balanced_subset(labels, num, seed=1))


def test_subset_of_unequal_classes() -> None:
    """The remainder goes to classes that have images left; where a class is short, the error has the counts."""
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    assert balanced_subset(labels, 8).tolist() == list(range(8))
    with pytest.raises(DataError, match=r"needs 3 of class 1, which has 2 \(of 8 images"):
        balanced_subset(labels, 9)


# Shapes


def test_shapes_are_reproducible_and_balanced() -> None:
    """Drawing twice gives the same images; training and test images differ; classes are balanced."""
    data = load_dataset("shapes", num_train=205, num_test=53)
    again = load_dataset("shapes", num_train=205, num_test=53)
    assert torch.equal(data.train.images, again.train.images)
    assert not torch.equal(data.train.images[:53], data.test.images)
    assert data.train.images.shape == (205, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert data.class_names == CLASS_NAMES
    for part in (data.train, data.test):
        counts = torch.bincount(part.labels, minlength=10)
        assert int(counts.max() - counts.min()) <= 1
    assert not torch.equal(draw_shapes(10, seed=7)[0], draw_shapes(10, seed=8)[0])


def test_shapes_are_the_same_on_any_machine() -> None:
    """The mean pixel of a small draw is what it was where this was written, to the rounding of a few pixels."""
    images, _ = draw_shapes(20, seed=0)
    assert float(images.double().mean()) == pytest.approx(100.2185, abs=1e-3)


# Image folders


def write_folder(root: Path, classes: tuple[str, ...] = ("ant", "bee"), num: int = 3, size: int = 32) -> Path:
    for part in ("train", "test"):
        for c, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in reversed(range(num)):
                Image.new("RGB", (size, size), (c, i, 0)).save(root / part / name / f"{i}.PNG")
    return root


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    """Classes and files are sorted by name; hidden and foreign files are passed over; a subset is part of it."""
    write_folder(tmp_path)
    (tmp_path / "train" / "ant" / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    data = load_dataset("folder", root=str(tmp_path), image_size=8)
    assert data.class_names == ("ant", "bee")
    assert data.train.images.shape == (6, 3, 8, 8)
    assert data.train.images.is_contiguous()
    assert data.train.images[:, :2, 0, 0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert str(tmp_path) in data.source
    part = load_dataset("folder", root=str(tmp_path), num_train=4, num_test=2, image_size=8)
    chosen = balanced_subset(data.train.labels, 4)
    assert torch.equal(part.train.images, data.train.images[chosen])
    assert part.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
@pytest.mark.parametrize("size", [(90, 30), (30, 90), (5, 5)])
def test_folder_scales_and_crops_the_centre(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    """The shorter side is scaled to image_size and the centre kept, for images of any mode."""
    write_folder(tmp_path, num=1)
    picture = Image.new("RGB", size, (0, 0, 0))
    square = min(size)
    left, top = (size[0] - square) // 2, (size[1] - square) // 2
    picture.paste((255, 255, 255), (left, top, left + square, top + square))
    suffix = "jpg" if mode == "CMYK" else "png"
    picture.convert(mode).save(tmp_path / "train" / "ant" / f"0.{suffix}")
    if suffix == "jpg":
        (tmp_path / "train" / "ant" / "0.PNG").unlink()
    else:
        (tmp_path / "train" / "ant" / "0.png").replace(tmp_path / "train" / "ant" / "0.PNG")
    image = load_dataset("folder", root=str(tmp_path), image_size=16).train.images[0]
    assert image.shape == (3, 16, 16)
    assert int(image[:, 2:-2, 2:-2].min()) >= 250


def test_cifar_takes_an_image_folder(tmp_path: Path) -> None:
    """cifar10 reads a folder of ten classes at root, or at root/cifar10, and nothing is downloaded."""
    classes = tuple("abcdefghij")
    for root, where in ((tmp_path / "one", tmp_path / "one"), (tmp_path / "two", tmp_path / "two" / "cifar10")):
        write_folder(where, classes, num=1)
        data = load_dataset("cifar10", root=str(root), download=True)
        assert data.source == f"cifar10: image folder {where}"
        assert data.class_names == classes
        assert data.train.images.shape == (10, 3, 32, 32)


def break_folder(root: Path, how: str) -> None:
    ant, test = root / "train" / "ant", root / "test"
    if how == "corrupt":
        (ant / "1.PNG").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    elif how == "truncated":
        noise = Image.effect_noise((32, 32), 90)
        noise.save(ant / "1.PNG")
        (ant / "1.PNG").write_bytes((ant / "1.PNG").read_bytes()[:300])
    elif how == "bomb":
        Image.new("1", (60, 60)).save(ant / "1.PNG")
    elif how == "warned bomb":
        Image.new("1", (40, 40)).save(ant / "1.PNG")
    elif how == "16 bit":
        Image.new("I;16", (32, 32)).save(ant / "1.PNG")
    elif how == "empty class":
        (root / "train" / "cat").mkdir()
        (test / "cat").mkdir()
    elif how == "mismatch":
        (test / "bee").rename(test / "wasp")
    elif how == "one class":
        for part in ("train", "test"):
            (root / part / "bee").rename(root / f"{part}-bee")
    elif how == "no classes":
        for part in ("train", "test"):
            (root / part).rename(root / f"{part}-away")
            (root / part).mkdir()
    elif how == "no test":
        test.rename(root / "validation")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("corrupt", r"ant/1\.PNG is not a readable image"),
        ("truncated", r"ant/1\.PNG is not a readable image"),
        ("bomb", r"ant/1\.PNG is too large"),
        ("warned bomb", r"ant/1\.PNG is too large"),
        ("16 bit", r"ant/1\.PNG has more than 8 bits"),
        ("empty class", r"train/cat holds no images"),
        ("mismatch", r"differ: bee only in train; wasp only in test"),
        ("one class", r"at least 2 class folders, but holds only ant"),
        ("no classes", r"at least 2 class folders, but holds none"),
        ("no test", r"cannot list .*/test"),
    ],
)
def test_broken_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, message: str) -> None:
    """Whatever is wrong with an image folder is one DataError that names the place and says what to do."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 + 1)
    break_folder(write_folder(tmp_path), how)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("folder", root=str(tmp_path))
    assert caught.value.hint


def test_too_few_images_is_an_error(tmp_path: Path) -> None:
    """A subset larger than the folder is refused before anything is decoded, with the counts."""
    write_folder(tmp_path, num=1)
    (tmp_path / "train" / "ant" / "0.PNG").write_bytes(b"would fail to decode")
    with pytest.raises(DataError, match=r"needs 2 of class (ant|bee), which has 1"):
        load_dataset("folder", root=str(tmp_path), num_train=4)


def test_cifar_folder_must_look_like_cifar(tmp_path: Path) -> None:
    """A folder with another number of classes or another image size is not taken for CIFAR."""
    write_folder(tmp_path / "two")
    with pytest.raises(DataError, match="2 classes, but cifar10 has 10"):
        load_dataset("cifar10", root=str(tmp_path / "two"), download=False)
    write_folder(tmp_path / "large", tuple("abcdefghij"), num=1, size=40)
    with pytest.raises(DataError, match=r"train/a/0\.PNG is 40x40"):
        load_dataset("cifar10", root=str(tmp_path / "large"), download=False)


def test_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """$BLN_DATA wins over ~/.cache/bln-train, and ~ is expanded."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("BLN_DATA", raising=False)
    assert default_root() == Path("/home/someone/.cache/bln-train")
    monkeypatch.setenv("BLN_DATA", "~/data")
    assert default_root() == Path("/home/someone/data")


# CIFAR's own archives


def fake_pickle(**content: object) -> bytes:
    """Pickle as CIFAR's were: protocol 2, with numpy's dtype flags as the integers 0 and 1 instead of booleans."""
    return pickle.dumps(content, protocol=2).replace(b"\x89\x88\x87", b"K\x00K\x01\x87")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 archive of 20 training and 10 test images; torchvision is told its checksums."""
    images = random_images(30).reshape(30, -1).numpy()
    members = {
        "data_batch_1": fake_pickle(data=images[:20], labels=[i % 10 for i in range(20)]),
        "test_batch": fake_pickle(data=images[20:], labels=list(range(10))),
        "batches.meta": fake_pickle(label_names=list("abcdefghij")),
    }
    path = tmp_path / "served" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    def md5(content: bytes) -> str:
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    cifar = datasets.CIFAR10
    monkeypatch.setattr(cifar, "tgz_md5", md5(path.read_bytes()))
    monkeypatch.setattr(cifar, "train_list", [["data_batch_1", md5(members["data_batch_1"])]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", md5(members["test_batch"])]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5(members["batches.meta"])})
    monkeypatch.setattr(cifar, "url", "http://127.0.0.1:1/cifar-10-python.tar.gz")  # nobody listens on port 1
    return path


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    handler = partial(QuietHandler, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        yield archive
        server.shutdown()
        thread.join()


def test_cifar_is_downloaded_and_verified(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFAR is fetched into root once, verified, and read with its labels; stdout stays clean."""
    data = load_dataset("cifar10", root=str(tmp_path / "data"))
    assert torch.equal(data.train.images, random_images(30)[:20])
    assert data.train.images.is_contiguous()
    assert torch.equal(data.test.images, random_images(30)[20:])
    assert data.train.labels.tolist() == [i % 10 for i in range(20)]
    assert data.class_names == tuple("abcdefghij")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:1/gone")
    part = load_dataset("cifar10", root=str(tmp_path / "data"), download=False, num_train=10)
    assert torch.equal(part.train.images, data.train.images[balanced_subset(data.train.labels, 10)])


def test_archive_at_root_is_no_download(archive: Path) -> None:
    """An archive already at root is verified and extracted even where downloading is off."""
    assert len(load_dataset("cifar10", root=str(archive.parent), download=False).train) == 20


@pytest.mark.parametrize("download", [False, True])
def test_absent_cifar_names_the_ways_out(archive: Path, tmp_path: Path, download: bool) -> None:
    """No archive and no network is one error with the archive's place, an image folder and `shapes`."""
    root = tmp_path / "empty"
    with pytest.raises(DataError, match=f"cifar10 is not at {root}") as caught:
        load_dataset("cifar10", root=str(root), download=download)
    assert ("failed" in caught.value.problem) == download
    for way_out in (str(root / archive.name), "checksum", "data.root=DIR", "data.name=shapes"):
        assert way_out in caught.value.hint
    assert ("data.download=true" in caught.value.hint) != download


@pytest.mark.parametrize("download", [False, True])
def test_damaged_archive_is_named(archive: Path, download: bool) -> None:
    """An archive at root with a wrong checksum is not used, and the error names it."""
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{archive} is damaged"):
        load_dataset("cifar10", root=str(archive.parent), download=download)


def test_damaged_download_is_named(served: Path, tmp_path: Path) -> None:
    """A download with a wrong checksum is not used either, and a good one later replaces it."""
    good = served.read_bytes()
    served.write_bytes(good[:-20])
    with pytest.raises(DataError, match="is damaged or incomplete"):
        load_dataset("cifar10", root=str(tmp_path / "data"))
    served.write_bytes(good)
    assert len(load_dataset("cifar10", root=str(tmp_path / "data")).test) == 10


def test_unknown_name_is_an_error() -> None:
    """Only the four data sets exist."""
    with pytest.raises(ValueError, match="cifar10, cifar100, folder or shapes"):
        load_dataset("mnist")

"""Bad data: whatever is wrong with images or archives is one error with names in it; nothing runs, nothing escapes."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import struct
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torchvision import datasets

from bln_train.data.datasets import load_dataset
from bln_train.data.image_folder import decode
from bln_train.errors import DataError


def write_folder(root: Path, classes: tuple[str, ...] = ("ant", "bee"), num: int = 2) -> Path:
    for part in ("train", "test"):
        for c, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(num):
                Image.new("RGB", (16, 16), (90 * c, 40 * i, 7)).save(root / part / name / f"{i}.png")
    return root


def problem(root: Path, **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset("folder", root=str(root), **settings)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value.problem


def test_everything_wrong_with_the_folders_is_said_at_once(tmp_path: Path) -> None:
    """Empty classes, classes of one part only and things that are no files are one error, each with its place."""
    root = write_folder(tmp_path, ("ant", "bee", "cat"))
    for file in (root / "train" / "ant").iterdir():
        file.rename(file.with_suffix(".tiff"))
    (root / "test" / "bee").rename(root / "test" / "wasp")
    (root / "test" / "fly").mkdir()
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    (root / "train" / "cat" / "loop.png").symlink_to("loop.png")
    (root / "train" / "cat" / "broken.png").symlink_to("nowhere.png")
    (root / "train" / "cat" / "folder.png").mkdir()
    found = problem(root)
    assert "train/ant holds no images, but files of other kinds: 0.tiff, 1.tiff" in found
    assert "test/fly holds no images" in found
    assert "no file, or a link to none: broken.png, folder.png, loop.png, pipe.png" in found
    assert "bee only in train; fly, wasp only in test" in found
    assert len(found.splitlines()) == 4


def test_links_to_images_and_folders_are_followed(tmp_path: Path) -> None:
    """A class or an image may be a link; a folder that links to itself is no class."""
    root = write_folder(tmp_path / "data")
    (root / "train" / "ant").rename(tmp_path / "elsewhere")
    (root / "train" / "ant").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "bee" / "2.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (root / "train" / "loop").symlink_to("loop")
    data = load_dataset("folder", root=str(root))
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]


def test_every_bad_image_is_named(tmp_path: Path) -> None:
    """Bad files of both parts are one error that says how many of how many; beyond ten they are counted."""
    root = write_folder(tmp_path, num=10)
    (root / "train" / "ant" / "0.png").write_bytes(b"no image")
    (root / "test" / "bee" / "9.png").write_bytes(b"")
    Image.new("I;16", (16, 16)).save(root / "test" / "bee" / "8.png")
    with pytest.raises(DataError) as caught:
        load_dataset("folder", root=str(root))
    assert [line.split(" ")[0][-13:] for line in caught.value.problem.splitlines()] == [
        "ain/ant/0.png",
        "est/bee/8.png",
        "est/bee/9.png",
    ]
    assert caught.value.hint.startswith("3 of 40 images")
    for file in (root / "train" / "bee").iterdir():
        file.write_bytes(b"")
    assert problem(root).endswith("and 3 more such problems")


@pytest.mark.parametrize("where", ["train/ant", "train", "."])
def test_unreadable_places_are_named(where: str) -> None:
    """A folder that may not be listed is named with the system's reason, whatever its depth."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        root, user = Path(name) / "data", os.geteuid()
        write_folder(root)
        if user == 0:  # root may read everything
            for path in (Path(name), root, *root.rglob("*")):
                os.chown(path, 65534, 65534)
        place = root / where
        place.chmod(0)
        try:
            if user == 0:
                os.seteuid(65534)
            for kind in ("folder", "cifar10"):
                if kind == "cifar10" and where == "train":
                    continue  # its images are looked for elsewhere
                with pytest.raises(DataError, match="Permission denied") as caught:
                    load_dataset(kind, root=str(root), download=False)
                assert str(place) in caught.value.problem
        finally:
            os.seteuid(user)
            place.chmod(0o700)


def test_a_file_as_root_is_named(tmp_path: Path) -> None:
    """A file where a folder should be is said to be one."""
    file = tmp_path / "cifar.tar"
    file.write_bytes(b"")
    with pytest.raises(DataError, match="is a file, not a folder"):
        load_dataset("cifar10", root=str(file), download=False)
    assert "Not a directory" in problem(file)
    root = write_folder(tmp_path / "flat")
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    (root / "test" / "0.png").write_bytes(b"")
    assert "holds none (and 1 file)" in problem(root)


def test_a_short_class_is_named(tmp_path: Path) -> None:
    """A subset that a class cannot give is refused with the name of the class."""
    root = write_folder(tmp_path)
    (root / "train" / "bee" / "1.png").unlink()
    assert "needs 2 of class bee, which has 1" in problem(root, num_train=4)


@pytest.mark.parametrize("name", ["0.png", "0.jpg"])
def test_postscript_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A PostScript file called like an image is not given to Ghostscript."""
    file = tmp_path / name
    Image.new("RGB", (16, 16)).save(file, format="EPS")
    with Image.open(file) as opened:
        assert opened.format == "EPS"  # PIL by itself would take it
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("PostScript was run"))
    with pytest.raises(DataError, match="not a readable image: cannot identify"):
        decode([[file]], 16, resize=True)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_bomb_is_not_decoded(tmp_path: Path) -> None:
    """A PNG of a few hundred bytes that claims 60000 x 60000 pixels, and one whose text expands a thousandfold, are refused."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    pixels = tmp_path / "pixels.png"
    pixels.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))
    text = tmp_path / "text.png"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    words = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 2**26))
    text.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + words + chunk(b"IDAT", zlib.compress(b"\0" * 4)) + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=r"pixels\.png is too large to decode: .*\n.*text\.png is not a readable image"):
        decode([[pixels, text]], 16, resize=True)


def test_an_image_that_pil_only_warns_of_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to twice its limit PIL decodes and warns, which a user's filters may hide."""
    Image.new("RGB", (12, 12)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"large\.png is too large to decode"):
            decode([[tmp_path / "large.png"]], 16, resize=True)


def test_transparency_is_dropped_without_a_word(tmp_path: Path) -> None:
    """Alpha, and a palette with transparent entries, leave the colour stored under it; nothing is warned of."""
    clear = Image.new("RGBA", (16, 16), (200, 100, 50, 0))
    clear.save(tmp_path / "a.png")
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "b.png", transparency=bytes([255, 0]))
    (images,) = decode([[tmp_path / "a.png", tmp_path / "b.png"]], 16, resize=True)
    assert images[:, :, 3, 5].tolist() == [[200, 100, 50]] * 2


def encoded(kind: str) -> bytes:
    noise = Image.merge("RGB", [Image.effect_noise((24, 20), 60) for _ in range(3)])
    file = io.BytesIO()
    (noise.convert("P") if kind == "GIF" else noise).save(file, format=kind)
    return file.getvalue()


SEEDS = {kind: encoded(kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "GIF")}


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, 2000)),
)
def test_mutated_images_decode_or_are_named(
    tmp_path_factory: pytest.TempPathFactory, kind: str, flips: list[tuple[int, int]], length: int | None
) -> None:
    """Flipped and cut bytes of any format give an image or a DataError that names the file."""
    content = bytearray(SEEDS[kind][:length])
    for place, value in flips:
        if content:
            content[place % len(content)] = value
    file = tmp_path_factory.getbasetemp() / "mutated.png"
    file.write_bytes(content)
    try:
        (images,) = decode([[file]], 8, resize=True)
    except DataError as error:
        named = error.problem.startswith(str(file))
    else:
        named = images.shape == (1, 3, 8, 8)
    assert named


# Archives


def write_archive(path: Path, *members: tarfile.TarInfo) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            member.size = 5 if member.isfile() else 0
            tar.addfile(member, io.BytesIO(b"taken") if member.isfile() else None)
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def evil_members() -> Iterator[tuple[str, tuple[tarfile.TarInfo, ...]]]:
    yield "parent", (member("../outside/taken"),)
    yield "link", (member("cifar-10-batches-py", tarfile.SYMTYPE, "../outside"), member("cifar-10-batches-py/taken"))
    yield "hard link", (member("cifar-10-batches-py/test_batch", tarfile.LNKTYPE, "../outside/secret"),)
    yield "device", (member("cifar-10-batches-py/test_batch", tarfile.CHRTYPE),)


@pytest.mark.parametrize(("how", "members"), list(evil_members()), ids=[how for how, _ in evil_members()])
def test_an_archive_cannot_write_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, members: tuple[tarfile.TarInfo, ...]
) -> None:
    """An archive of the right checksum with a member, link or device that leads out of its folder extracts nothing at all."""
    root, outside = tmp_path / "data", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("kept")
    archive = root / datasets.CIFAR10.filename
    checksum = write_archive(archive, member("cifar-10-batches-py/data_batch_1"), *members)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", checksum)
    with pytest.raises(DataError, match=rf"{archive} was refused, and nothing extracted"):
        load_dataset("cifar10", root=str(root), download=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["data", archive.name, "outside", "secret"])


def test_good_members_are_extracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusals are not empty: an archive without a bad member is extracted, absolute names below its folder."""
    root = tmp_path / "data"
    root.mkdir()
    archive, absolute = root / datasets.CIFAR10.filename, f"{tmp_path}/outside"
    checksum = write_archive(archive, member("cifar-10-batches-py/data_batch_1"), member(absolute))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", checksum)
    with pytest.raises(DataError, match="cifar10 is not at"):
        load_dataset("cifar10", root=str(root), download=False)
    assert (root / "cifar-10-batches-py" / "data_batch_1").read_text() == "taken"
    assert (root / absolute.removeprefix("/")).exists()
    assert not Path(absolute).exists()


def test_pickles_of_other_content_are_not_loaded(tmp_path: Path) -> None:
    """Files in CIFAR's place whose checksum is not CIFAR's are never unpickled."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    ran = tmp_path / "ran"
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(ran).encode())
    with pytest.raises(DataError, match="cifar10 is not at"):
        load_dataset("cifar10", root=str(tmp_path), download=False)
    assert not ran.exists()
    assert torch.is_tensor(decode([[]], 8, resize=True)[0])

"""Images on disk: which files count, what is wrong with bad ones, and batches ahead of the caller."""

from __future__ import annotations

import io
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitfold.errors import ImageError
from vitfold.images import Batch, ImageSet, batches, find_images, read_image
from vitfold.model import Preprocess

SIZE = 8
PREPROCESS = Preprocess(
    resize="none",
    resize_size=(SIZE, SIZE),
    crop_size=(SIZE, SIZE),
    interpolation="nearest",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)


def write(path: Path, value: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE, SIZE), (value, value, value)).convert(mode).save(path)
    return path


def folder_of(root: Path, count: int) -> ImageSet:
    for i in range(count):
        write(root / f"{i:03}.png", i)
    return find_images(root)


def values(batch: Batch) -> list[int]:
    return np.rint(batch.pixel_values[:, 0, 0, 0] * 255).astype(int).tolist()


def noise_bytes(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


# Folders.


def test_a_missing_folder_offers_the_nearest_name(tmp_path):
    (tmp_path / "validation").mkdir()
    with pytest.raises(ImageError, match=r"no such folder: .*validaton \(did you mean validation\?\)"):
        find_images(tmp_path / "validaton")


@pytest.mark.parametrize("missing", ["x", "x/y"])
def test_a_missing_folder_with_nothing_near(tmp_path, missing):
    with pytest.raises(ImageError, match=r"no such folder: .* \(check the path\)"):
        find_images(tmp_path / missing)


def test_a_file_is_not_a_folder(tmp_path):
    with pytest.raises(ImageError, match=r"cat\.png is a file; give a folder of images"):
        find_images(write(tmp_path / "cat.png"))


def test_an_empty_folder_says_what_was_expected(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty class").mkdir()
    with pytest.raises(ImageError, match=r"no images in .*\.jpeg, \.jpg, \.png.* or one sub-folder of images"):
        find_images(tmp_path)


def test_a_flat_folder_is_sorted_and_has_no_classes(tmp_path):
    for name in ("b.JPG", "a.png", "c.webp"):
        write(tmp_path / name)
    (tmp_path / "readme.md").write_text("")
    found = find_images(str(tmp_path))
    assert [path.name for path in found.paths] == ["a.png", "b.JPG", "c.webp"]
    assert found.classes is None
    assert found.class_index is None


def test_class_folders_are_sorted_and_empty_ones_left_out(tmp_path):
    for name in ("dog/1.png", "cat/2.png", "cat/1.png"):
        write(tmp_path / name)
    (tmp_path / "ant").mkdir()
    found = find_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.paths] == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert found.classes == ("cat", "dog")
    assert found.class_index == (0, 0, 1)


def test_hidden_folders_and_files_are_ignored(tmp_path):
    write(tmp_path / ".thumbnails" / "1.png")
    write(tmp_path / ".hidden.png")
    (tmp_path / "._1.png").write_bytes(b"a resource fork of macOS")
    write(tmp_path / "1.png")
    (tmp_path / "folder.png").mkdir()
    found = find_images(tmp_path)
    assert [path.name for path in found.paths] == ["1.png"]
    assert found.classes is None


def test_digest_sees_names_classes_and_contents(tmp_path):
    for root in ("one", "same"):
        write(tmp_path / root / "a" / "1.png", 1)
        write(tmp_path / root / "b" / "2.png", 2)
    write(tmp_path / "content" / "a" / "1.png", 9)
    write(tmp_path / "content" / "b" / "2.png", 2)
    write(tmp_path / "name" / "a" / "0.png", 1)
    write(tmp_path / "name" / "b" / "2.png", 2)
    write(tmp_path / "class" / "a" / "1.png", 1)
    write(tmp_path / "class" / "c" / "2.png", 2)
    digests = {name: find_images(tmp_path / name).digest() for name in ("one", "same", "content", "name", "class")}
    assert digests["one"] == digests["same"]
    assert len(set(digests.values())) == 4


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10))), (99, list(range(10)))]
)
def test_first_spreads_evenly(tmp_path, count, kept):
    for i in range(10):
        write(tmp_path / f"class{i // 5}" / f"{i}.png", i)
    found = find_images(tmp_path).first(count)
    assert [int(path.stem) for path in found.paths] == kept
    assert found.class_index == tuple(i // 5 for i in kept)
    assert found.classes == ("class0", "class1")


# Single images.


def test_read_image_decodes_as_rgb(tmp_path):
    image = read_image(write(tmp_path / "grey.png", 77, "L"))
    assert (image.mode, image.size, image.getpixel((3, 3))) == ("RGB", (SIZE, SIZE), (77, 77, 77))


def test_16_bit_files_are_scaled_and_not_white(tmp_path):
    Image.fromarray(np.full((SIZE, SIZE), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    Image.fromarray(np.ones((SIZE, SIZE), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ImageError, match=r"float\.tiff: pixels of mode F have no defined white"):
        read_image(tmp_path / "float.tiff")


BAD = {
    "text": (b"this is no image", "is not an image that Pillow can read"),
    "empty": (b"", "is not an image that Pillow can read"),
    "truncated jpeg": (noise_bytes("JPEG")[:1500], "is damaged or cut short .*fetch it again or remove it"),
    "truncated png": (noise_bytes("PNG")[:1500], "is damaged or cut short"),
    "corrupt png": (
        noise_bytes("PNG")[:200] + b"\x00" * 300 + noise_bytes("PNG")[500:],
        "is damaged or cut short",
    ),
    "truncated bmp": (noise_bytes("BMP")[:1500], "is damaged or cut short"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_its_cure(tmp_path, case):
    content, message = BAD[case]
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=rf"bad\.jpg {message}"):
        read_image(tmp_path / "bad.jpg")


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"no such image: .*gone\.jpg"):
        read_image(tmp_path / "gone.jpg")


@pytest.mark.parametrize("limit", [40, 20], ids=["beyond the limit", "beyond twice the limit"])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    path = write(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=rf"bomb\.png would decode to more than {limit} pixels"):
        read_image(path)


def test_reading_in_threads_leaves_the_filters_of_warnings_alone(tmp_path):
    path = write(tmp_path / "a.png")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_image, [path] * 200))
    assert warnings.filters == before


# Batches.


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(("count", "batch"), [(7, 3), (6, 3), (2, 5), (1, 1)])
def test_batches_keep_the_order_and_the_last_is_smaller(tmp_path, count, batch, workers):
    found = list(batches(folder_of(tmp_path, count), PREPROCESS, batch=batch, workers=workers))
    assert [i for part in found for i in part.index] == list(range(count))
    assert [v for part in found for v in values(part)] == list(range(count))
    assert [len(part.index) for part in found] == [batch] * (count // batch) + [count % batch] * (count % batch > 0)
    assert all(part.pixel_values.shape == (len(part.index), 3, SIZE, SIZE) for part in found)


def test_the_first_bad_image_stops_and_is_named(tmp_path):
    folder_of(tmp_path, 6)
    (tmp_path / "003.png").write_bytes(b"not an image")
    prepared = batches(find_images(tmp_path), PREPROCESS, batch=2)
    assert values(next(prepared)) == [0, 1]
    with pytest.raises(ImageError, match=r"003\.png is not an image .*or pass --skip-bad"):
        next(prepared)


def test_bad_images_are_skipped_on_request_counted_and_named(tmp_path):
    folder_of(tmp_path, 9)
    bad = (1, 3, 4, 5, 8)
    for i in bad:
        (tmp_path / f"{i:03}.png").write_bytes(b"not an image")
    named: list[str] = []
    found = list(batches(find_images(tmp_path), PREPROCESS, batch=3, skip_bad=True, on_skip=named.append))
    assert [part.index for part in found] == [(0, 2), (6, 7)], "a batch of bad images only is no batch"
    assert [values(part) for part in found] == [[0, 2], [6, 7]]
    assert len(named) == len(bad)
    for i, message in zip(bad, named, strict=True):
        assert f"{i:03}.png is not an image" in message
        assert "--skip-bad" not in message


def test_skipping_without_a_listener_is_allowed(tmp_path):
    folder_of(tmp_path, 2)
    (tmp_path / "000.png").write_bytes(b"")
    assert [part.index for part in batches(find_images(tmp_path), PREPROCESS, batch=1, skip_bad=True)] == [(1,)]


class CountingPreprocess(Preprocess):
    """Counts the images that were prepared."""

    __slots__ = ()
    prepared = 0
    lock = threading.Lock()

    def __call__(self, image: Image.Image) -> np.ndarray:
        with self.lock:
            type(self).prepared += 1
        return super().__call__(image)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_only_a_few_batches_are_prepared_ahead_of_a_slow_caller(tmp_path, workers):
    images = folder_of(tmp_path, 40)
    counting = CountingPreprocess(**{name: getattr(PREPROCESS, name) for name in PREPROCESS.to_dict()})
    CountingPreprocess.prepared = 0
    taken, most = 0, 0
    for _ in batches(images, counting, batch=2, workers=workers):
        deadline = time.monotonic() + 5
        # Wait until the threads have done all that they may do, then let them show whether they stop.
        while CountingPreprocess.prepared < min(40, 2 * (taken + 1 + workers)) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)
        most = max(most, CountingPreprocess.prepared // 2 - taken)
        taken += 1
    assert taken == 20
    assert workers + 1 <= most <= workers + 2


def test_leaving_early_ends_the_threads(tmp_path):
    iterator = batches(folder_of(tmp_path, 20), PREPROCESS, batch=1)
    next(iterator)
    iterator.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("decode")] == []


def test_loose_images_beside_class_folders_are_an_error(tmp_path):
    (tmp_path / "thumbs").mkdir()
    for path in (tmp_path / "loose.png", tmp_path / "thumbs" / "small.png"):
        Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ImageError, match=r"loose\.png.*thumbs"):
        find_images(tmp_path)

"""One image in: whatever a caller has it as gives the same pixels, turned as its source would."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from vitfold.decoding import as_image, listed, prepared, read_image, suffixes
from vitfold.errors import ImageWarning
from vitfold.images import find_images
from vitfold.model import Preprocess
from vitfold.sources.transformers_preprocess import default_processor, preprocess_from_processor

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
ORIENTATION = 0x0112
# What a viewer does with the pixels of a file by the tag's value (EXIF 2.32, section 4.6.4).
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def png_bytes(pixels: np.ndarray = PIXELS, orientation: int | None = None) -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(stream, "PNG", exif=exif)
    return stream.getvalue()


FORMS = {
    "bytes": lambda _: png_bytes(),
    "bytearray": lambda _: bytearray(png_bytes()),
    "memoryview": lambda _: memoryview(png_bytes()),
    "BytesIO": lambda _: io.BytesIO(png_bytes()),
    "open file": lambda path: path.open("rb"),
    "path": lambda path: path,
    "text": str,
    "Pillow": lambda _: Image.fromarray(PIXELS),
    "lazy Pillow": Image.open,
    "array": lambda _: PIXELS,
    "array with opacity": lambda _: np.dstack([PIXELS, np.full((6, 9), 7, np.uint8)]),
    "array of another order": lambda _: np.asfortranarray(PIXELS),
    "read-only array": lambda _: np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape),
    "tensor": lambda _: torch.from_numpy(PIXELS).permute(2, 0, 1),
    "tensor with gradients off": lambda _: torch.from_numpy(PIXELS).permute(2, 0, 1).contiguous().detach(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pixels(tmp_path, form):
    (tmp_path / "a.png").write_bytes(png_bytes())
    item = FORMS[form](tmp_path / "a.png")
    found = as_image(item)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), PIXELS)
    assert len(listed(item if not hasattr(item, "seek") else io.BytesIO(png_bytes()))) == 1
    if hasattr(item, "close"):
        item.close()


@pytest.mark.parametrize("grey", [PIXELS[..., 0], PIXELS[..., :1], torch.from_numpy(PIXELS[..., 0].copy())])
def test_grey_is_repeated(grey):
    np.testing.assert_array_equal(np.asarray(as_image(grey)), np.repeat(PIXELS[..., :1], 3, axis=2))


def test_masks_are_black_and_white_and_16_bits_are_scaled():
    assert np.asarray(as_image(np.eye(3, dtype=bool)))[..., 0].tolist() == (255 * np.eye(3, dtype=int)).tolist()
    assert as_image(np.full((2, 2), 0x8000, np.uint16)).getpixel((0, 0)) == (128, 128, 128)


def test_batches_are_gone_through():
    assert len(listed(np.stack([PIXELS] * 3))) == 3
    assert len(listed(torch.zeros(4, 3, 5, 5, dtype=torch.uint8))) == 4
    assert len(listed(iter(["a.png", "b.png"]))) == 2
    assert listed([]) == []


# Orientation.


@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_is_followed_where_the_source_follows_it(orientation):
    data = png_bytes(orientation=orientation)
    np.testing.assert_array_equal(np.asarray(as_image(data, exif="apply")), TURNS[orientation](PIXELS))
    np.testing.assert_array_equal(np.asarray(as_image(data, exif="ignore")), PIXELS)
    np.testing.assert_array_equal(np.asarray(as_image(data)), PIXELS)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_files_are_read_as_the_zoos_own_pipelines_read_them(tmp_path, orientation):
    from torchvision.datasets.folder import default_loader
    from transformers.image_utils import load_image

    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(orientation=orientation))
    made = preprocess_from_processor(default_processor("vit", (4, 4)), (4, 4))
    np.testing.assert_array_equal(np.asarray(read_image(path, exif=made.exif)), np.asarray(load_image(str(path))))
    np.testing.assert_array_equal(
        np.asarray(as_image(Image.open(path), exif=made.exif)), np.asarray(load_image(str(path)))
    )
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(default_loader(str(path))))


def test_the_model_sees_what_its_preprocessing_says():
    plain = Preprocess(
        resize="none", resize_size=(6, 6), crop_size=(6, 6), interpolation="nearest", mean=(0.0,) * 3, std=(1.0,) * 3
    )
    turned = replace(plain, exif="apply")
    data = png_bytes(PIXELS[:, :6], orientation=3)
    np.testing.assert_array_equal(prepared(data, turned), prepared(data, plain)[:, ::-1, ::-1])
    assert "exif" not in plain.to_dict(), "older readers open what does not need it"
    assert turned.to_dict()["exif"] == "apply"


# Folders.


@pytest.mark.parametrize(
    ("suffix", "kind", "needs"),
    [
        (".jfif", "JPEG", None), (".jpe", "JPEG", None), (".pgm", "PPM", None), (".pnm", "PPM", None),
        (".tga", "TGA", None), (".avif", "AVIF", "avif"), (".jp2", "JPEG2000", "jpg_2000"),
        (".J2K", "JPEG2000", "jpg_2000"),
        (".qoi", "QOI", None), (".ico", "ICO", None), (".dds", "DDS", None), (".sgi", "SGI", None),
    ],
)  # fmt: skip
def test_every_suffix_that_pillow_reads_is_seen(tmp_path, suffix, kind, needs):
    Image.init()
    if (needs is not None and not features.check(needs)) or kind not in Image.SAVE:
        assert suffix.lower() not in suffixes() or kind in Image.OPEN
        return
    Image.new("L" if kind == "PPM" else "RGB", (16, 16), 90).save(tmp_path / f"a{suffix}", kind)
    found = find_images(tmp_path)
    assert [path.name for path in found.paths] == [f"a{suffix}"]
    assert found.remark is None
    assert read_image(found.paths[0]).size == (16, 16)


def test_documents_and_films_are_no_images():
    assert not {".pdf", ".mpg", ".h5", ".grib", ".eps", ".txt", ".npy"} & suffixes()
    assert {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"} <= suffixes()


def test_what_is_left_out_is_counted_and_named(tmp_path):
    for name in ("cat/1.png", "cat/deeper/2.png", "dog/3.png", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png_bytes())
    (tmp_path / "cat" / "phone.heic").write_bytes(b"")
    (tmp_path / "labels.csv").write_text("")
    (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / ".DS_Store").write_text("")
    found = find_images(tmp_path)
    assert [path.name for path in found.paths] == ["1.png", "3.png"]
    heic = {"cat/phone.heic"} - {name for name in ("cat/phone.heic",) if ".heic" in suffixes()}
    assert set(found.left_out) == {"cat/deeper", "empty", "labels.csv", "dog/gone.png"} | heic
    assert f"left out of {tmp_path}, as no image files: {len(found.left_out)} (" in str(found.remark)
    assert found.first(1).left_out == found.left_out


# Bits.


@pytest.mark.parametrize(
    ("brightest", "bits", "factor"), [(4095, 12, 16), (1023, 10, 64), (16383, 14, 4), (200, 8, 256)]
)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_unused_bits_of_16_are_not_silently_black(tmp_path, brightest, bits, factor, suffix):
    Image.fromarray(np.full((4, 4), brightest, np.uint16)).save(tmp_path / f"a{suffix}")
    with pytest.warns(ImageWarning, match=rf"no value above {2**bits - 1}.*held {bits} bits.*by {factor} first"):
        read_image(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("brightest", [0, 20_000, 65_535])
def test_whole_16_bits_and_black_are_what_they_are(tmp_path, brightest):
    Image.fromarray(np.full((4, 4), brightest, np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (brightest >> 8,) * 3


def test_paths_of_any_kind(tmp_path: Path):
    class Named:
        def __fspath__(self) -> str:
            return str(tmp_path / "a.png")

    (tmp_path / "a.png").write_bytes(png_bytes())
    assert as_image(Named()).size == (9, 6)
    assert len(listed(Named())) == 1

"""Any kind of image is read upright and in RGB, a mask by its meaning; files are whole."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import data
import trees
from inputs import files, transforms
from inputs.errors import UserError
from inputs.source import voc_palette

ROOT = Path(__file__).resolve().parents[2]

SIXTEEN_BIT = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)


@pytest.fixture
def read(tmp_path):
    """Writes an image under a name and reads it: uint8 [H, W, 3]."""

    def save_and_read(name: str, image: Image.Image, **options) -> np.ndarray:
        image.save(tmp_path / name, **options)
        rgb = files.read_image(tmp_path / name)
        assert rgb.dtype == torch.uint8 and rgb.shape[0] == 3
        return rgb.permute(1, 2, 0).numpy()

    return save_and_read


def test_any_kind_of_image(read):
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype(np.uint8)
    rgb, grey = colours[..., :3], colours[..., 0]
    for name in ("a.png", "a.bmp", "a.tif"):
        assert np.array_equal(read(name, Image.fromarray(rgb)), rgb)
    assert np.array_equal(read("a.webp", Image.fromarray(rgb), lossless=True), rgb)
    three = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(read("grey.png", Image.fromarray(grey)), three)
    assert np.array_equal(read("grey_alpha.png", Image.fromarray(grey).convert("LA")), three)
    assert np.array_equal(read("rgba.png", Image.fromarray(colours)), rgb)
    assert read("cmyk.jpg", Image.fromarray(rgb).convert("CMYK")).shape == (20, 30, 3)
    assert read("grey.jpg", Image.fromarray(grey)).shape == (20, 30, 3)


def test_palette_with_transparency(read):
    values = np.random.default_rng(0).integers(0, 4, (20, 30)).astype(np.uint8)
    picture = Image.fromarray(values)
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    expected = values[..., None] * 30 + np.array([10, 20, 30], np.uint8)
    assert np.array_equal(read("palette.png", picture, transparency=1), expected)


def test_sixteen_bits_are_not_clipped(read):
    image = read("sixteen.png", Image.fromarray(SIXTEEN_BIT))
    assert np.abs(image[..., 1].astype(float) - SIXTEEN_BIT / 257).max() <= 0.5


@pytest.mark.filterwarnings("error")
def test_floats_that_are_not_numbers_are_black(read):
    values = np.array([[0.0, 2.0, np.nan, np.inf]], np.float32)
    assert read("float.tif", Image.fromarray(values))[0, :, 0].tolist() == [0, 255, 0, 0]


def test_a_mask_of_the_unturned_image(tmp_path):
    trees.save(tmp_path / "a.png", np.zeros((4, 6), np.uint8))
    table = np.arange(256, dtype=np.uint8)
    with pytest.raises(UserError, match=r"one size; the image as its EXIF data turn it$"):
        files.read_label(tmp_path / "a.png", table, size=(6, 4))
    with pytest.raises(UserError, match=r"one size$"):
        files.read_label(tmp_path / "a.png", table, size=(6, 5))


def test_an_orientation_that_does_not_exist_is_none(tmp_path):
    exif = Image.Exif()
    exif[files.EXIF_ORIENTATION] = 9
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    image, stored = files.open_image(tmp_path / "a.jpg")
    assert stored == (20, 30) and image.size == (30, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_image_and_label(tmp_path, orientation):
    root = trees.folder(tmp_path, train=1, val=1, unlabelled=0, size=(64, 96), suffix=".jpg")
    path = root / "images/train/train_000.jpg"
    upright = Image.open(path).convert("RGB")
    # how a camera held that way would have stored it (Pillow's transpositions)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[files.EXIF_ORIENTATION] = orientation
    stored.save(path, exif=exif, quality=100, subsampling=0)
    as_tensor = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    for max_size in (1024, 24):  # at full size, and decoded at a quarter
        source = data.load_source("folder", str(root), max_size=max_size)
        image, label = source.read(source.train[0])
        assert image.shape[-2:] == label.shape == source.training_size(64, 96)
        expected = transforms.resize_image(as_tensor, tuple(label.shape))
        assert (image.int() - expected.int()).abs().float().mean() < 8


def test_damaged_exif_data_cannot_crash(tmp_path):
    exif = Image.Exif()
    exif[files.EXIF_ORIENTATION], exif[0x010E] = 6, "a description of the image"
    content = exif.tobytes()
    for end in range(8, len(content), 3):
        Image.new("RGB", (12, 8)).save(tmp_path / "a.jpg", exif=content[:end])
        try:
            assert files.read_image(tmp_path / "a.jpg").shape in ((3, 8, 12), (3, 12, 8))
        except UserError as error:
            assert "a.jpg" in str(error)


def test_an_image_that_is_too_large(tmp_path, monkeypatch):
    Image.new("L", (60, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"a\.png: is larger than .* megapixels; cut it"):
        files.read_image(tmp_path / "a.png")


def test_a_name_that_no_text_can_hold():
    files.need_utf8(Path("ein Haus/日本.jpg"))
    with pytest.raises(UserError, match=r"caf.udce9\.jpg.*rename it"):
        files.need_utf8(Path("caf\udce9.jpg"))


def test_a_jpeg_is_decoded_small_where_less_is_needed(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    picture, stored = files.open_image(tmp_path / "a.jpg", lambda height, width: (100, 133))
    assert stored == (480, 640) and picture.size == (160, 120)


def test_labels_are_looked_up_in_the_table(tmp_path):
    table = data.value_table({7: 0, 9: 1, 0: 255, 255: 255})
    path = trees.save(tmp_path / "label.png", np.array([[7, 9], [0, 255]], np.uint8))
    assert files.read_label(path, table).tolist() == [[0, 1], [255, 255]]
    for bits in (np.uint8, np.uint16):
        trees.save(path, np.array([[7, 8], [0, 255]], bits))
        with pytest.raises(UserError, match=r"label.png: holds the value 8.* 0 to 9 by decree,"):
            files.read_label(path, table, origin=" by decree")
    trees.save(path, np.array([[7, 256 + 7]], np.uint16))  # no wrap-around
    with pytest.raises(UserError, match="the value 263"):
        files.read_label(path, table)
    trees.save(path, np.array([[7, 9]], np.uint8))
    with pytest.raises(UserError, match="is 2x1 but its image is 5x1"):
        files.read_label(path, table, size=(1, 5))


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    files.atomic_write(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        files.atomic_write(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match=r"file: cannot be written .disk full.; .* is unchanged"):
        files.write(path, fail)
    assert path.read_bytes() == b"old"


def test_write_makes_the_folder_or_says_why_not(tmp_path):
    files.write_json(tmp_path / "a" / "b" / "c.json", {"path": Path("x"), "number": 1})
    assert json.loads((tmp_path / "a/b/c.json").read_text()) == {"path": "x", "number": 1}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/c\.json: cannot be written"):
        files.write_json(tmp_path / "file" / "c.json", [])
    files.write_cache(tmp_path / "file" / "c", lambda file: file.write(b"x"))  # costs only time


def test_a_link_stays_and_what_is_no_regular_file_is_written_in_place(tmp_path):
    """`--json /dev/stdout` must not turn the device into a file."""
    (tmp_path / "disk2").mkdir()
    (tmp_path / "disk2/old.json").write_text("old")
    (tmp_path / "link.json").symlink_to("disk2/old.json")
    files.write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "disk2/old.json").read_text() == "1\n"
    assert [path.name for path in (tmp_path / "disk2").iterdir()] == ["old.json"]
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_json(tmp_path / "pipe", 2)
    assert os.read(reader, 9) == b"2\n" and not (tmp_path / "pipe").is_file()
    os.close(reader)
    program = "from inputs.files import write_json; print('before', flush=True)\n"
    program += "write_json('/dev/stdout', 3); print('after')"
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=log, check=True)
    assert sorted((tmp_path / "log").read_text().split()) == ["3", "after", "before"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop: cannot be written"):
        files.write_json(tmp_path / "loop", 4)


def test_only_regular_files_of_our_formats_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    for read in (files.open_image, files.read_palette, files.read_bytes):
        with pytest.raises(UserError, match=r"pipe\.png: is not a regular file"):
            read(tmp_path / "pipe.png")
    Image.new("RGB", (40, 48)).save(tmp_path / "photo.eps")
    (tmp_path / "photo.eps").rename(tmp_path / "photo.jpg")  # Pillow would start Ghostscript
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match=r"photo\.jpg: not an image that can be read"):
        files.read_image(tmp_path / "photo.jpg")
    assert not (tmp_path / "started").exists()


def test_texts_are_utf8(tmp_path):
    (tmp_path / "a.txt").write_text("Stra\u00dfe\n", "utf-8-sig")
    assert files.read_text(tmp_path / "a.txt") == "Stra\u00dfe\n"
    for encoding in ("latin-1", "utf-16", "utf-16-le"):
        (tmp_path / "a.txt").write_bytes("Stra\u00dfe".encode(encoding))
        with pytest.raises(UserError, match=r"a\.txt: is not a text file in UTF-8"):
            files.read_text(tmp_path / "a.txt")
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"a\.json: is not a JSON file"):
        files.read_json(tmp_path / "a.json")


# ------------------------------------------------------------------------- masks by their meaning
TABLE = data.value_table({i: i for i in (*range(8), 255)})


def as_png(image: Image.Image, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file


@settings(max_examples=80, deadline=None)
@given(
    label=arrays(np.uint8, (3, 4), elements=st.sampled_from([*range(8), 255])),
    seed=st.integers(0, 2**32 - 1),
    rewritten=st.sampled_from(["grey", "greys as a palette", "16 bits", "RGB", "palette"]),
)
def test_a_rewritten_mask_is_read_by_its_meaning(tmp_path_factory, label, seed, rewritten):
    """Index PNGs as optipng and ImageMagick rewrite them: palettes reordered and shortened."""
    colours = np.array([*voc_palette(8), *[(0, 0, 0)] * 247, (224, 224, 192)], np.uint8)
    meaning = {files.pack_colour(*map(int, colours[i])): i for i in (*range(8), 255)}
    values = np.random.default_rng(seed).permutation(np.unique(label))
    place = np.zeros(256, np.uint8)
    place[values] = np.arange(len(values))
    if rewritten == "grey":
        image, meaning = Image.fromarray(label), None
    elif rewritten == "16 bits":
        image, meaning = Image.fromarray(label.astype(np.uint16)), None
    elif rewritten == "RGB":
        image = Image.fromarray(colours[label])
    else:
        image = Image.fromarray(place[label])
        greys = rewritten == "greys as a palette"
        palette = np.repeat(values[:, None], 3, axis=1) if greys else colours[values]
        image.putpalette(palette.astype(np.uint8).tobytes())
        meaning = None if greys else meaning
    path = tmp_path_factory.getbasetemp() / "mask.png"
    path.write_bytes(as_png(image).getvalue())
    assert np.array_equal(files.read_label(path, TABLE, colours=meaning), label)


def test_a_palette_with_one_grey_for_two_numbers_is_refused(tmp_path):
    trees.save(tmp_path / "mask.png", np.array([[0, 1]], np.uint8), [0] * 768)
    with pytest.raises(UserError, match=r"mask\.png: its palette has one grey for two numbers"):
        files.read_label(tmp_path / "mask.png", TABLE)


def test_bits_of_a_grey_mask(tmp_path):
    """Grey PNGs of fewer bits hold 0 to white: 1 of 3 is the grey 85, which is not a class. White
    of one bit is 255 by the standard, but many programs mean 1."""
    Image.fromarray(np.eye(4) > 0).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png: is a 1-bit mask"):
        files.read_label(tmp_path / "mask.png", TABLE)
    Image.fromarray(np.zeros((4, 4)) > 0).save(tmp_path / "mask.png")
    assert (files.read_label(tmp_path / "mask.png", TABLE) == 0).all()
    header = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0\x1b")), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        crc = struct.pack(">I", zlib.crc32(name + content))
        png += struct.pack(">I", len(content)) + name + content + crc
    (tmp_path / "mask.png").write_bytes(png)
    with pytest.raises(UserError, match="holds the value 85, which is not a class"):
        files.read_label(tmp_path / "mask.png", TABLE)


def test_stamp_notices_a_replaced_file_of_the_same_size_and_time(tmp_path):
    image, label = tmp_path / "image", tmp_path / "label"
    image.write_bytes(b"12")
    label.write_bytes(b"123")
    os.utime(label, (315532800, 315532800))
    before = files.stamp(str(image), str(label))
    assert files.stamp(str(image), None) == before[:1]
    assert files.stamp(str(image), str(label)) == before
    label.unlink()
    label.write_bytes(b"321")
    os.utime(label, (315532800, 315532800))
    after = files.stamp(str(image), str(label))
    assert after[0] == before[0] and after[1][:2] == before[1][:2] and after[1] != before[1]
    image.unlink()
    with pytest.raises(UserError, match="image: cannot be read"):
        files.stamp(str(image), str(label))

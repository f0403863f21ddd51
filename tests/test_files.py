"""Any kind of picture is read upright and in RGB, what is damaged is named, files are whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import trees
from inputs import files, transforms
from inputs.errors import UserError

SIXTEEN_BIT = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)


@pytest.fixture
def read(tmp_path):
    """Writes a picture under a name and reads it: uint8 [H, W, 3]."""

    def save_and_read(name: str, picture: Image.Image, **options) -> np.ndarray:
        picture.save(tmp_path / name, **options)
        image = files.read_image(tmp_path / name)
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        return image.permute(1, 2, 0).numpy()

    return save_and_read


def test_any_kind_of_picture(read):
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
def test_floats_that_are_no_numbers_are_black(read):
    values = np.array([[0.0, 2.0, np.nan, np.inf]], np.float32)
    assert read("float.tif", Image.fromarray(values))[0, :, 0].tolist() == [0, 255, 0, 0]


def test_a_mask_of_the_unturned_picture_is_called_so(tmp_path):
    trees.save(tmp_path / "a.png", np.zeros((4, 6), np.uint8))
    table = np.arange(256, dtype=np.uint8)
    with pytest.raises(UserError, match=r"one size; the image as its EXIF data turn it$"):
        files.read_label(tmp_path / "a.png", table, size=(6, 4))
    with pytest.raises(UserError, match=r"one size$"):
        files.read_label(tmp_path / "a.png", table, size=(6, 5))


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
    exif[files.EXIF_ORIENTATION], exif[0x010E] = 6, "a description of the picture"
    content = exif.tobytes()
    for end in range(8, len(content), 3):
        Image.new("RGB", (12, 8)).save(tmp_path / "a.jpg", exif=content[:end])
        try:
            assert files.read_image(tmp_path / "a.jpg").shape in ((3, 8, 12), (3, 12, 8))
        except UserError as error:
            assert "a.jpg" in str(error)


def test_a_picture_that_is_too_large_is_called_so(tmp_path, monkeypatch):
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
    with pytest.raises(UserError, match=r"file: cannot be written .disk full.; .* is whole"):
        files.write(path, fail)
    assert path.read_bytes() == b"old"


def test_write_makes_the_folder_or_says_why_not(tmp_path):
    files.write_json(tmp_path / "a" / "b" / "c.json", {"path": Path("x"), "number": 1})
    assert json.loads((tmp_path / "a/b/c.json").read_text()) == {"path": "x", "number": 1}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/c\.json: cannot be written"):
        files.write_json(tmp_path / "file" / "c.json", [])
    files.write_cache(tmp_path / "file" / "c", lambda file: file.write(b"x"))  # costs only time


def test_stamp_follows_the_files(tmp_path):
    image, label = tmp_path / "image", tmp_path / "label"
    image.write_bytes(b"12")
    label.write_bytes(b"123")
    before = files.stamp(str(image), str(label))
    assert [size for size, _ in before] == [2, 3] and files.stamp(str(image), None) == before[:1]
    label.write_bytes(b"1234")
    assert files.stamp(str(image), str(label))[1] != before[1]
    image.unlink()
    with pytest.raises(UserError, match="image: cannot be read"):
        files.stamp(str(image), str(label))

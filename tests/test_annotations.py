"""The examples that bring COCO and labelme annotations into the layout of --dataset folder."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import trees

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def start(script: str, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def convert(script: str, *words) -> str:
    done = start(script, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(script: str, *words) -> str:
    done = start(script, *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def labels(out: Path, split: str) -> dict[str, np.ndarray]:
    return {path.stem: trees.raw(path) for path in (out / "labels" / split).iterdir()}


@pytest.fixture
def photos(tmp_path):
    for name in ("a", "b", "c"):
        trees.save(tmp_path / "photos" / f"{name}.jpg", np.full((20, 30, 3), 99, np.uint8))
    return tmp_path / "photos"


# ---------------------------------------------------------------------------------------- COCO
CATEGORIES = [
    {"id": 7, "name": "person", "supercategory": "person"},
    {"id": 3, "name": "car", "supercategory": "vehicle"},
]


def rectangle(x: int, y: int, width: int, height: int) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def coco_file(path: Path, annotations: list[dict]) -> Path:
    images = [
        {"id": i, "file_name": f"{name}.jpg", "height": 20, "width": 30, "license": 1}
        for i, name in enumerate("abc", start=1)
    ]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    path.write_text(json.dumps({"info": {"year": 2026}, "licenses": [], **content}))
    return path


@pytest.fixture
def instances(tmp_path):
    rle = {"size": [20, 30], "counts": [0, 20, 580]}  # column by column: the first one
    return coco_file(
        tmp_path / "instances.json",
        [
            dict(id=1, image_id=1, category_id=7, iscrowd=0, area=16, bbox=[2, 2, 4, 4])
            | dict(segmentation=[rectangle(2, 2, 4, 4)]),
            dict(id=2, image_id=1, category_id=3, iscrowd=0, area=100, bbox=[0, 0, 10, 10])
            | dict(segmentation=[rectangle(0, 0, 10, 10)]),
            dict(id=3, image_id=2, category_id=3, iscrowd=1, area=20, bbox=[0, 0, 1, 20])
            | dict(segmentation=rle),
        ],
    )


def test_coco_instances(instances, photos, tmp_path):
    trees.save(photos / "more" / "d.jpg", np.full((20, 30, 3), 99, np.uint8))
    told = convert("from_coco.py", instances, photos, tmp_path / "out")
    assert "photos: 1 more are not in the JSON" in told
    assert "90% of their pixels are not labelled; --background" in told  # 83 % of a, 97 % of b
    assert (tmp_path / "out" / "classes.txt").read_text() == "car\nperson\n"
    found = labels(tmp_path / "out", "train")
    assert sorted(found) == ["a", "b"]  # c has no annotation: unlabelled
    assert found["a"].shape == (20, 30) and found["a"][15, 15] == 255
    assert found["a"][8, 8] == 0 and found["a"][4, 4] == 1  # the smaller one is on top
    assert (found["b"][:, 0] == 0).all() and (found["b"][:, 1:] == 255).all()
    assert "2 labelled pictures in train, 1 unlabelled" in told


def test_coco_pictures_without_annotations(instances, photos, tmp_path):
    """Nobody may have looked at them: a background is no label of theirs unless one says so."""
    words = [instances, photos, tmp_path / "out", "--background", "nothing", "--split"]
    told = convert("from_coco.py", *words, "train")
    assert "2 labelled pictures in train, 1 unlabelled" in told and "--empty-is-back" in told
    assert "not labelled" not in told and "not in the JSON" not in told
    told = convert("from_coco.py", *words, "val")
    assert "2 labelled pictures in val, 1 left out" in told
    source = data.load_source("folder", str(tmp_path / "out"))
    assert source.classes == ["nothing", "car", "person"]
    assert [bool(s.label) for s in source.train] == [True, True, False] and len(source.val) == 2
    told = convert("from_coco.py", *words, "val", "--empty-is-background")
    assert "3 labelled pictures in val, 0 left out" in told and "if those" not in told
    source = data.load_source("folder", str(tmp_path / "out"))
    assert len(source.val) == 3 and (source.read(source.val[2])[1] == 0).all()
    words = [instances, photos, tmp_path / "new", "--empty-is-background"]
    assert "without --background" in refusal("from_coco.py", *words)


def test_coco_panoptic(photos, tmp_path):
    segments = np.zeros((20, 30, 3), np.uint8)
    segments[:10] = (44, 1, 0)  # id 300
    segments[10:, :5] = (1, 2, 3)  # id 197121
    trees.save(tmp_path / "panoptic" / "a.png", segments)
    info = [{"id": 300, "category_id": 3}, {"id": 197121, "category_id": 7}]
    annotation = {"image_id": 1, "file_name": "a.png", "segments_info": info}
    file = coco_file(tmp_path / "panoptic.json", [annotation])
    convert("from_coco.py", file, photos, tmp_path / "out")
    found = labels(tmp_path / "out", "train")["a"]
    assert (found[:10] == 0).all() and (found[10:, :5] == 1).all() and (found[10:, 5:] == 255).all()
    told = refusal("from_coco.py", file, photos, tmp_path / "x", "--panoptic", tmp_path / "none")
    assert "none/a.png" in told


def test_odd_coco_files(instances, photos, tmp_path):
    (tmp_path / "odd.json").write_text('{"images": []}')
    assert "is no COCO file" in refusal("from_coco.py", tmp_path / "odd.json", photos, tmp_path)
    assert "none.json" in refusal("from_coco.py", tmp_path / "none.json", photos, tmp_path)
    odd = coco_file(tmp_path / "odd.json", [{"id": 1, "image_id": 1, "category_id": 9}])
    assert "the category 9" in refusal("from_coco.py", odd, photos, tmp_path / "out")
    one = json.loads(instances.read_text())
    one |= {"categories": CATEGORIES[1:], "annotations": one["annotations"][1:]}
    (tmp_path / "one.json").write_text(json.dumps(one))
    assert "--background NAME" in refusal("from_coco.py", tmp_path / "one.json", photos, tmp_path)
    (photos / "b.jpg").unlink()
    assert "b.jpg" in refusal("from_coco.py", instances, photos, tmp_path / "out")
    (tmp_path / "out" / "classes.txt").write_text("other\nnames\n")
    assert "classes.txt" in refusal("from_coco.py", instances, photos, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["images"][0].pop("height"), "of a.jpg cannot be painted (KeyError"),
        (lambda c: c["annotations"][0].pop("image_id"), "is no COCO file (KeyError"),
        (lambda c: c["annotations"][0].update(segmentation=[[]]), "of a.jpg cannot be painted"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), "of a.jpg cannot be painted"),
        (lambda c: c["images"][1].update(id=1), "two of its pictures have the same id"),
        (lambda c: c["categories"][0].update(id="3"), "is no COCO file (TypeError"),
        (lambda c: c["categories"][0].update(name="car"), "two classes are called car"),
        (lambda c: c["categories"][0].update(name="#1 car"), "'#1 car' cannot be the name"),
        (lambda c: c["categories"][0].update(name=" car"), "' car' cannot be the name"),
    ],
)
def test_odd_entries_of_a_coco_file(instances, photos, tmp_path, change, told):
    content = json.loads(instances.read_text())
    change(content)
    instances.write_text(json.dumps(content))
    assert told in refusal("from_coco.py", instances, photos, tmp_path / "out")


def test_what_other_programs_write_into_a_coco_file(instances, photos, tmp_path):
    """A mark before the text and backslashes (Windows), no area, one id for all annotations, one of
    a picture that is not listed."""
    content = json.loads(instances.read_text())
    for image in content["images"]:
        image["file_name"] = f"more\\{image['file_name']}"
    for one in content["annotations"]:
        one |= {"id": 1, "area": None}
    content["annotations"].append(content["annotations"][1] | {"image_id": 9})
    instances.write_text(json.dumps(content), encoding="utf-8-sig")
    (tmp_path / "all").mkdir()
    photos.rename(tmp_path / "all" / "more")
    convert("from_coco.py", instances, tmp_path / "all", tmp_path / "out", "--background", "car")
    assert (tmp_path / "out" / "classes.txt").read_text() == "car\nperson\n"  # a category's name
    found = labels(tmp_path / "out", "train")
    assert (found["a"] == 1).sum() == 0 and (found["b"] == 0).all()


def test_coco_pictures_of_one_name(instances, tmp_path):
    """In folders of their own they get names that tell them apart; else they are refused."""
    content = json.loads(instances.read_text())
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "day/1.jpg", "dusk/1.jpg"
    instances.write_text(json.dumps(content))
    for name in ("day/1.jpg", "dusk/1.jpg", "c.jpg"):
        trees.save(tmp_path / "photos" / name, np.full((20, 30, 3), 99, np.uint8))
    convert("from_coco.py", instances, tmp_path / "photos", tmp_path / "out")
    pictures = {path.name for path in (tmp_path / "out" / "images" / "train").iterdir()}
    assert pictures == {"day_1.jpg", "dusk_1.jpg", "c.jpg"}
    found = labels(tmp_path / "out", "train")
    assert sorted(found) == ["day_1", "dusk_1"] and (found["dusk_1"][:, 0] == 0).all()
    content["images"][1]["file_name"] = "day/1.png"
    instances.write_text(json.dumps(content))
    told = refusal("from_coco.py", instances, tmp_path / "photos", tmp_path / "new")
    assert "day/1.jpg and day/1.png" in told and not (tmp_path / "new").exists()


def test_pictures_may_lie_where_they_go(instances, photos, tmp_path):
    """docs/own_data.md makes that folder first."""
    there = tmp_path / "out" / "images" / "train"
    there.mkdir(parents=True)
    for photo in photos.iterdir():
        photo.rename(there / photo.name)
    convert("from_coco.py", instances, there, tmp_path / "out")
    assert sorted(labels(tmp_path / "out", "train")) == ["a", "b"]
    (tmp_path / "out" / "classes.txt").unlink()
    labelme_file(there / "a.json", shape("car", [[0, 0], [9, 0], [9, 9]], "polygon"))
    (there / "._a.json").write_text("a Mac wrote this")
    convert("from_labelme.py", there, tmp_path / "out", "--background", "nothing")
    assert labels(tmp_path / "out", "train")["a"][1, 5] == 1
    trees.save(there / "a.png", np.zeros((20, 30, 3), np.uint8))
    assert "a.jpg and a.png" in refusal("from_labelme.py", there, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refusal("from_coco.py", instances, there, tmp_path / "file")


# ------------------------------------------------------------------------------------- labelme
def shape(label: str, points: list, kind: str = "polygon", **more) -> dict:
    own = {"group_id": None, "description": "", "flags": {}, "mask": None}
    return {"label": label, "points": points, "shape_type": kind, **own, **more}


def labelme_file(path: Path, *shapes: dict) -> None:
    head = {"version": "5.5.0", "flags": {}, "imagePath": f"{path.stem}.jpg", "imageData": None}
    size = {"imageHeight": 20, "imageWidth": 30}
    path.write_text(json.dumps({**head, "shapes": shapes, **size}, indent=2))


def test_labelme(photos, tmp_path):
    mask = io.BytesIO()
    Image.fromarray(np.full((3, 4), True)).save(mask, "PNG")
    labelme_file(
        photos / "a.json",
        shape("road", [[0, 10], [29, 10], [29, 19], [0, 19]]),
        shape("car", [[5, 15], [2, 12]], "rectangle"),
        shape("car", [[20, 15], [20, 17]], "circle"),
        shape("sign", [[10, 2], [13, 4]], "mask", mask=base64.b64encode(mask.getvalue()).decode()),
        shape("__ignore__", [[25, 15]], "point"),
        shape("sign", [[0, 0], [29, 0]], "line"),
    )
    labelme_file(photos / "b.json", shape("car", [[0, 0], [9, 0], [9, 9], [0, 9]], "polygon"))
    convert("from_labelme.py", photos, tmp_path / "out", "--width", "1")
    out = tmp_path / "out"
    assert (out / "classes.txt").read_text() == "car\nroad\nsign\n"
    found = labels(out, "train")
    assert sorted(found) == ["a", "b"] and (out / "images" / "train" / "c.jpg").exists()
    a = found["a"]
    assert a[19, 0] == a[10, 29] == 1 and a[12, 2] == a[15, 5] == a[17, 20] == 0
    assert (a[2:5, 10:14] == 2).all() and a[5, 10] == 255 and (a[0] == 2).all()
    assert a[15, 25] == 255 and a[18, 28] == 1

    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\nsign\nroad\ncar\nbus\n")
    words = ["--labels", tmp_path / "labels.txt", "--background", "_background_"]
    convert("from_labelme.py", photos, tmp_path / "two", "--split", "val", *words)
    names = (tmp_path / "two" / "classes.txt").read_text().split()
    assert names == ["_background_", "sign", "road", "car", "bus"]
    b = labels(tmp_path / "two", "val")["b"]
    assert b[5, 5] == 3 and b[15, 15] == 0
    assert not (tmp_path / "two" / "images" / "val" / "c.jpg").exists()  # without a label


def test_a_labelme_split_may_lack_a_class(photos, tmp_path):
    labelme_file(photos / "a.json", shape("car", [[0, 0], [9, 0], [9, 9]], "polygon"))
    labelme_file(photos / "b.json", shape("bus", [[0, 0], [9, 0], [9, 9]], "polygon"))
    words = ["--background", "nothing"]
    convert("from_labelme.py", photos, tmp_path / "out", *words)
    (photos / "b.json").unlink()
    convert("from_labelme.py", photos, tmp_path / "out", "--split", "val", *words)
    assert (tmp_path / "out" / "classes.txt").read_text() == "nothing\nbus\ncar\n"
    assert labels(tmp_path / "out", "val")["a"][1, 5] == 2
    labelme_file(photos / "b.json", shape("tram", [[0, 0], [9, 0], [9, 9]], "polygon"))
    told = refusal("from_labelme.py", photos, tmp_path / "out", "--split", "val", *words)
    assert "classes.txt: lacks tram" in told


def test_odd_labelme_files(photos, tmp_path):
    assert "holds no .json" in refusal("from_labelme.py", photos, tmp_path / "out")
    assert "nowhere" in refusal("from_labelme.py", tmp_path / "nowhere", tmp_path / "out")
    (photos / "a.json").write_text("{}")
    assert "a.json: is no labelme file" in refusal("from_labelme.py", photos, tmp_path / "out")
    labelme_file(photos / "a.json", shape("car", [[0, 0], [3, 3]]), shape("bus", [[1, 1]], "point"))
    told = refusal("from_labelme.py", photos, tmp_path / "out")
    assert "a polygon of 2 points" in told
    sound = (photos / "a.json").read_text()
    (photos / "a.json").write_text(sound.replace('"imageHeight": 20', '"imageHeight": null'))
    assert "a.json: is no labelme file" in refusal("from_labelme.py", photos, tmp_path / "out")
    (photos / "a.json").write_text(sound)
    words = ["--labels", tmp_path / "nowhere.txt"]
    assert "nowhere.txt: cannot be read" in refusal(
        "from_labelme.py", photos, tmp_path / "out", *words
    )
    (tmp_path / "labels.txt").write_bytes("Grün\n".encode("latin-1"))
    words = ["--labels", tmp_path / "labels.txt"]
    assert "labels.txt: is no text" in refusal("from_labelme.py", photos, tmp_path / "out", *words)
    for odd in (
        shape("car", [[0, 0], [3, 3], [None, 1]]),
        shape("car", [[0, 0], [3, 3]], "mask", mask="x"),
    ):
        labelme_file(photos / "a.json", odd, shape("bus", [[1, 1]], "point"))
        told = refusal("from_labelme.py", photos, tmp_path / "drawn")
        assert f"a.json: a {odd['shape_type']} called car cannot be drawn" in told
    (photos / "a.json").write_text(sound)
    (tmp_path / "labels.txt").write_text("car\ntram\n")
    told = refusal("from_labelme.py", photos, tmp_path / "new", "--labels", tmp_path / "labels.txt")
    assert "labels.txt: lacks bus" in told

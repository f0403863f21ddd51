"""The examples that bring COCO and labelme annotations into the layout of --dataset folder."""

import base64
import contextlib
import copy
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import trees

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
rle = pytest.importorskip("pycocotools.mask")
from_coco, from_labelme, own_folder = map(
    importlib.import_module, ("from_coco", "from_labelme", "own_folder")
)

FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def start(script: str, *words) -> tuple[int, str, str]:
    """Status, stdout and stderr of an example, run in this process."""
    main = {"from_coco.py": from_coco.main, "from_labelme.py": from_labelme.main}[script]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    argv, sys.argv = sys.argv, [script, *map(str, words)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            own_folder.launch(main)
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
    for stream in (out, err):
        stream.flush()
    return status, *(stream.buffer.getvalue().decode() for stream in (out, err))


def convert(script: str, *words) -> str:
    status, out, err = start(script, *words)
    assert status == 0, err
    return out


def refusal(script: str, *words) -> str:
    status, _, err = start(script, *words)
    assert status == 2 and len(err.splitlines()) == 1, err
    return err


def files_in(folder: Path) -> dict[str, bytes]:
    """What is below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
    assert "2 labelled images in train, 1 unlabelled" in told


def test_coco_images_without_annotations(instances, photos, tmp_path):
    """Nobody may have looked at them: a background is no label of theirs unless one says so."""
    words = [instances, photos, tmp_path / "out", "--background", "nothing", "--split"]
    told = convert("from_coco.py", *words, "train")
    assert "2 labelled images in train, 1 unlabelled" in told and "--empty-is-back" in told
    assert "not labelled" not in told and "not in the JSON" not in told
    told = convert("from_coco.py", *words, "val")
    assert "2 labelled images in val, 1 left out" in told
    source = data.load_source("folder", str(tmp_path / "out"))
    assert source.classes == ["nothing", "car", "person"]
    assert [bool(s.label) for s in source.train] == [True, True, False] and len(source.val) == 2
    told = convert("from_coco.py", *words, "val", "--empty-is-background")
    assert "3 labelled images in val, 0 left out" in told and "if those" not in told
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
    for change, told in (
        (info[:1], "the segment 197121 is in the PNG or the JSON only"),
        ([*info, {"id": 4, "category_id": 3}], "the segment 4 is in the PNG or the JSON only"),
        ([*info, {"id": "300", "category_id": 3}], "two segments have the id 300"),
    ):
        coco_file(tmp_path / "panoptic.json", [annotation | {"segments_info": change}])
        assert told in refusal("from_coco.py", file, photos, tmp_path / "y")


def test_odd_coco_files(instances, photos, tmp_path):
    (tmp_path / "odd.json").write_text('{"images": []}')
    assert "is not a COCO file" in refusal("from_coco.py", tmp_path / "odd.json", photos, tmp_path)
    assert "none.json" in refusal("from_coco.py", tmp_path / "none.json", photos, tmp_path)
    odd = coco_file(tmp_path / "odd.json", [{"id": 1, "image_id": 1, "category_id": 9}])
    assert "the category 9" in refusal("from_coco.py", odd, photos, tmp_path / "out")
    one = json.loads(instances.read_text())
    one |= {"categories": CATEGORIES[1:], "annotations": one["annotations"][1:]}
    (tmp_path / "one.json").write_text(json.dumps(one))
    assert "--background NAME" in refusal("from_coco.py", tmp_path / "one.json", photos, tmp_path)
    convert("from_coco.py", instances, photos, tmp_path / "out")
    (photos / "b.jpg").unlink()
    assert "b.jpg" in refusal("from_coco.py", instances, photos, tmp_path / "new")
    trees.save(photos / "b.jpg", np.full((30, 20, 3), 99, np.uint8))
    told = refusal("from_coco.py", instances, photos, tmp_path / "new")
    assert "b.jpg: width and height are 30 and 20, those of the file 20 and 30" in told
    (tmp_path / "out" / "classes.txt").write_text("other\nnames\n")
    assert "classes.txt" in refusal("from_coco.py", instances, photos, tmp_path / "out")


def polygon(content: dict, x) -> None:
    content["annotations"][0]["segmentation"] = [[x, 0, 9, 5, 3, 9]]


def run_lengths(content: dict, counts) -> None:
    content["annotations"][2]["segmentation"]["counts"] = counts


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["images"][0].pop("height"), "width and height are 30 and None"),
        (lambda c: c["images"][0].update(file_name=7), "the name 7 is not text"),
        (lambda c: c["images"][0].update(file_name="a\nb.jpg"), "cannot be the name of an image"),
        (lambda c: c["images"][1].update(id=1), "two images have the id 1"),
        (lambda c: c["images"][1].update(id="1"), "two images have the id 1"),
        (lambda c: c["images"][1].update(file_name="./a.jpg"), "both labels would be a.png"),
        (lambda c: c["images"][1].update(file_name="x/b.gif"), "'x/b.gif': is none of .png"),
        (lambda c: c["categories"][0].update(id="3"), "two categories have the id 3"),
        (lambda c: c["categories"][0].update(id=[3]), "the id [3] is odd"),
        (lambda c: c["categories"][0].update(name=3), "the name 3 is not text"),
        (lambda c: c["categories"][0].update(name="car"), "two classes are called car"),
        (lambda c: c["categories"][0].update(name="#1 car"), "'#1 car' cannot be the name"),
        (lambda c: c["categories"][0].update(name=" car"), "' car' cannot be the name"),
        (lambda c: c["annotations"][0].pop("image_id"), "lacks image_id"),
        (lambda c: [a.update(image_id=9) for a in c["annotations"]], "belongs to a listed image"),
        (lambda c: c["annotations"][0].update(segmentation=[]), "boxes do not make masks"),
        (lambda c: c["annotations"][0].update(segmentation=[[]]), "not three points x, y"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), "not three points x, y"),
        (lambda c: c["annotations"][0].update(segmentation="x"), "neither list nor mask"),
        (lambda c: polygon(c, 1e9), "is far from the image of 30x20"),
        (lambda c: polygon(c, float("nan")), "is far from the image of 30x20"),
        (lambda c: polygon(c, 10**400), "is far from the image of 30x20"),
        (lambda c: polygon(c, "3"), "is not two numbers"),
        (lambda c: run_lengths(c, [0, 20]), "do not add up to 30x20"),
        (lambda c: run_lengths(c, [0, 700, -100]), "do not add up to 30x20"),
        (lambda c: run_lengths(c, [0, 20, 580.0]), "do not add up to 30x20"),
        (lambda c: run_lengths(c, "d0"), "do not add up to 30x20"),
        (
            lambda c: run_lengths(c, "oooooooooooooooooooooooo"),
            "b.jpg: the run lengths of a mask are",
        ),
        (lambda c: run_lengths(c, None), "b.jpg: a mask has no run lengths"),
        (lambda c: c["annotations"][2]["segmentation"].update(size=[30, 20]), "another size"),
    ],
)
def test_odd_entries_of_a_coco_file(instances, photos, tmp_path, change, told):
    content = json.loads(instances.read_text())
    change(content)
    instances.write_text(json.dumps(content))
    assert told in refusal("from_coco.py", instances, photos, tmp_path / "out")


def test_what_other_programs_write_into_a_coco_file(instances, photos, tmp_path):
    """A mark before the text and backslashes (Windows), no area, one id for all annotations, one of
    an image that is not listed, ids as text (VIA)."""
    content = json.loads(instances.read_text())
    for image in content["images"]:
        image["file_name"] = f"more\\{image['file_name']}"
    for one in content["annotations"]:
        one |= {"id": 1, "area": None, "image_id": str(one["image_id"])}
    content["annotations"].append(content["annotations"][1] | {"image_id": 9})
    instances.write_text(json.dumps(content), encoding="utf-8-sig")
    (tmp_path / "all").mkdir()
    photos.rename(tmp_path / "all" / "more")
    words = [instances, tmp_path / "all", tmp_path / "out", "--background", "car"]
    told = convert("from_coco.py", *words)
    assert "1 annotations belong to no listed image (9 ...)" in told
    assert (tmp_path / "out" / "classes.txt").read_text() == "car\nperson\n"  # a category's name
    found = labels(tmp_path / "out", "train")
    assert (found["a"] == 1).sum() == 16 and (found["b"] == 0).all()  # the smaller one is on top


def test_coco_images_of_one_name(instances, tmp_path):
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


def test_no_name_leads_out_of_the_folder(instances, tmp_path):
    """Absolute paths, also of another computer, and paths through parents."""
    content = json.loads(instances.read_text())
    for i, (name, place) in enumerate(
        (
            (tmp_path / "day/1.jpg", "day/1.jpg"),
            ("../dusk/1.jpg", "dusk/1.jpg"),
            ("C:\\Users\\me\\c.jpg", "photos/c.jpg"),
        )
    ):
        content["images"][i]["file_name"] = str(name)
        trees.save(tmp_path / place, np.full((20, 30, 3), i, np.uint8))
    instances.write_text(json.dumps(content))
    before = {*files_in(tmp_path)}
    convert("from_coco.py", instances, tmp_path / "photos", tmp_path / "out")
    new = {*files_in(tmp_path)} - before
    stem = "_".join((*tmp_path.parts[1:], "day", "1"))
    images = {f"out/images/train/{n}.jpg" for n in (stem, "dusk_1", "Users_me_c")}
    assert images < new and all(name.startswith("out/") for name in new) and len(new) == 6


def test_images_may_be_where_they_go(instances, photos, tmp_path):
    """docs/own_data.md makes that folder first."""
    there = tmp_path / "out" / "images" / "train"
    there.mkdir(parents=True)
    for photo in photos.iterdir():
        photo.rename(there / photo.name)
    convert("from_coco.py", instances, there, tmp_path / "out")
    assert sorted(labels(tmp_path / "out", "train")) == ["a", "b"]
    labelme_file(there / "a.json", shape("car", [[0, 0], [9, 0], [9, 9]], "polygon"))
    (there / "._a.json").write_text("a Mac wrote this")
    (tmp_path / "out/labels/train/a.png").unlink()
    convert("from_labelme.py", there, tmp_path / "out")
    assert labels(tmp_path / "out", "train")["a"][1, 5] == 0
    trees.save(there / "a.png", np.zeros((20, 30, 3), np.uint8))
    assert "a.jpg and a.png" in refusal("from_labelme.py", there, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    (there / "a.png").unlink()
    assert "cannot be written" in refusal("from_coco.py", instances, there, tmp_path / "file")


@pytest.mark.parametrize("kind", ["images/train/a.jpg", "images/train/a.png", "labels/train/b.png"])
def test_nothing_in_the_folder_is_replaced(instances, photos, tmp_path, kind):
    """An image or a corrected mask of that name; the same files may be there."""
    out = tmp_path / "out"
    convert("from_coco.py", instances, photos, out)
    before = files_in(out)
    convert("from_coco.py", instances, photos, out)
    assert files_in(out) == before
    if kind.endswith("a.png"):
        (out / "images/train/a.jpg").unlink()
    trees.save(out / kind, np.full((20, 30), 1, np.uint8))
    before = files_in(out)
    told = refusal("from_coco.py", instances, photos, out)
    assert kind in told and files_in(out) == before


@FEW
@given(st.data())
def test_coco_masks_hold_what_the_file_says(tmp_path_factory, data):
    """Boxes as polygons, run lengths or compressed ones, whatever their area and ids look like."""
    tmp = tmp_path_factory.mktemp("coco")
    height, width = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    draw = data.draw
    boxes = {}  # by area, so that no two are equal
    for _ in range(draw(st.integers(1, 5))):
        x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        w, h = draw(st.integers(1, width - x)), draw(st.integers(1, height - y))
        boxes[w * h] = (x, y, w, h, draw(st.sampled_from([3, 7])))
    expected, annotations = np.full((height, width), 255, np.uint8), []
    for _, (x, y, w, h, category) in sorted(boxes.items(), reverse=True):
        mask = np.zeros((height, width), np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        expected[mask > 0] = [3, 7].index(category)
        packed = rle.encode(mask)["counts"].decode()
        flat = mask.ravel("F").astype(int)
        edges = np.flatnonzero(np.diff(flat, prepend=0))
        runs = np.diff([0, *edges, flat.size]).tolist()
        forms = [[rectangle(x, y, w, h)]] + [
            {"size": [height, width], "counts": c} for c in (packed, runs)
        ]
        annotations.append(
            {
                "image_id": draw(st.sampled_from([5, "5"])),
                "category_id": draw(st.sampled_from([category, str(category)])),
                "segmentation": draw(st.sampled_from(forms)),
                "area": draw(st.sampled_from([0, None, "9", 1e9])),
            }
        )
    image = {"id": 5, "file_name": "a.png", "height": height, "width": width}
    content = {"images": [image], "categories": CATEGORIES}
    content["annotations"] = draw(st.permutations(annotations))
    (tmp / "coco.json").write_text(json.dumps(content))
    trees.save(tmp / "in/a.png", np.zeros((height, width, 3), np.uint8))
    convert("from_coco.py", tmp / "coco.json", tmp / "in", tmp / "out")
    assert np.array_equal(labels(tmp / "out", "train")["a"], expected)


ODD = [None, True, -1, 0, 2, 1e308, -1e9, float("nan"), 10**30, [], {}, [[]], [1, 2], {"id": 1}]
ODD += ["", "x", "../../x.jpg", "/x.jpg", "C:\\x.jpg", "b.jpg", "a\nb", "\ud800", "a\0", "x" * 3000]


def places(value, path=()) -> list[tuple]:
    """The path to each value in a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in inside:
        found.append((*path, key))
        if isinstance(child, dict | list):
            found += places(child, (*path, key))
    return found


def mutated(data, content):
    """The document with some of its values replaced by odd ones."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(places(content)))
        inside = content
        for key in path:
            inside = inside[key]
        inside[last] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    return content


def sound_or_one_line(script: str, out: Path, *words) -> None:
    """Every outcome but a traceback; nothing is written elsewhere, and what is written can be
    read."""
    parent = files_in(out.parent)
    status, _, err = start(script, *words)
    assert status == 0 or (status == 2 and len(err.splitlines()) == 1), err
    assert parent == {n: c for n, c in files_in(out.parent).items() if not n.startswith("out/")}
    for label in out.glob("labels/train/*.png"):
        values = {*np.unique(trees.raw(label)).tolist()} - {255}
        assert values <= {*range(len((out / "classes.txt").read_text().splitlines()))}


@FEW
@given(st.data())
def test_any_coco_file_is_converted_or_refused(instances, photos, tmp_path_factory, data):
    tmp = tmp_path_factory.mktemp("coco")
    (tmp / "coco.json").write_text(json.dumps(mutated(data, json.loads(instances.read_text()))))
    sound_or_one_line("from_coco.py", tmp / "out", tmp / "coco.json", photos, tmp / "out")


# ------------------------------------------------------------------------------------- labelme
def shape(label: str, points: list, kind: str = "polygon", **more) -> dict:
    own = {"group_id": None, "description": "", "flags": {}, "mask": None}
    return {"label": label, "points": points, "shape_type": kind, **own, **more}


def labelme_file(path: Path, *shapes: dict) -> None:
    head = {"version": "5.5.0", "flags": {}, "imagePath": f"{path.stem}.jpg", "imageData": None}
    size = {"imageHeight": 20, "imageWidth": 30}
    path.write_text(json.dumps({**head, "shapes": shapes, **size}, indent=2))


def as_base64(mask: np.ndarray) -> str:
    """As labelme writes it: a PNG."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("kind", [bool, np.uint8, "white"])
def test_labelme_masks(photos, tmp_path, kind):
    """labelme 5 and 6 write grey 0 and 1 (mask.astype(np.uint8)), others black and white."""
    patch = np.ones((10, 15), bool)
    patch[:3, :4] = False
    values = patch.astype(np.uint8) * 255 if kind == "white" else patch.astype(kind)
    cell = shape("cell", [[5, 8], [19, 17]], "mask", mask=as_base64(values))
    labelme_file(photos / "a.json", cell)
    convert("from_labelme.py", photos, tmp_path / "out", "--background", "nothing")
    expected = np.zeros((20, 30), np.uint8)
    expected[8:18, 5:20] = patch
    assert np.array_equal(labels(tmp_path / "out", "train")["a"], expected)
    labelme_file(photos / "a.json", cell | {"points": [[5, 8], [18, 17]]})
    told = refusal("from_labelme.py", photos, tmp_path / "new", "--background", "nothing")
    assert "a.json: a mask is not of the size of its box" in told


@pytest.mark.parametrize("path", ["C:\\Users\\me\\a.jpg", "/home/me/a.jpg", "../photos/a.jpg"])
def test_labelme_files_that_were_moved(photos, tmp_path, path):
    labelme_file(photos / "a.json", shape("car", [[0, 0], [9, 0], [9, 9]]))
    content = json.loads((photos / "a.json").read_text()) | {"imagePath": path}
    (photos / "a.json").write_text(json.dumps(content))
    convert("from_labelme.py", photos, tmp_path / "out", "--background", "nothing")
    images = sorted(image.name for image in (tmp_path / "out/images/train").iterdir())
    assert images == ["a.jpg", "b.jpg", "c.jpg"]


@FEW
@given(st.data())
def test_any_labelme_file_is_converted_or_refused(photos, tmp_path_factory, data):
    tmp = tmp_path_factory.mktemp("labelme")
    box = shape("sign", [[10, 2], [13, 4]], "mask", mask=as_base64(np.ones((3, 4), np.uint8)))
    car = shape("car", [[5, 15], [2, 12]], "rectangle")
    labelme_file(tmp / "sound.json", box, car, shape("road", [[0, 10], [29, 10], [29, 19]]))
    content = json.loads((tmp / "sound.json").read_text()) | {"imagePath": "a.jpg"}
    (tmp / "in").mkdir()
    (tmp / "in/a.json").write_text(json.dumps(mutated(data, content)))
    for photo in photos.glob("*.jpg"):
        os.link(photo, tmp / "in" / photo.name)
    sound_or_one_line("from_labelme.py", tmp / "out", tmp / "in", tmp / "out")


def test_an_ascii_terminal(photos, tmp_path):
    """On the command line, as a Windows code page or a log may be."""
    labelme_file(photos / "a.json", shape("car", [[0, 0], [9, 0], [9, 9]]))
    out = tmp_path / "H\u00e4user"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "from_labelme.py", photos, out, "--background", "nothing"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert "H\\xe4user: 1 annotated images in train, 2 others" in done.stdout


def test_labelme(photos, tmp_path):
    labelme_file(
        photos / "a.json",
        shape("road", [[0, 10], [29, 10], [29, 19], [0, 19]]),
        shape("car", [[5, 15], [2, 12]], "rectangle"),
        shape("car", [[20, 15], [20, 17]], "circle"),
        shape("sign", [[10, 2], [13, 4]], "mask", mask=as_base64(np.ones((3, 4), np.uint8))),
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
    assert "classes.txt: lacks 'tram'" in told


def test_odd_labelme_files(photos, tmp_path):
    assert "holds no .json" in refusal("from_labelme.py", photos, tmp_path / "out")
    assert "nowhere" in refusal("from_labelme.py", tmp_path / "nowhere", tmp_path / "out")
    (photos / "a.json").write_text("{}")
    assert "a.json: is not a labelme file" in refusal("from_labelme.py", photos, tmp_path / "out")
    labelme_file(photos / "a.json", shape("car", [[0, 0], [3, 3]]), shape("bus", [[1, 1]], "point"))
    told = refusal("from_labelme.py", photos, tmp_path / "out")
    assert "a polygon of 2 points" in told
    sound = (photos / "a.json").read_text()
    (photos / "a.json").write_text(sound.replace('"imageHeight": 20', '"imageHeight": null'))
    assert "a.json: is not a labelme file" in refusal("from_labelme.py", photos, tmp_path / "out")
    (photos / "a.json").write_text(sound)
    words = ["--labels", tmp_path / "nowhere.txt"]
    assert "nowhere.txt: no such file" in refusal(
        "from_labelme.py", photos, tmp_path / "out", *words
    )
    (tmp_path / "labels.txt").write_bytes("Grün\n".encode("latin-1"))
    words = ["--labels", tmp_path / "labels.txt"]
    assert "labels.txt: is not a text" in refusal(
        "from_labelme.py", photos, tmp_path / "out", *words
    )
    for odd in (
        shape("car", [[0, 0], [3, 3], [None, 1]]),
        shape("car", [[0, 0], [3, 3], [4, 4]], "mask", mask="x"),
    ):
        labelme_file(photos / "a.json", odd, shape("bus", [[1, 1]], "point"))
        told = refusal("from_labelme.py", photos, tmp_path / "drawn")
        assert "a.json: " in told and ("not two numbers" in told or "of 3 points" in told)
    (photos / "a.json").write_text(sound)
    (tmp_path / "labels.txt").write_text("car\ntram\n")
    told = refusal("from_labelme.py", photos, tmp_path / "new", "--labels", tmp_path / "labels.txt")
    assert "labels.txt: lacks 'bus'" in told

"""A user's own data: images/{train,val,test}/*, labels/{train,val,test}/*.png and classes.txt."""

import codecs
import re
from pathlib import Path

from inputs import files
from inputs.errors import need, note
from inputs.files import IGNORE, IMAGE_SUFFIXES, OUTSIDE
from inputs.source import Sample, Splits, list_files, name_of, value_table, voc_palette

# a user's pictures that Pillow does not read by itself, or that are more than one picture
OTHER_PICTURES = (".heic", ".heif", ".avif", ".jp2", ".gif", ".dng", ".nef", ".cr2", ".cr3", ".arw")


def read_folder(path: Path) -> dict:
    """The fields of the `Source` of a user's own folder: its files and the classes it names."""
    file, classes, palette, void = read_classes(path)
    need(
        2 <= len(classes) < OUTSIDE,
        f"{file}: names {len(classes)} classes; 2 to {OUTSIDE - 1} are possible",
    )
    colours = None
    if palette:
        pairs = [*zip(palette, range(len(classes)), strict=True), *((c, IGNORE) for c in void)]
        colours = {files.pack_colour(*colour): i for colour, i in pairs}
        need(len(colours) == len(pairs), f"{file}: gives two entries the same colour")
    splits = list_folder(path)
    first_label = next(sample.label for sample in splits["train"] if sample.label)
    return dict(
        classes=classes,
        palette=palette or own_palette(first_label, len(classes)) or voc_palette(len(classes)),
        table=value_table({i: i for i in (*range(len(classes)), IGNORE)}),
        table_origin=f" ({file.name} names {len(classes)})",
        colours=colours,
        **splits,
    )


def own_palette(label: str, number: int) -> list[tuple[int, int, int]] | None:
    """The first colours of a palette PNG; None where there are too few or two are the same."""
    image, _ = files.open_image(label)
    if image.mode != "P":
        return None
    values = image.getpalette() or []
    colours = [tuple(values[3 * i : 3 * i + 3]) for i in range(number)]
    return colours if len(set(colours)) == number and len(values) >= 3 * number else None


def list_folder(path: Path) -> Splits:
    """A user's own data: images/{train,val,test}/*, labels/{train,val,test}/*.png.

    A training image without a label is unlabelled; the test split may be left out.
    """
    splits = {part: folder_split(path, part) for part in ("train", "val")}
    if (path / "labels" / "test").is_dir():
        splits["test"] = folder_split(path, "test")
    both = sorted({s.name for s in splits["train"]} & {s.name for s in splits["val"]})
    if both:
        note(
            f"{len(both)} names stand in both images/train and images/val ({both[0]} ...); "
            "are they the same pictures?"
        )
    return splits


Colour = tuple[int, int, int]


def read_classes(path: Path) -> tuple[Path, list[str], list[Colour], list[Colour]]:
    """The file that names a user's classes in the order of the label values, the names, their
    colours (none where it gives none) and the colours that mean "not labelled".

    classes.txt has a name a line, or a name and a colour (`road 128 64 128`); without it CVAT's
    labelmap.txt (`road:128,64,128::`) is taken. The name `void` with a colour is no class. Raises
    UserError that names the file and the line."""
    file, pattern = path / "classes.txt", r"(.*[^\s,])[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})"
    if not file.is_file() and (path / "labelmap.txt").is_file():
        file, pattern = path / "labelmap.txt", r"([^:]+):(\d{1,3}),(\d{1,3}),(\d{1,3})(?::.*)?"
    need(
        file.is_file(),
        f"{file}: no such file; it names the classes, one per line, in the order of the label "
        "values 0, 1, ...",
    )
    content = file.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as Windows may write
    lines = content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if file.name == "labelmap.txt":
        lines = [line for line in lines if not line.startswith("#")]
    for line in lines:
        whole = "\0" not in line and "\ufffd" not in line
        need(whole, f"{file}: is no text file in UTF-8; save it as one")
        need(not line.startswith("#"), f"{file}: {line!r} is no class; leave comments out")
    found = [re.fullmatch(pattern, line) for line in lines]
    if file.name == "classes.txt" and not any(found):
        need_distinct(file, lines)
        return file, lines, [], []
    for line, match in zip(lines, found, strict=True):
        whole = match and max(map(int, match.groups()[1:])) <= 255
        need(whole, f"{file}: the line {line!r} has no name with a colour (R, G, B in 0 .. 255)")
    entries = [(match[1].strip(), tuple(map(int, match.groups()[1:]))) for match in found]
    classes = [(name, colour) for name, colour in entries if name.lower() != "void"]
    void = [colour for name, colour in entries if name.lower() == "void"]
    need_distinct(file, [name for name, _ in classes])
    return file, [name for name, _ in classes], [colour for _, colour in classes], void


def note_left_out(folder: Path, images: list[Path]) -> None:
    """Tell of pictures of other formats, and of those in sub-folders, which nobody else would."""
    taken = set(images)
    left_out = [path for path in all_pictures(folder) if path not in taken]
    if left_out:
        note(
            f"{len(left_out)} pictures are left out ({left_out[0]} ...): only "
            f"{', '.join(IMAGE_SUFFIXES)} files of {folder} itself are read"
        )


def need_distinct(file: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    need(twice is None, f"{file}: names the class {twice} twice")


def folder_split(path: Path, part: str) -> list[Sample]:
    """One split of a user's own data, each way in which files may not fit told by name."""
    image_folder, label_folder = path / "images" / part, path / "labels" / part
    layout = "the layout is images/{train,val}/*, labels/{train,val}/*.png, classes.txt"
    images = list_files(image_folder, layout)
    labels = {name_of(p): p for p in list_files(label_folder, "one PNG per labelled image")}
    need(images, f"{image_folder}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    note_left_out(image_folder, images)

    names = set()
    for image in images:
        name = name_of(image)
        need(
            name not in names,
            f"{image_folder}: two images are called {name}; one label could not tell them apart",
        )
        names.add(name)
        need(
            part == "train" or name in labels,
            f"{image}: an image without a label in {label_folder}; "
            "label it or move it to images/train",
        )
    for name, label in labels.items():
        need(
            label.suffix.lower() == ".png",
            f"{label}: a label must be a PNG; other formats change or scale its values",
        )
        need(name in names, f"{label}: a label without an image of that name in {image_folder}")
    need(labels, f"{label_folder}: holds no label; paint at least one")
    return [
        Sample(name, str(image), str(labels[name]) if name in labels else None)
        for name, image in zip(map(name_of, images), images, strict=True)
    ]


def all_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and its sub-folders, also of formats that are not read; not hidden
    ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (*IMAGE_SUFFIXES, *OTHER_PICTURES)
        and path.is_file()
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
    ]

"""A user's own data: images/{train,val,test}/*, labels/{train,val,test}/*.png and classes.txt."""

import os
import re
from pathlib import Path

from inputs import files
from inputs.errors import need, note
from inputs.files import IGNORE, IMAGE_SUFFIXES, OUTSIDE
from inputs.source import Sample, Splits, list_files, name_of, value_table, voc_palette

LAYOUT = "the layout is images/{train,val}/*, labels/{train,val}/*.png, classes.txt"
RGB = r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})"

Colour = tuple[int, int, int]


def read_folder(path: Path) -> dict:
    """The fields of `Source` for a user's own folder: its classes and its files."""
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
    labels = [sample.label for part in splits.values() for sample in part if sample.label]
    return dict(
        classes=classes,
        palette=palette or shared_palette(labels, len(classes)),
        table=value_table({i: i for i in (*range(len(classes)), IGNORE)}),
        table_origin=f" ({file.name} names {len(classes)})",
        colours=colours,
        **splits,
    )


# --------------------------------------------------------------------------------------- classes
def read_classes(path: Path) -> tuple[Path, list[str], list[Colour], list[Colour]]:
    """The file that lists the classes in the order of the label values; their names; their colours
    (empty if it has none); the colours that mean "not labelled".

    A line of classes.txt is a name, or a name and a colour (`road 128 64 128`). Without the file,
    CVAT's labelmap.txt (`road:128,64,128::`) is read. `void` with a colour is not a class. Raises
    UserError that names the file and the line."""
    file, pattern = path / "classes.txt", rf"(.*[^\s,])[\s,]+{RGB}"
    if not file.is_file() and (path / "labelmap.txt").is_file():
        file, pattern = path / "labelmap.txt", rf"([^:]+):{RGB}(?::.*)?"
    need(
        file.is_file(),
        f"{file}: no such file; it names the classes, one per line, in the order of the label "
        "values 0, 1, ...",
    )
    lines = [line.strip() for line in files.read_text(file).splitlines() if line.strip()]
    if file.name == "labelmap.txt":
        lines = [line for line in lines if not line.startswith("#")]
    for line in lines:
        need(not line.startswith("#"), f"{file}: {line!r} is not a class; leave comments out")
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


def need_distinct(file: Path, names: list[str]) -> None:
    """Raise UserError if two classes have the same name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    need(twice is None, f"{file}: names the class {twice} twice")


def shared_palette(labels: list[str], number: int) -> list[Colour]:
    """The colours of the classes: those of the palette PNGs among the labels, else Pascal VOC's.

    The indices of palette PNGs are class numbers only if all have the same palette; a tool may cut
    off its end. For any other difference, raises UserError that names the file.
    """
    palettes = {label: files.read_palette(label)[: 3 * number] for label in labels}
    longest = max(palettes, key=lambda label: len(palettes[label]))
    for label, palette in palettes.items():
        need(
            palettes[longest].startswith(palette),
            f"{label}: has another palette than {longest}, so its numbers may not be the classes; "
            "give every class its colour in classes.txt (road 128 64 128), or save it as grey",
        )
    values = [*palettes[longest]]
    own = [tuple(values[i : i + 3]) for i in range(0, len(values), 3)]
    colours = own + voc_palette(number)[len(own) :]
    return colours if len(set(colours)) == number else voc_palette(number)


# ----------------------------------------------------------------------------------------- files
def list_folder(path: Path) -> Splits:
    """A user's own data: images/{train,val,test}/*, labels/{train,val,test}/*.png.

    A training image without a label is unlabelled; the test split is optional.
    """
    splits = {part: folder_split(path, part) for part in ("train", "val")}
    if (path / "labels" / "test").is_dir():
        splits["test"] = folder_split(path, "test")
    both = sorted({s.name for s in splits["train"]} & {s.name for s in splits["val"]})
    if both:
        note(
            f"{len(both)} names are in both images/train and images/val ({both[0]} ...); "
            "are they the same images?"
        )
    return splits


def folder_split(path: Path, part: str) -> list[Sample]:
    """One split of a user's own data. Raises UserError for files that do not fit together."""
    images = by_name(path / "images" / part)
    labels = by_name(path / "labels" / part)
    for name, label in labels.items():
        png = label.suffix.lower() == ".png"
        need(png, f"{label}: a label must be a PNG; other formats change or scale its values")
        folder = path / "images" / part
        need(name in images, f"{label}: a label without an image of that name in {folder}")
    for name, image in images.items():
        need(
            part == "train" or name in labels,
            f"{image}: an image without a label in {path / 'labels' / part}; label it or move it "
            "to images/train",
        )
    return [
        Sample(name, str(image), str(labels[name]) if name in labels else None)
        for name, image in images.items()
    ]


def by_name(folder: Path) -> dict[str, Path]:
    """The images or labels of a folder by name. Raises UserError if two have the same name."""
    named = {}
    for file in list_files(folder, LAYOUT):
        other = named.setdefault(name_of(file), file)
        need(other is file, f"{file}: has the name of {other}; a label could not tell them apart")
    note_left_out(folder, {*named.values()})
    return named


def note_left_out(folder: Path, read: set[Path], outputs: Path | None = None) -> None:
    """Report files that are not read: of other formats, in sub-folders, in linked folders. Hidden
    files and those in the folder `outputs` are not reported."""
    left_out = []
    for parent, folders, names in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        left_out += [Path(parent, name) for name in (*names, *linked) if not name.startswith(".")]
        folders[:] = [
            name
            for name in folders
            if not (name.startswith(".") or Path(parent, name).resolve() == outputs)
        ]
    left_out = sorted({*left_out} - read)
    if left_out:
        suffixes = sorted({path.suffix.lower() or path.name for path in left_out})
        where = "in folders that are not links" if outputs else "in the folder itself"
        note(
            f"{folder}: {len(left_out)} files are left out ({', '.join(suffixes[:5])}; "
            f"{left_out[0]} ...); only {', '.join(IMAGE_SUFFIXES)} {where} are read"
        )

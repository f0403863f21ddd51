"""The tree: few files at the top level, and imports in one direction."""

import ast

import pytest

from cli import ROOT

LAYERS = ["inputs", "engine", ""]  # each imports itself and what comes before it
PRODUCT = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/*.py"))
PRODUCT = [f for f in PRODUCT if f.parent == ROOT or f.parent.name in ("inputs", "engine")]


def imported(file) -> set[str]:
    """The modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_top_level_has_few_files():
    assert len(list(ROOT.glob("*.py"))) <= 12


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_in_one_direction(file):
    layer = LAYERS.index("" if file.parent == ROOT else file.parent.name)
    root = {f.stem for f in ROOT.glob("*.py")}
    for name in imported(file):
        top = name.split(".")[0]
        above = LAYERS[layer + 1 :]
        assert top not in above, f"{file.name} imports {name}"
        assert "" not in above or top not in root, f"{file.name} imports {name}"


@pytest.mark.parametrize("package", ["inputs", "engine"])
def test_packages_import_nothing_by_themselves(package):
    """A loader process must not import timm or Accelerate."""
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_loader_processes_import_little():
    reached, new = set(), {"engine.loaders"}
    while new:
        name = new.pop()
        reached.add(name)
        file = ROOT / f"{name.replace('.', '/')}.py"
        new |= (imported(file) if file.exists() else set()) - reached
    assert not {"timm", "accelerate", "matplotlib"} & {name.split(".")[0] for name in reached}

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared out; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def script(monkeypatch, capsys):
    """script(module, arguments ...) -> status, stdout, stderr: `python MODULE.py ARGUMENTS` in this
    process."""
    from engine import processes  # found once the path above is set

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            processes.launch(module.main)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep the cache of labels out of the user's home."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture
def without_colour(monkeypatch):
    """Augmentation only mirrors."""
    from inputs import transforms

    monkeypatch.setattr(transforms, "COLOUR_CHANGES", (lambda images, amount: images,) * 4)
    monkeypatch.setattr(transforms, "blur", lambda images, kernels: images)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    import torch  # once the threads are set above

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


# The slow files come first, so that parallel test processes (pytest -n) end together.
SLOW = ("test_resume", "test_train", "test_processes", "test_bad_input", "test_evaluate")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would order by number of tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in SLOW)

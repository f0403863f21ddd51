"""Run many command lines of the repository in one go: the libraries are imported once, every command line is a fork of its own.

Reads a JSON list of [script, argument, ...] from standard input, prints a JSON list of [status, stdout, stderr].
"""
import functools
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import torch
    torch.set_num_threads(1)
    import bench, evaluate, predict, train_semi, train_supervised  # noqa: E401, F401
    commands, results = json.load(sys.stdin), []
    if sum("--dataset" not in command for command in commands) > 5:  # the street scenes are drawn once for all, too
        import street
        street.scene = functools.cache(street.scene)
        for i in range(street.SPLITS["train"]):
            street.scene("train", i)
    for script, *words in commands:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                for name in ("run", "data", "evaluate", "predict", "models", "train_semi", "train_supervised", "bench"):
                    sys.modules.pop(name, None)  # a script is its own __main__
                sys.argv = [str(ROOT / script), *words]
                status = 1
                try:
                    runpy.run_path(sys.argv[0], run_name="__main__")
                    status = 0
                except SystemExit as end:
                    status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
                except BaseException:
                    import traceback
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
        results.append([status, *texts])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

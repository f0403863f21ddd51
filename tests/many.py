"""Run command lines of the repository, each as a fork of one process that has imported the libraries and drawn the street scenes.

Every line of standard input is a JSON object (commands: a list of [script, argument, ...]; cwd; environment), every line of standard output the
JSON list of their [status, stdout, stderr].
"""

import functools
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    import bench  # noqa: F401
    import street

    street.scene, drawn = functools.cache(street.scene), False
    for line in sys.stdin:
        task = json.loads(line)
        if not drawn and any(
            "--dataset" not in command
            and command[0].startswith("train")
            and "--resume" not in command
            for command in task["commands"]
        ):
            drawn = [
                street.scene(part, i)
                for part in ("train", "val")
                for i in range(street.SPLITS[part])
            ]
        print(
            json.dumps(
                [run(command, task["cwd"], task["environment"]) for command in task["commands"]]
            ),
            flush=True,
        )


def run(command: list[str], cwd: str, environment: dict[str, str]) -> list:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            signal.alarm(300)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            for name in (
                "run",
                "data",
                "layouts",
                "labels",
                "loaders",
                "evaluate",
                "predict",
                "models",
                "train_semi",
                "train_supervised",
                "bench",
            ):
                sys.modules.pop(name, None)  # a script is its own __main__
            sys.argv = [str(ROOT / command[0]), *command[1:]]
            status = 1
            try:
                os.chdir(cwd)
                os.environ.clear()
                os.environ.update(environment)
                runpy.run_path(sys.argv[0], run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return [status, texts[0], texts[1] + "\nkilled after 300 s" * (status == -signal.SIGALRM)]


if __name__ == "__main__":
    main()

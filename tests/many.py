"""Run command lines of the repository, each in a fork of one process that has imported all modules
and drawn the street images.

A line of standard input is a JSON object (commands: a list of [script, argument, ...]; cwd;
environment), a line of standard output the JSON list of their [status, stdout, stderr].
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
    import bench  # noqa: F401 (imports the training scripts and all libraries)
    from inputs import street

    street.scene = functools.cache(street.scene)
    drawn = False
    for line in sys.stdin:
        task = json.loads(line)
        if not drawn and any(needs_street(command) for command in task["commands"]):
            drawn = True
            for part in ("train", "val"):
                for i in range(street.SPLITS[part]):
                    street.scene(part, i)
        results = [run(words, task["cwd"], task["environment"]) for words in task["commands"]]
        print(json.dumps(results), flush=True)


def needs_street(command: list[str]) -> bool:
    return command[0].startswith("train") and not {"--dataset", "--resume"} & set(command)


def run(command: list[str], cwd: str, environment: dict[str, str]) -> list:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            run_child(command, cwd, environment)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return [status, texts[0], texts[1] + "\nkilled after 300 s" * (status == -signal.SIGALRM)]


def run_child(command: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Run the script in this forked process, as if started anew; does not return."""
    signal.alarm(300)
    sys.argv = [str(ROOT / command[0]), *command[1:]]
    status = 1
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()

"""The command `outliers` and short programs in processes of their own, a tenth of a second after they are asked for.

Imports are nine tenths of what a short command takes. So one process for each process of the tests has them behind it, and forks
a child for each command: with its own folder, environment and outputs, and an exit code. Prefect is not among the imports: it
reads its settings when it is imported. A second such process has no library of the hub behind it, for commands and programs
with another hub or another home of models. `run_command`, `run_program` and `run_step` are what tests call.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "HUGGINGFACE_", "XDG_")
"""Variables that libraries of the hub read when they are imported."""
READ_AT_START = ("PYTHONHASHSEED", "PYTHONPATH", "LC_ALL", "TZ", "MPLBACKEND")
"""Variables that the interpreter or a library reads once: a program that is given others is started for itself."""

_zygotes: dict[str, subprocess.Popen[str]] = {}


def run_command(folder, *arguments, environment: Mapping[str, str], timeout=600) -> subprocess.CompletedProcess[str]:
    """`outliers ARGUMENTS` in a folder, with this environment and no other, to its end. TimeoutError after `timeout` seconds."""
    return _run(["outliers", *map(str, arguments)], None, folder, environment, timeout)


def run_program(code: str, *arguments, environment: Mapping[str, str], timeout=600) -> subprocess.CompletedProcess[str]:
    """`python -c CODE ARGUMENTS` in this folder, as `run_command`. CalledProcessError where its exit code isn't 0."""
    words = ["-c", *map(str, arguments)]
    if any(environment.get(name) != os.environ.get(name) for name in READ_AT_START):
        started = [sys.executable, "-c", code, *words[1:]]
        done = subprocess.run(started, env=dict(environment), capture_output=True, text=True, timeout=timeout)
    else:
        done = _run(words, code, Path.cwd(), environment, timeout)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    return done


def run_step(*arguments, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m outliers ARGUMENTS` in this folder, as `run_command`; where no environment is given, with this one."""
    code = "import runpy; runpy.run_module('outliers', run_name='__main__', alter_sys=True)"
    return _run(["outliers", *map(str, arguments)], code, Path.cwd(), environment or os.environ, 600)


def _run(words: list[str], code: str | None, folder, environment: Mapping[str, str], timeout: float):
    kind = "all" if _imported(environment) == _imported(os.environ) else "bare"
    with tempfile.TemporaryDirectory() as outputs:
        out, err = Path(outputs) / "out", Path(outputs) / "err"
        asked = {"argv": words, "cwd": str(folder), "env": dict(environment), "out": str(out), "err": str(err)}
        ended = int(_ask(kind, asked | {"code": code}, timeout))
        return subprocess.CompletedProcess(words, ended, out.read_text(), err.read_text())


def _imported(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def _ask(kind: str, asked: dict[str, object], timeout: float) -> str:
    zygote = _zygotes.get(kind)
    if zygote is None or zygote.poll() is not None:
        zygote = _zygotes[kind] = subprocess.Popen(
            [sys.executable, "-m", "tests.support.commands", kind],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        atexit.register(_end, zygote)
    assert zygote.stdin is not None and zygote.stdout is not None
    zygote.stdin.write(json.dumps(asked) + "\n")
    if not select.select([zygote.stdout], [], [], timeout)[0]:
        for process in psutil.Process(zygote.pid).children(recursive=True):
            process.kill()
        raise TimeoutError(f"{asked['argv']} did not end within {timeout} s")
    answer = zygote.stdout.readline()
    assert answer, "the process that forks commands is gone"
    return answer


def _end(zygote: subprocess.Popen[str]) -> None:
    if zygote.stdin is not None and not zygote.stdin.closed:
        zygote.stdin.close()
        zygote.wait()


def serve(kind: str) -> None:
    """Fork a child for each line of standard input, and answer with its exit code."""
    _import_bare()
    if kind == "all":
        _import_all()
    else:
        assert not {"huggingface_hub", "transformers", "datasets"} & sys.modules.keys(), "they read the environment"
    assert "prefect" not in sys.modules, "Prefect reads its settings when it is imported"
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is not an answer
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers)


def _import_bare() -> None:
    """What commands import of libraries that read none of READ_AT_IMPORT."""
    import aiohttp  # noqa: F401 - data sets
    import pandas  # noqa: F401 - pyarrow imports it at its first array
    import pyarrow.dataset
    import pyarrow.parquet  # noqa: F401
    import requests  # noqa: F401
    import torch  # noqa: F401

    import outliers.corpus.hub_data
    import outliers.hub.download  # noqa: F401


def _import_all() -> None:
    import matplotlib.backends.backend_agg
    import matplotlib.font_manager  # noqa: F401 - the report's pictures
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401 - what most commands ask for

    import outliers.atlas.page
    import outliers.planning.remaining
    import outliers.publish.outcome
    import outliers.study.prepare  # noqa: F401


def _become(asked: dict) -> None:
    """Run the command in this process, and end it as the interpreter would."""
    for number, name, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, asked["out"], os.O_WRONLY),
        (2, asked["err"], os.O_WRONLY),
    ):
        descriptor = os.open(name, mode | (os.O_CREAT if number else 0), 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = asked["argv"]
    code = 1
    try:
        if asked["code"] is not None:
            exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
            code = 0
        else:
            from flows.cli import main

            code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as the interpreter does: any error is printed, and the exit code is 1
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])

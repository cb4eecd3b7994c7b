"""The command `outliers` in a process of its own, a tenth of a second after it is asked for.

Imports are nine tenths of what a short command takes. So one process for each process of the tests has them behind it, and forks
a child for each command: with its own folder, environment and outputs, and an exit code. Prefect is not among the imports: it
reads its settings when it is imported. `run_command` is what tests call.
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
"""Variables that libraries read when they are imported: a command that is given others is started as a process of its own."""

_zygote: subprocess.Popen[str] | None = None


def run_command(folder, *arguments, environment: Mapping[str, str], timeout=600) -> subprocess.CompletedProcess[str]:
    """`outliers ARGUMENTS` in a folder, with this environment and no other, to its end. TimeoutError after `timeout` seconds."""
    words = ["outliers", *map(str, arguments)]
    if _imported(environment) != _imported(os.environ):
        command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
        return subprocess.run(
            command, cwd=folder, env=dict(environment), capture_output=True, text=True, check=False, timeout=timeout
        )
    with tempfile.TemporaryDirectory() as outputs:
        out, err = Path(outputs) / "out", Path(outputs) / "err"
        asked = {"argv": words, "cwd": str(folder), "env": dict(environment), "out": str(out), "err": str(err)}
        code = int(_ask(asked, timeout))
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def _imported(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def _ask(asked: dict[str, object], timeout: float) -> str:
    global _zygote
    if _zygote is None or _zygote.poll() is not None:
        _zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.support.commands"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        atexit.register(_end)
    assert _zygote.stdin is not None and _zygote.stdout is not None
    _zygote.stdin.write(json.dumps(asked) + "\n")
    if not select.select([_zygote.stdout], [], [], timeout)[0]:
        for process in psutil.Process(_zygote.pid).children(recursive=True):
            process.kill()
        raise TimeoutError(f"{asked['argv']} did not end within {timeout} s")
    answer = _zygote.stdout.readline()
    assert answer, "the process that forks commands is gone"
    return answer


def _end() -> None:
    if _zygote is not None and _zygote.stdin is not None:
        _zygote.stdin.close()
        _zygote.wait()


def serve() -> None:
    """Fork a child for each line of standard input, and answer with its exit code."""
    import pandas  # noqa: F401 - pyarrow imports it at its first array
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401 - what most commands ask for

    import outliers.atlas.page
    import outliers.planning.remaining
    import outliers.publish.outcome
    import outliers.study.prepare  # noqa: F401

    assert "prefect" not in sys.modules, "Prefect reads its settings when it is imported"
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is not an answer
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers)


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
    serve()

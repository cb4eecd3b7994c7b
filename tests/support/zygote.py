"""A process that has the heavy imports behind it and forks a child for each extraction: a real process to kill, in 0.1 s.

It never runs a torch operation itself, so that no thread of torch is lost in a fork. Talks in lines: a JSON object
{"prepared", "workspace", "log"} begins an extraction and is answered with the child's pid; `wait` reaps that child and is
answered with its exit code, -9 for one that was killed. Until then its pid can't be another's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """The test's end of it. `command`: what it runs under, as `unshare -m`."""

    def __init__(self, *command):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [*command, sys.executable, "-m", "tests.support.zygote"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def extract(self, prepared, workspace, log):
        """Begin an extraction; its pid. `log` gets `start`, then the number of sequences of each forward pass."""
        return int(self._ask(json.dumps({"prepared": str(prepared), "workspace": str(workspace), "log": str(log)})))

    def ready(self):
        """Return when it answers: what it runs under has done its part."""
        self._ask("ready")

    def wait(self):
        """The exit code of the child, -9 where it was killed."""
        return int(self._ask("wait"))

    def _ask(self, line):
        self.process.stdin.write(line + "\n")
        answer = self.process.stdout.readline()
        assert answer, "the zygote is gone"
        return answer


def serve():
    from transformers.models.llama import modeling_llama  # noqa: F401 - what every child would import first
    from zarr.codecs import BloscCodec  # noqa: F401

    import outliers.capture.extract  # noqa: F401
    import tests.support.synthetic  # noqa: F401

    child = 0
    for line in sys.stdin:
        if line.strip() == "ready":
            print(0, flush=True)
            continue
        if line.strip() == "wait":
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            os._exit(_extract(**json.loads(line)))
        print(child, flush=True)


def _extract(prepared, workspace, log):
    import torch

    from outliers.capture.extract import extract
    from outliers.study.prepare import Prepared
    from outliers.workspace import Workspace
    from tests.support.synthetic import Silent

    with Path(log).open("a", buffering=1) as record:

        def begun(module, arguments):
            if isinstance(module, torch.nn.Embedding):
                record.write(f"{len(arguments[0])}\n")

        torch.nn.modules.module.register_module_forward_pre_hook(begun)
        try:
            record.write("start\n")
            extract(Prepared.model_validate_json(Path(prepared).read_text()), Workspace(Path(workspace)), Silent())
        except BaseException:  # noqa: BLE001 - the parent reads it
            record.write(traceback.format_exc())
            return 1
    return 0


if __name__ == "__main__":
    serve()

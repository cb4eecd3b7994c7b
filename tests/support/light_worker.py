"""A worker of a capture without a model: it speaks as one (`capture.channel`) and writes nothing, a process in 0.05 s.

`WORKER` in its environment says what it does: `refuse` (its GPUs are taken), `die` (SIGKILL after its first batch), `fail`
(a full disk), `crash` (exit code 3 without a word), `wait` (it never ends by itself).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time


def main():
    pipe, does = os.fdopen(int(sys.argv[1]), "w", buffering=1), os.environ.get("WORKER", "")

    def send(kind, **fields):
        pipe.write(json.dumps({"kind": kind, **fields}) + "\n")

    start = json.loads(sys.stdin.readline())
    if does == "refuse":
        send("failed", error="PlanRefused", message="GPU 0 (A100) has 1 of 40 GB free")
        return 1
    send("ready")
    line = sys.stdin.readline()
    if not line:
        return 0
    share = json.loads(line)
    length = start["prepared"]["corpus"]["sequence_length"]
    read = 0
    for first, stop, _ in share["batches"]:
        send("journal", entries=[{"sequence": s, "bytes": 10, "of": os.getpid()} for s in range(first, stop)])
        read += stop - first
        send("progress", done=read * length)
        if does == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if does == "crash":
            return 3
        if does == "fail":
            send("failed", error="OSError", message="No space left on device", errno=28, file="/w/c.0.0.0.0")
            return 1
    while does == "wait":
        time.sleep(0.01)
    send("log", level="info", message=f"read {read}")
    send("done", result={"sequences": read, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One of several processes that read a capture together: `python -m outliers.capture.worker DESCRIPTOR PARENT`.

It is told over standard input what to read (`channel`), and answers on the pipe DESCRIPTOR. It sees GPUs of its own
(CUDA_VISIBLE_DEVICES) and writes chunks into the capture, whose lock and journal belong to the process PARENT that started it,
with which it ends.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any

import torch

from outliers.capture.channel import Sender, SentJournal, Share, Start, as_message
from outliers.capture.devices import Devices, choose_devices
from outliers.capture.experts import ExpertSumsFile
from outliers.capture.extract import conditions
from outliers.capture.session import Session
from outliers.capture.work import Work
from outliers.corpus.tokens import load_corpus
from outliers.errors import CaptureMismatch, CorruptCapture
from outliers.events.stream import Reporter, send_logs_to
from outliers.jobs.supervisor import end_with
from outliers.store.chunks import ChunkFiles
from outliers.store.fingerprint import difference, layout_from, read_fingerprint
from outliers.store.journal import Journal
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace


def work(told: IO[str], sender: Sender) -> int:
    """Read a share of a capture. told: a Start and a Share, each a line. 0 where that was done."""
    send_logs_to(sender)
    try:
        _work(told, sender)
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that started this one ends the study with it
        message = as_message(error)
        if message is None:
            traceback.print_exc()
            return 1
        sender.send("failed", **message)
        return 1
    return 0


def _work(told: IO[str], sender: Sender) -> None:
    start = Start.model_validate_json(told.readline())
    prepared, workspace = start.prepared, Workspace(Path(start.workspace))
    devices = choose_devices(prepared.spec, prepared.model)
    sender.send("ready")
    line = told.readline()
    if not line:  # it is not needed
        return
    journal = SentJournal(workspace.capture(prepared.capture_id) / "journal.jsonl", sender)
    sender.send("done", result=_read(prepared, workspace, sender, Share.model_validate_json(line), journal, devices))


def _read(
    prepared: Prepared, workspace: Workspace, reporter: Reporter, share: Share, journal: Journal, devices: Devices
) -> dict[str, Any]:
    """Read a share of a capture that the process that started this one holds; the result is as of `extract`.

    Raises CaptureMismatch where the conditions here are not those under which the capture was begun, and as `extract`.
    """
    folder = workspace.capture(prepared.capture_id)
    found = read_fingerprint(folder)
    if found is None:
        raise CorruptCapture(f"{folder / 'capture.json'} is gone: extract again")
    if differs := difference(found, conditions(prepared, devices)):
        raise CaptureMismatch(f"the capture {prepared.capture_id} was begun {differs}: its processes must be alike")
    torch.set_num_threads(found["threads"])
    layout = layout_from(found)
    experts = None
    if layout.experts is not None and layout.experts.values:
        span = range(*share.span)
        experts = ExpertSumsFile.of_share(folder, layout.experts, span, share.held, goes_on=share.goes_on)
    batches = [(range(first, stop), read) for first, stop, read in share.batches]
    asked, corpus = sum(len(run) for run, _ in batches), load_corpus(prepared.corpus, workspace)
    files = ChunkFiles(folder, layout)
    of = Work(prepared, workspace, corpus, files, journal, asked, devices, reporter, experts)
    with Session(of, asked) as session:
        session.read(batches)
    return session.result()


def main() -> int:
    """Entry of `python -m outliers.capture.worker DESCRIPTOR PARENT`: a pipe, and the process that started this one."""
    end_with(int(sys.argv[2]))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    return work(sys.stdin, Sender(int(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())

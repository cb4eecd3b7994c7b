"""The summary of a part that another machine made: its arrays take no more memory than its file has bytes."""

from __future__ import annotations

import io
import json
import resource
import shutil
import struct
import zipfile

import numpy as np
import pytest

from outliers.counting.analyze import analyze
from outliers.counting.summary_files import COUNTS, TOTALS, read_counts, read_summary
from outliers.errors import CorruptCapture
from outliers.files.sealed import seal_folder
from outliers.untrusted.npz import open_npz
from tests.support import synthetic


@pytest.fixture
def folder(tmp_path, workspace):
    acts = {"mlp_in": synthetic.store(np.full((2, 2, 5, 4), 7.0, np.float32), "bfloat16")[0]}
    prepared = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(prepared, workspace, acts)
    return shutil.copytree(analyze(prepared, workspace, synthetic.Silent()), tmp_path / "came home")


def member(shape, data=b"", version=(1, 0)):
    """A .npy whose header says `shape`."""
    header = repr({"descr": "<i8", "fortran_order": False, "shape": shape}).encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(header)) + header + data


def rewrite(path, change, packing=zipfile.ZIP_STORED):
    """The same archive with other members: `change` takes and gives {name: bytes}."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, data in change(content).items():
            archive.writestr(name, data)


LIES = {
    "a shape of 8 TB": lambda content: content | {"mlp_in.hits.npy": member((1 << 40,))},
    "a shape that wraps around": lambda content: content | {"mlp_in.hits.npy": member((1 << 62, 4))},
    "many arrays": lambda content: content | {f"more{n}.npy": member((0,)) for n in range(300)},
    "no array": lambda content: content | {"mlp_in.hits.npy": b"cos\nsystem\n(S'true'\ntR."},
    "objects": lambda content: content | {"mlp_in.hits.npy": npy(np.array([{}], object))},
}


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("place", [TOTALS, COUNTS])
def test_a_header_that_lies_is_refused_before_anything_is_allocated(folder, name, place):
    path = folder / TOTALS if place == TOTALS else next((folder / COUNTS).glob("*.npz"))
    summary = read_summary(folder)
    rewrite(path, LIES[name])
    seal_folder(folder)  # whoever wrote the summary wrote its checksums
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCapture):
        read_summary(folder) if place == TOTALS else list(read_counts(folder, summary.frame))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_what_is_packed_is_refused_unread(folder):
    path = folder / TOTALS
    rewrite(path, lambda content: content | {"mlp_in.hits.npy": npy(np.zeros(10**7, np.int64))}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ValueError, match="is packed"), open_npz(path):
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**9},
        {"num_layers": 0},
        {"widths": [["mlp_in", 10**9]]},
        {"ladder": [6.0] * 10**4},
        {"positions": 10**12},
        {"num_layers": 3},
    ],
    ids=str,
)
def test_a_frame_of_other_sizes_than_its_arrays_is_refused(folder, change):
    def with_frame(content):
        frame = json.loads(str(np.load(io.BytesIO(content["frame.npy"]), allow_pickle=False)))
        return content | {"frame.npy": npy(np.array(json.dumps(frame | change)))}

    rewrite(folder / TOTALS, with_frame)
    seal_folder(folder)
    with pytest.raises(CorruptCapture):
        read_summary(folder)


def test_a_summary_as_it_was_written_is_read(folder):
    assert read_summary(folder).tokens == 10

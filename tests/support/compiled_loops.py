"""The loops of counting, compiled once a checkout, while the first tests run: else each process of the tests compiles its own.

numba takes 20 seconds of a core for a dtype and 6 more for a lone site, and keeps the result next to the program.
`python -m tests.support.compiled_loops STAMP` counts a few values of every dtype, and makes the file STAMP.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SITES = ("attn_in", "mlp_in", "resid")


def start_compiling(folder: Path) -> subprocess.Popen[bytes] | None:
    """A process that compiles the loops as they are; None where it was done before, by the stamps in `folder`."""
    kernels = (ROOT / "outliers" / "counting" / "kernels").glob("*.py")
    sources = [*sorted(kernels), *sorted((ROOT / "outliers" / "experts").glob("*kernels.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    stamp = folder / f"loops-{digest}"
    if stamp.exists():
        return None
    command = [sys.executable, "-m", "tests.support.compiled_loops", str(stamp)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main(stamp: Path) -> None:
    from outliers.counting.analyze import analyze
    from outliers.workspace import open_workspace
    from tests.support import synthetic

    values = np.random.default_rng(0).normal(0, 4, (2, 2, 20, 16)).astype(np.float32)
    for dtype in ("bfloat16", "float32"):  # float16 is counted by the loops of bfloat16
        acts = {site: synthetic.store(values, dtype)[0] for site in SITES}
        prepared = synthetic.prepared_for(acts, dtype)
        with tempfile.TemporaryDirectory() as folder:
            workspace = open_workspace(Path(folder))
            synthetic.write_capture(prepared, workspace, acts)
            analyze(prepared, workspace, synthetic.Silent(), workers=1)
    compile_experts()
    stamp.touch()


def compile_experts() -> None:
    """A layer of two experts in each dtype."""
    import torch

    from outliers.experts.add import add_layer
    from outliers.experts.routed import Routed, Routing
    from outliers.experts.stream import ExpertStream
    from outliers.experts.sums import ExpertSums
    from outliers.experts.table import FIELDS, ExpertShapes
    from outliers.experts.token_kernels import add_token_squares

    shapes = ExpertShapes(layers=(0,), experts=2, slots=1, width=4, shared_widths=(), hidden=4)
    table = {name: np.zeros((1, 1, 2, 1), dtype) for name, (dtype, _) in FIELDS.items()}
    index = torch.tensor([[0], [1]])
    for dtype in (torch.bfloat16, torch.float32):
        values = torch.ones(2, 4, dtype=dtype)
        routed = Routed(0, index, torch.ones(2, 1), False, torch.ones(2), torch.arange(2), values, values, values, ())
        sums = ExpertSums.zero(shapes)
        add_layer(sums, table, 0, routed, (2,), 2)
        stream = ExpertStream(sums, 0, Routing(0, index, routed.weights), (2,), 2)
        for token in range(2):
            row = slice(token, token + 1)
            stream.add(torch.tensor([0]), torch.tensor([token]), values[row], values[row])
        stream.finish()
    add_token_squares(np.zeros((2, 4)), np.ones((2, 1, 4), np.float32), np.zeros((2, 1), np.uint16))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

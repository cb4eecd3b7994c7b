"""A study with formats in parts: each part's workspace has its own sequences alone."""

from __future__ import annotations

import shutil

import numpy as np

from outliers.counting.merge import merge_summaries
from outliers.counting.summary_files import read_summary
from outliers.quantization.joining import plan_of, write_joined
from outliers.quantization.measure import measure_part
from outliers.steps import run_analyze
from outliers.workspace import open_workspace
from tests.support import synthetic

EVERY = ("int8_token", "int8_tensor", "int8_channel", "fp8_tensor", "mxfp4_even", "nvfp4", "had16+int8_tensor")
LENGTHS = [12, 7, 12, 1, 9, 12]


def acts_of(seed, dtype, sequences):
    """Feature 3 is large everywhere, 9 in the first sequence alone, 5 at first tokens; one value is not finite."""
    rng = np.random.default_rng(seed)
    acts = {}
    for site, width in (("attn_in", 40), ("mlp_in", 40), ("resid", 48)):
        values = rng.standard_normal((2, sequences, 12, width)).astype(np.float32)
        values[..., 3] = 20 + rng.random((2, sequences, 12))
        values[:, 0, :, 9] = 8 + rng.random((2, 12))
        values[:, :, 0, 5] = 300 * rng.random((2, sequences))
        values[1, sequences - 1, 0, 7] = np.nan
        acts[site] = synthetic.store(values, dtype)[0]
    return acts


class World:
    """A study, the workspace of one machine that has all of it, and a workspace for each part with its sequences."""

    def __init__(self, folder, cuts, *, seed=7, dtype="bfloat16", sequences=6, formats=EVERY, tokens=40, batch=1):
        self.folder, self.lengths = folder, LENGTHS[:sequences]
        self.acts = acts_of(seed, dtype, sequences)
        spec = {"formats": {"formats": formats, "format_tokens": tokens}}
        capture = {"sites": tuple(self.acts), "batch_sequences": batch}
        self.prepared = synthetic.prepared_for(self.acts, dtype, lengths=self.lengths, **spec, capture=capture)
        self.spans = [range(first, stop) for first, stop in zip([0, *cuts], [*cuts, sequences], strict=True)]
        self.places = [self.place(f"part{span.start}", span) for span in self.spans]
        self.home = open_workspace(folder / "home")

    def place(self, name, span):
        workspace = open_workspace(self.folder / name)
        synthetic.write_capture(
            self.prepared, workspace, self.acts, lengths=self.lengths, chunk_bytes=5 * 48 * 4, order=span
        )
        return workspace

    def own(self, workspace):
        return workspace.summary(self.prepared.capture_id, self.prepared.study_id)

    def whole(self):
        """The folder of the summary of one machine, with the errors that it measured."""
        workspace = self.place("whole", range(len(self.lengths)))
        run_analyze(self.prepared, workspace, synthetic.Silent())
        return self.own(workspace)

    def count(self):
        for workspace, span in zip(self.places, self.spans, strict=True):
            run_analyze(self.prepared, workspace, synthetic.Silent(), sequences=span)
        return [self.own(workspace) for workspace in self.places]

    def merged(self, folders):
        """Merge, and let each part measure, until nothing is missing; what was measured in each round."""
        corpora = self.home.root / "corpora"
        corpora.exists() or shutil.copytree(self.places[0].corpora, corpora)
        rounds = []
        while len(rounds) < 4:
            whole = merge_summaries(folders, self.home).folder
            missing = write_joined(plan_of(self.prepared, self.home, read_summary(whole)), folders, whole)
            if missing is None:
                return whole, rounds
            made = {
                measure_part(self.prepared, place, synthetic.Silent(), span, whole)
                for place, span in zip(self.places, self.spans, strict=True)
            }
            assert made == {missing}
            rounds.append(missing)
        raise AssertionError(rounds)


def errors_of(folder):
    return (folder / "formats" / "errors.npz").read_bytes()

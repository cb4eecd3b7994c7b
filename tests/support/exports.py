"""What tests of exports share: finished studies, and the inputs of every projection found by hooks of their own."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from outliers.capture.extract import extract
from outliers.corpus.tokens import load_corpus
from outliers.counting.analyze import analyze
from outliers.export.source import Study, open_study
from outliers.model.readers import find_readers
from tests.support import tiny
from tests.support.captured import prepared
from tests.support.synthetic import Silent

SITES = ("attn_in", "mlp_in", "o_in", "down_in")


def counted(workspace, folder, text, sites=SITES, **capture):
    """A study whose summary is there; it has no results."""
    study = prepared(workspace, folder, text, sequences=3, length=20, capture={"sites": sites, **capture})
    extract(study, workspace, Silent())
    analyze(study, workspace, Silent())
    return study


def opened(workspace, study) -> Study:
    return open_study(workspace, study.study_id, study.capture_id)


def named(workspace, tmp_path, text, family, **changes) -> Study:
    """A study of a family that was described and not run: names alone."""
    study = prepared(workspace, tiny.make_model(tmp_path / "model", family, **changes), text)
    return Study(study, find_readers(study.model, workspace), None)


def inputs_of(folder, study, workspace):
    """name -> (token, feature) float64, what every projection below the layers received, of the whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _m, args, at=name: seen.setdefault(at, []).append(args[0].flatten(0, -2).double().numpy())
            )
    ids = load_corpus(study.corpus, workspace).token_ids
    with torch.inference_mode():
        for row in ids:
            model(input_ids=torch.from_numpy(row.astype(np.int64))[None])
    return {name: np.concatenate(parts) for name, parts in seen.items()}

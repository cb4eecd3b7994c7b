"""Formats that can't be measured are refused before a model is loaded."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from outliers.errors import BadInput
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from tests.support import tiny
from tests.support.captured import llama, text

__all__ = ["llama", "text"]  # fixtures, found by name


def test_a_rotation_that_does_not_divide_a_width(llama, text, workspace):
    spec = tiny.spec_for(llama, text, formats={"formats": ["had128+nvfp4"]})
    with pytest.raises(
        BadInput, match=r"--formats had128\+nvfp4 rotates blocks of 128 features, and the site attn_in of .* has"
    ):
        prepare(StudySpec.model_validate(spec), workspace)


def test_a_format_that_there_is_not():
    with pytest.raises(ValidationError, match="'nvfp3' is not a format"):
        StudySpec.model_validate({"model": "m", "formats": ["nvfp3"]})

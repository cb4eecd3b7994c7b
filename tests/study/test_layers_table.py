"""The table of docs/recipes.md, "A model larger than my machine": each figure is what a plan counts from the published config."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from outliers.planning.estimate import flops_per_token
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.prepare import model_info
from outliers.study.schedule import reading_seconds, with_schedule

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
ROWS = {
    cells[0].partition(" (")[0].lower(): cells[1:]
    for line in re.findall(r"^\| (.*\d.*) \|$", PAGE, re.MULTILINE)
    if len(cells := line.split(" | ")) == 9
}


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-30b-a3b",
        *(pytest.param(name, marks=pytest.mark.studies) for name in ("glm-4.5-air", "gpt-oss-120b", "deepseek-v3")),
    ],
)
def test_the_figures_of_the_page_are_those_of_a_plan(tmp_path, workspace, name):
    shutil.copy(ROOT / "tests" / "support" / "configs" / f"{name}.json", tmp_path / "config.json")
    spec = StudySpec.model_validate(
        {"model": {"id": str(tmp_path), "dtype": "bfloat16"}, "corpus": {"source": "builtin:python-docs"}}
    )
    info = model_info(spec, workspace, weights=False)
    whole, layers = (demand_of(with_schedule(spec, schedule), info) for schedule in ("whole", "layers"))
    sizes = (
        *(whole.ram_bytes, layers.ram_bytes, layers.vram_bytes, layers.host_ram_bytes, whole.layout.total_bytes),
        info.weights.checkpoint_bytes,
    )
    petaflop = flops_per_token(info, 2048) * 16 * 2048 / 1e15
    expected = [f"{size / 1e9:.1f}" for size in sizes]
    assert ROWS[name] == [*expected, f"{reading_seconds(info) / 60:.0f} min", f"{petaflop:.2f}"]
    # by hand: the embedding, one layer, what converting it takes, final norm and head
    embedding, largest = info.vocab_size * info.hidden_size * 2, max(info.weights.layer_bytes)
    assert layers.vram_bytes == pytest.approx(2 * embedding + 2 * largest, rel=1e-3)


def test_every_model_of_the_page_is_checked():
    assert ROWS.keys() == {"qwen3-30b-a3b", "glm-4.5-air", "gpt-oss-120b", "deepseek-v3"}

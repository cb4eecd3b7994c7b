"""The planned memory of counting in the pass is that of the tensors that count."""

from __future__ import annotations

import pytest
import torch

from outliers.counting.in_pass.counter import PassShape
from outliers.counting.in_pass.device import DeviceCounter
from outliers.counting.in_pass.host import MAX_WORKERS, SPARE_SLOTS, HostCounter
from outliers.counting.in_pass.state import DeviceState
from outliers.counting.summary import Frame, Summary
from outliers.spec import StudySpec
from outliers.study import pass_memory
from outliers.study.demand import demand_of
from outliers.study.layout import Layout


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("widths", "aliases"),
    [
        ({"attn_in": 13, "mlp_in": 13}, {}),
        ({"attn_in": 13, "mlp_in": 13, "down_in": 29}, {"mlp_in": "attn_in"}),
        ({"o_in": 17, "resid": 13}, {}),
    ],
)
def test_the_numbers_are_those_of_the_tensors(dtype, widths, aliases):
    ladder = (3.0, 6.0, 11.0)
    layout = Layout(widths, tuple(range(5)), 7, 19, dtype, "none", aliases=aliases)
    site = next(iter(widths))
    spec = StudySpec.model_validate(
        {
            "model": "m",
            "capture": {"sites": tuple(widths), "batch_sequences": 3, "store": "none"},
            "criteria": {"ladder": ladder, "site": site},
        }
    )
    frame = Frame("s", dtype, tuple(widths.items()), 5, 19, 6.0, ladder, site)
    shape = PassShape(3, 19, layout.chunk_positions, aliases)
    state = DeviceState(frame, shape, torch.device("cpu"), Summary.zero(frame))
    assert pass_memory.state_bytes(spec, layout) == state.total_bytes
    assert pass_memory.slot_bytes(spec, layout) == HostCounter(frame, shape, workers=MAX_WORKERS).total_bytes
    assert (pass_memory.WORKERS, pass_memory.SPARE_SLOTS) == (MAX_WORKERS, SPARE_SLOTS)
    assert pass_memory.device_pass_bytes(spec, layout) > state.total_bytes
    assert DeviceCounter(frame, shape).take() == []


def test_the_plan_counts_it_where_it_is_taken(workspace, llama, text):
    from tests.support.captured import prepared

    full, none = (prepared(workspace, llama, text, capture={"store": store}) for store in ("full", "none"))
    one, other = (demand_of(study.spec, study.model) for study in (full, none))
    assert one.host_pass_bytes == one.device_pass_bytes == 0
    assert other.ram_bytes >= one.ram_bytes + other.host_pass_bytes > one.ram_bytes
    assert other.work_bytes >= max(one.work_bytes, other.device_pass_bytes)
    assert other.held_bytes == one.held_bytes  # four sequences, the first four

"""A base model whose own forward runs with one layer at a time: its masks, and what layers hand on."""

from __future__ import annotations

import pytest
import torch

from outliers.capture.by_layers.standins import StandIns
from outliers.errors import PlanRefused, SiteError


class Layer(torch.nn.Module):
    def __init__(self, number):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(float(number + 2)), requires_grad=False)

    def forward(self, hidden_states, mask=None, shared=None, extra=None):
        shift = 0.0 if mask is None else mask
        return hidden_states * self.weight + shift


class Tupled(Layer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs), None, "scores"


class Filling(Layer):
    def forward(self, hidden_states, shared=None, **_):
        shared[id(self)] = hidden_states
        return hidden_states


class Base(torch.nn.Module):
    """hidden -> layers in a row; between them the base adds one. A way to be wrong is switched on by name."""

    def __init__(self, kind=Layer, way=""):
        super().__init__()
        self.layers = torch.nn.ModuleList(kind(number) for number in range(3))
        self.way = way

    def forward(self, hidden, mask=0.5):
        shared, extra = {}, None
        for number, layer in enumerate(self.layers):
            if self.way == "skips" and number == 1:
                continue
            given = {"shared": shared} if self.way == "fills" else {}
            output = layer(hidden, mask=mask, extra=extra, **given)
            hidden = output[0] if isinstance(output, tuple) else output
            if self.way == "hands on":
                extra = output[2]
            hidden = hidden + 1
        return hidden


def pass_by_layers(base, given, masks=(0.5, 0.5, 0.5), leave_out=()):
    standins, passed = StandIns(base.layers, "toy"), None
    for number in range(3):
        if number in leave_out:
            continue
        kept = []
        standins.begin(number, passed, kept.append)
        output = base(given, mask=masks[number])
        standins.finish()
        passed = kept[0] if kept else None
    standins.detach()
    return output


@pytest.mark.parametrize("kind", [Layer, Tupled])
def test_a_base_that_changes_the_hidden_state_between_layers(kind):
    """What the next layer is given is kept, not what a layer returns: the base adds one in between."""
    base, given = Base(kind), torch.tensor([1.0, -2.0])
    expected = given
    for weight in (2.0, 3.0, 4.0):
        expected = expected * weight + 0.5 + 1
    assert pass_by_layers(base, given).tolist() == base(given).tolist() == expected.tolist()


def test_a_wrong_mask_and_a_skipped_layer_are_seen():
    base, given = Base(), torch.tensor([1.0, -2.0])
    assert pass_by_layers(base, given, masks=(0.5, 0.0, 0.5)).tolist() != base(given).tolist()
    assert pass_by_layers(base, given, leave_out=(1,)).tolist() != base(given).tolist()


@pytest.mark.parametrize(
    ("kind", "way", "error", "message"),
    [
        (Layer, "skips", SiteError, "does not call each layer once, one after the other"),
        (Filling, "fills", PlanRefused, "fills a mapping that later layers read"),
        (Tupled, "hands on", PlanRefused, "is given more of the layer before than its hidden state"),
    ],
)
def test_layers_that_hand_on_more_are_refused(kind, way, error, message):
    with pytest.raises(error, match=message):
        pass_by_layers(Base(kind, way), torch.tensor([1.0]))

"""Which projections read each site, by their names in the whole model: from the table of families, without torch.

`anatomy` says where a site is, this module who multiplies it by a weight. Quantizers name modules so. It knows names alone;
the tests compare them with the module tree of every family, and with what each module receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outliers.errors import BadInput
from outliers.model.describe import ModelInfo
from outliers.model.families import FAMILIES, LATENT, Family, family
from outliers.model.pretrained import load_config
from outliers.workspace import Workspace

HEAD = "lm_head"
"""The output embedding of every family of the table."""
TRANSPOSED = ("GPT2LMHeadModel",)
"""Families whose projections are transformers' Conv1D, which is not a `torch.nn.Linear`."""

Kind = Literal["projection", "router", "experts"]


@dataclass(frozen=True, slots=True)
class Reader:
    """One module with a weight, and the site of its layer that it reads; no site where its input is at none of them.

    `experts` is one module with the weights of all experts, whose second projection reads no site.
    """

    name: str
    layer: int
    site: str | None
    kind: Kind = "projection"


def find_readers(info: ModelInfo, workspace: Workspace) -> tuple[Reader, ...]:
    """Every module with a weight in every layer, in the order of a forward pass. `workspace`: where a config may be.

    BadInput for a family that is not in the table; UnknownModel where the table needs a config that can't be read.
    """
    row = _row(info, workspace)
    found: list[Reader] = []
    for layer in range(info.num_layers):
        base = f"{info.anatomy.backbone}.{info.anatomy.layers}.{layer}"
        found += [Reader(f"{base}.{name}", layer, site, kind) for name, site, kind in _of_layer(info, row, layer)]
    return tuple(found)


def _row(info: ModelInfo, workspace: Workspace) -> Family:
    row = FAMILIES.get(info.architecture)
    if row is None:
        raise BadInput(
            f"which modules of {info.architecture} read a site is not known, because this family is not in the table: its "
            f"statistics can't be given names. The families of the table are {', '.join(sorted(FAMILIES))}"
        )
    if row is not LATENT:
        return row
    # the one family whose config decides which modules there are
    return family(info.architecture, load_config(info.source, workspace).get_text_config()) or row


def _of_layer(info: ModelInfo, row: Family, layer: int) -> list[tuple[str, str | None, Kind]]:
    """(name in the layer, site, kind) of a layer's modules with weights."""
    output = _output(info, row, layer)
    attention = output.rpartition(".")[0] + "."
    found: list[tuple[str, str | None, Kind]] = [
        (name, "attn_in", "projection") for name in row.attention_readers if name.startswith(attention)
    ]
    found += [(name, None, "projection") for name in row.inner if name.startswith(attention)]
    found.append((output, "o_in", "projection"))
    if layer not in info.anatomy.moe_layers:
        found += [(name, "mlp_in", "projection") for name in row.mlp_readers]
        return [*found, (row.mlp_output[0], "down_in", "projection")]
    if row.router is not None:
        found.append((row.router, "mlp_in", "router"))
    if row.experts is not None:
        found.append((row.experts, "mlp_in", "experts"))
    found += [(name, "mlp_in", "projection") for name in row.shared_readers]
    return found + [(name, None, "projection") for name in row.inner if not name.startswith(attention)]


def _output(info: ModelInfo, row: Family, layer: int) -> str:
    """Attention's output projection in a layer: of several kinds of attention, the one whose `o_in` the anatomy has."""
    known = info.anatomy.sites["o_in"][layer].partition(f"{info.anatomy.layers}.{layer}.")[2]
    return next((name for name in row.attention_output if known.startswith(name)), row.attention_output[0])

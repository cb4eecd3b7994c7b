"""A GPU's name -> its CUDA compute capability, for GPUs that can't be asked: those of a catalog.

Knows names as drivers and catalogs write them, no machine. Where a device can be asked (nvidia-smi, torch), its own answer is
taken instead. Before it: nothing. After it: `base.Gpu`, and `quantization`, which compares.
"""

from __future__ import annotations

import re

Capability = tuple[int, int]

# https://developer.nvidia.com/cuda-gpus and /cuda-legacy-gpus; the first that is found in a name is meant
_NAMES: tuple[tuple[str, Capability], ...] = (
    (r"GB10(?!\d)", (12, 1)),
    (r"G?B300", (10, 3)),
    (r"G?B[12]00", (10, 0)),
    (r"G?H[128]00|H20(?!\d)", (9, 0)),
    (r"ADA|L40S?|L[24]0?(?!\d)|RTX ?40\d\d", (8, 9)),
    (r"RTX ?50\d\d|RTX ?PRO", (12, 0)),
    (r"ORIN", (8, 7)),
    (r"A[18]00(?!\d)|A30(?!\d)", (8, 0)),
    (r"A10G?(?!\d)|A(?:2|16|40)(?!\d)|A[2-6][05]00|RTX ?30\d\d", (8, 6)),
    (r"T4G?(?!\d)|TITAN RTX|RTX ?20\d\d|RTX ?[3-8]000|GTX ?16\d\d|T[1-9]00", (7, 5)),
    (r"V100|TITAN V", (7, 0)),
    (r"P100", (6, 0)),
    (r"P(?:4|6|40)(?!\d)|GTX ?10\d\d|TITAN X|P[2-6]000", (6, 1)),
    (r"M(?:4|40|60)(?!\d)|GTX ?9\d\d", (5, 2)),
    (r"K80", (3, 7)),
)


def capability_of(name: str) -> Capability | None:
    """(major, minor) of a GPU such as `NVIDIA A100-SXM4-80GB` or `A100-80GB`; None for a name that is not known."""
    text = name.upper().replace("-", " ").replace("_", " ")
    for pattern, capability in _NAMES:
        if re.search(rf"(?<![A-Z0-9])(?:RTX ?)?(?:{pattern})", text):
            return capability
    return None


def written(capability: Capability) -> str:
    """As nvidia-smi writes it: `8.9`."""
    return f"{capability[0]}.{capability[1]}"

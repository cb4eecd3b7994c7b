"""Whether weights can be computed with as a checkpoint stores them, in a given place: one table of methods.

By default weights that transformers can dequantize on loading (MXFP4, FP8) are dequantized; the other methods can be studied
only where their own packages are installed. It knows methods, compute capabilities and packages, and looks at no device.
`refusal` is the one decision. `prepare` makes it for the place where a study would run, `plan` for each offer, `devices` and
`load` for the GPUs that torch finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from packaging.requirements import Requirement

from outliers.hardware import Capability, written
from outliers.units import amounts

Choice = Literal["auto", "checkpoint", "none"]
"""--quantization: none makes weights plain, checkpoint keeps them as they are stored, auto makes plain what can be."""

_KERNELS = "kernels"
"""It fetches compiled code from the hub when the model is loaded or first run. `required` has the versions."""


@dataclass(frozen=True, slots=True)
class Method:
    """What a method needs.

    `plain`: transformers dequantizes its weights while it loads them. `packages`: requirements (see `required`) that must be
    installed to compute with the weights as they are; None if nothing here can. `capability`: the least that each GPU must have.
    A GPU is always needed: on a processor transformers dequantizes what it can, without a warning.
    """

    plain: bool = False
    packages: tuple[str, ...] | None = None
    capability: Capability = (0, 0)


METHODS: Mapping[str, Method] = {
    # transformers/quantizers/quantizer_mxfp4.py, validate_environment
    "mxfp4": Method(True, (_KERNELS, "triton>=3.4.0"), (7, 5)),
    # quantizer_finegrained_fp8.py, and its first pass: integrations/finegrained_fp8.py
    "fp8": Method(True, (_KERNELS, "triton"), (8, 9)),
    # quantizer_gptq.py, quantizer_awq.py, quantizer_bnb_4bit.py, quantizer_compressed_tensors.py
    "gptq": Method(False, ("gptqmodel>=1.4.3", "optimum>=1.24.0")),
    "awq": Method(False, ("gptqmodel",)),
    "bitsandbytes": Method(False, ("bitsandbytes>=0.46.1",)),
    "compressed-tensors": Method(False, ("compressed-tensors>=0.15.0",)),
}
_OTHER = Method()
"""Any other method: nothing here shows that the sites have the right values under it."""

DEQUANTIZABLE = tuple(name for name, method in METHODS.items() if method.plain)
"""Methods whose weights transformers turns into plain ones while it loads them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where weights would be computed with.

    `gpus`: (name, compute capability) of each GPU that would hold some; None where the capability is not known, () for the
    processor. `packages`: requirements can be met by these versions, by name; None for an environment that is made for the
    study, which has none of these packages and gets none.
    """

    gpus: tuple[tuple[str, Capability | None], ...]
    packages: Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a method can't be computed with in a place. `needs`: what follows `which` in the message.

    `remedy`: what passes instead: `plain` (--quantization none), `install` (of `packages`, here), or `checkpoint`, another
    one of the same model.
    """

    needs: str
    remedy: Literal["plain", "install", "checkpoint"]
    packages: tuple[str, ...] = ()


def stored_method(quantization: Mapping[str, Any]) -> str:
    """The method that a quantization_config names, as transformers reads it: those of bitsandbytes may name none."""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    name = quantization.get("quant_method")
    return "unknown" if name is None else str(getattr(name, "value", name))


def kept_as_stored(choice: Choice, method: str | None) -> bool:
    """Whether weights stay as they are stored. Only method and choice decide: an id must not depend on a machine."""
    if method is None or choice == "none":
        return False
    return choice == "checkpoint" or method not in DEQUANTIZABLE


def refusal(method: str | None, place: Place) -> Refusal | None:
    """Why weights that stay in `method` can't be computed with in a place, None if they can. `method`: None for plain weights."""
    if method is None:
        return None
    known = METHODS.get(method, _OTHER)
    if known.packages is None:
        return Refusal("can neither be computed with here nor be made plain on loading", "checkpoint")
    weak = [f"{name} has {written(has)}" for name, has in place.gpus if has is not None and has < known.capability]
    missing = tuple(text for text in map(required, known.packages) if not _installed(text, place.packages))
    needed = []
    if not place.gpus:
        least = f" of compute capability {written(known.capability)}" if known.capability > (0, 0) else ""
        needed.append(f"a GPU{least}")
    elif weak:
        needed.append(f"compute capability {written(known.capability)} ({', '.join(dict.fromkeys(weak))})")
    if missing:
        where = "here" if place.packages is not None else "in the environment that is made on a machine"
        needed.append(f"{' and '.join(missing)} ({'which is' if len(missing) == 1 else 'which are'} not {where})")
    if not needed:
        return None
    needs = f"needs {', and '.join(needed)}"
    if known.plain:
        return Refusal(needs, "plain")
    if missing and place.packages is not None and place.gpus and not weak:
        return Refusal(needs, "install", missing)
    return Refusal(needs, "checkpoint")


def _installed(text: str, packages: Mapping[str, str] | None) -> bool:
    wanted = Requirement(text)
    found = (packages or {}).get(wanted.name)
    return found is not None and wanted.specifier.contains(found, prereleases=True)


def required(text: str) -> str:
    """A requirement of the table, with the versions that the installed transformers names where they change with it."""
    if text != _KERNELS:
        return text
    from transformers.utils import import_utils

    below = getattr(import_utils, "KERNELS_MAX_VERSION", None)  # transformers 5.0 has no upper bound
    return f"kernels>={import_utils.KERNELS_MIN_VERSION}" + (f",<{below}" if below else "")


def installed_packages() -> dict[str, str]:
    """The versions of the table's packages that are installed in this process's own environment, by name."""
    found = {}
    for name in {Requirement(text).name for method in METHODS.values() for text in method.packages or ()}:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def sentence(name: str, method: str, found: Refusal, dtype: str, stored_bytes: int, plain_bytes: int) -> str:
    """The message of a refusal, with what works instead. `stored_bytes`, `plain_bytes`: of the weights in memory, either way."""
    reason = f"{name} is stored in {method}, which {found.needs}"
    if found.remedy == "plain":
        plain, stored = amounts(plain_bytes, stored_bytes)
        return f"{reason}: --quantization none computes in {dtype}, with {plain} of weights instead of {stored}"
    if found.remedy == "install":
        wanted = " ".join(f"'{text}'" for text in found.packages)
        return f"{reason}: pip install {wanted} where this command runs, or name a checkpoint with plain weights"
    return (
        f"{reason}: name a checkpoint of the model with plain weights, or one in {' or '.join(DEQUANTIZABLE)}, which are made "
        "plain on loading"
    )

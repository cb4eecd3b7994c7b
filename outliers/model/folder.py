"""A folder with a model: which of its files are the model's, and what is refused before any of them is hashed.

Reads the config and the headers of the weights; no weight, no remote code, no pickle. It knows no study and no workspace.
"""

from __future__ import annotations

from pathlib import Path

from outliers.errors import UnknownModel
from outliers.hub.files import SMALL_SUFFIXES, WEIGHTS_SUFFIX, adapter_files
from outliers.hub.headers import read_checkpoint, read_json, refuse_pointer
from outliers.model.configs import check_config


def model_files(path: Path) -> tuple[Path, ...]:
    """The model's files in a folder, sorted by name: the revision is the hash of these."""
    suffixes = (WEIGHTS_SUFFIX, *SMALL_SUFFIXES)
    return tuple(sorted(file for file in path.iterdir() if file.is_file() and file.suffix in suffixes))


def check_folder(path: Path, *, weights: bool) -> None:
    """Raises UnknownModel unless the folder holds one whole model; `weights`: whether its weights are needed too."""
    refuse_outsiders(path)
    files = model_files(path)
    refuse_adapter(path)
    if not (path / "config.json").is_file():
        raise UnknownModel(f"{path} has no config.json: not a model's folder")
    if weights and not any(file.suffix == WEIGHTS_SUFFIX for file in files):
        raise UnknownModel(f"{path} has no .safetensors weights; pickled weights (.bin, .pt) are never loaded")
    check_config(read_json(path / "config.json"), path.name)
    for file in files:
        if file.suffix != WEIGHTS_SUFFIX:
            refuse_pointer(file, _beginning(file))  # git-lfs also keeps tokenizer.json of large vocabularies
    if weights:
        read_checkpoint(path)  # takes seconds; the hash of gigabytes comes after it


def _beginning(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(24)
    except OSError as error:
        raise UnknownModel(f"{file} can't be read: {error.strerror}") from error


def refuse_adapter(folder: Path) -> None:
    """Raises UnknownModel for a folder with a LoRA adapter: transformers would apply it where peft is installed."""
    adapters = adapter_files(file.name for file in folder.iterdir())
    if adapters:
        place = "next to a checkpoint" if (folder / "config.json").exists() else "and no model"
        raise UnknownModel(
            f"{folder} holds a LoRA adapter ({', '.join(adapters)}) {place}: which of the two models is meant? Merge it into "
            "the checkpoint (peft's merge_and_unload) and name the merged one, or move the adapter's files out of the folder"
        )


def refuse_outsiders(folder: Path) -> None:
    """Raises UnknownModel for a folder with a link that leads out of it, or with a pipe, socket or device.

    A link could name any file of this user, which would be read as a part of the model and sent with --upload-model. The
    links of a snapshot in the hub's cache are allowed: they lead into the `blobs` of the same repository.
    """
    place = folder.resolve()
    homes = [place] + ([place.parent.parent / "blobs"] if place.parent.name == "snapshots" else [])
    for entry in sorted(folder.iterdir()):
        try:
            target = entry.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise UnknownModel(f"{entry} is a link to nothing, or to itself: fetch or copy the file again") from error
        if not any(target.is_relative_to(home) for home in homes):
            raise UnknownModel(
                f"{entry} is a link out of its folder, to {target}: links are followed within a model's folder alone. Copy the "
                "file into the folder, or name the folder that it is in"
            )
        if not (target.is_file() or target.is_dir()):
            raise UnknownModel(f"{entry} is neither a file nor a folder: a model's folder holds files; remove it")

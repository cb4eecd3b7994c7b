"""A GGUF file -> a model's folder in the workspace, once: config and tokenizer at first, the weights when a machine needs them.

The tokenizer is made of the file's own metadata (`gguf_tokenizer`). transformers reads the weights of a GGUF file slowly
(12 s and more) and refuses to save them, because it marks the model as quantized. The dequantized float32 weights are
therefore saved from a fresh model of the same config; they load again in under a second.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliers.errors import UnknownModel
from outliers.files.sealed import LISTING, check_folder, drop_folder, seal_folder
from outliers.hub.headers import named
from outliers.model.foreign import foreign
from outliers.model.gguf_header import read_header
from outliers.model.gguf_tokenizer import make_tokenizer

if TYPE_CHECKING:
    from outliers.model.loading import Report
    from outliers.model.source import ModelSource
    from outliers.workspace import Workspace

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
WEIGHTS_LISTING = f"{WEIGHTS}.{LISTING}"

FOLDER = "gguf-2"
"""Name of the folder; another where the same file gives another config or tokenizer, so that an older one is never read."""


def gguf_folder(source: ModelSource, workspace: Workspace) -> Path:
    """The folder with config.json and the tokenizer of a GGUF file, made if absent or damaged.

    Raises UnknownModel where the file can't be read, or its tokenizer is not one that is known here.
    """
    folder = workspace.models / source.key / FOLDER
    if folder.is_dir() and check_folder(folder):
        return folder
    drop_folder(folder)
    log.info("reading the tokenizer of %s (once)", source.name)
    path = Path(source.path)
    # refuses in a second what the config's reader would take a minute for
    tokenizer = make_tokenizer(read_header(path), path.name)
    config = _config(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".gguf-"))
    _plain(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    seal_folder(made)
    _settle(made, folder)
    return folder


@contextmanager
def isolated(path: Path) -> Iterator[tuple[str, str]]:
    """A private folder that holds nothing but a link to this file, and the link's name.

    A loader of that folder sees no config, adapter or code that happens to lie next to the file.
    """
    with tempfile.TemporaryDirectory(prefix="outliers-gguf-") as place:
        (Path(place) / "model.gguf").symlink_to(path.absolute())
        yield place, "model.gguf"


def _config(path: Path) -> Any:
    """transformers' config of a GGUF file. Raises UnknownModel."""
    from transformers import AutoConfig

    _needs_package()
    with foreign(f"the config of {path.name} can't be read"), isolated(path) as (place, file):
        return AutoConfig.from_pretrained(place, gguf_file=file, trust_remote_code=False)


def _needs_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UnknownModel("reading a GGUF file needs the package gguf: pip install 'outlier-features[demo]'")


def gguf_weights(source: ModelSource, workspace: Workspace) -> Path:
    """The same folder, with the weights dequantized to float32 in it."""
    folder = gguf_folder(source, workspace)
    if (folder / WEIGHTS).exists() and check_folder(folder, WEIGHTS_LISTING):
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    from outliers.model.loading import read_report

    log.info("dequantizing %s to float32 (once)", source.name)
    _needs_package()
    with foreign(f"the weights of {source.name} can't be read"), isolated(Path(source.path)) as (place, file):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=file,
            trust_remote_code=False,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        model, report = loaded
    _refuse_made_up(read_report(report), source.name)
    shared: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        # tied weights appear under each of their names; the file keeps the first
        if shared.setdefault(tensor.data_ptr(), name) == name:
            tensors[name] = tensor.contiguous()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".weights-", delete=False) as made:
        pass
    save_file(tensors, made.name, metadata={"format": "pt"})
    with Path(made.name).open("rb") as written:
        os.fsync(written.fileno())
    Path(made.name).chmod(0o644)
    Path(made.name).replace(folder / WEIGHTS)
    seal_folder(folder, (WEIGHTS,), WEIGHTS_LISTING)
    return folder


def _refuse_made_up(report: Report, name: str) -> None:
    """A folder of weights is kept for every later study: all of them come from the file, the head too."""
    wrong = [*report.missing, *(key for key, _, _ in report.mismatched)]
    if wrong:
        raise UnknownModel(
            f"{name} lacks {len(wrong)} weights of its model, or has them in another shape, first {named(wrong)}: transformers "
            "would initialise them at random. Fetch or convert the file again"
        )


def _plain(config: Any) -> Any:
    """The config as of an ordinary checkpoint: no quantization, no mention of the file's own title."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    return config


def _settle(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`; another process may have been first with the same content."""
    try:
        made.chmod(0o755)
        made.rename(folder)
    except OSError:
        shutil.rmtree(made)
        if not folder.is_dir():
            raise

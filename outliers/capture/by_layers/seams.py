"""The names of transformers, some of them private, with which one layer's weights are loaded; checked before they are used.

transformers may move them in any version. Where one is missing or takes other arguments, `layers` is refused in a sentence.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

from outliers.errors import PlanRefused

SYNCHRONOUS = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' own variable: with it a tensor is read when its conversion needs it, instead of all of them before."""

_MODEL = "transformers.modeling_utils:PreTrainedModel"
_CORE = "transformers.core_model_loading"
WANTED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (_CORE, "convert_and_load_state_dict_in_model", ("model", "state_dict", "load_config", "disk_offload_index")),
    (
        _CORE,
        "rename_source_key",
        ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"),
    ),
    (_CORE, "WeightRenaming", ()),
    (_CORE, "WeightConverter", ()),
    (_MODEL, "_load_pretrained_model", ("model", "state_dict", "checkpoint_files", "load_config")),
    (_MODEL, "_finalize_model_loading", ("model", "load_config", "loading_info")),
    (_MODEL, "named_non_persistent_buffers", ()),
)
"""Module, or class in it; name; the arguments that it takes, in this order."""


class Seams(NamedTuple):
    """What of transformers is used, beyond its public names."""

    load: Any
    rename: Any
    renaming: type
    converter: type


def find_seams(wanted: tuple[tuple[str, str, tuple[str, ...]], ...] = WANTED) -> Seams:
    """The names, checked. Raises PlanRefused where the installed transformers lacks one or it takes other arguments."""
    found = {name: _find(place, name, arguments) for place, name, arguments in wanted}
    return Seams(
        found["convert_and_load_state_dict_in_model"],
        found["rename_source_key"],
        found["WeightRenaming"],
        found["WeightConverter"],
    )


def _find(place: str, name: str, arguments: tuple[str, ...]) -> Any:
    module, _, inner = place.partition(":")
    try:
        holder: Any = importlib.import_module(module)
        found = getattr(getattr(holder, inner) if inner else holder, name)
    except (ImportError, AttributeError) as error:
        raise _moved(f"has no {name} in {module}") from error
    takes = tuple(inspect.signature(found).parameters) if arguments else ()
    if takes[: len(arguments)] != arguments:
        raise _moved(f"has a {name} that takes {', '.join(takes)}, not {', '.join(arguments)}")
    return found


def _moved(what: str) -> PlanRefused:
    import transformers

    return PlanRefused(
        "--schedule layers loads one layer with names of transformers that may change, and transformers "
        f"{transformers.__version__} {what}: install the version of constraints.txt, or give --schedule whole"
    )

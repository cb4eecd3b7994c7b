"""SWEEP.toml -> Sweep: its studies, each a whole StudySpec with a name, before anything is looked up or run.

A file has `[defaults]` (any section of a StudySpec), `[[study]]` entries over them, and `[matrix]`, of which every
combination is a study of every entry; an entry's own value wins over the matrix, which then has no such axis for it. Paths
are relative to the file's folder. Knows no model, machine or Prefect. `plan` adds up what a sweep takes, and the flow runs
one child for each study.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from outliers.errors import BadInput
from outliers.machines.options import check_options
from outliers.names import nearest
from outliers.publish.outcome import Outcome, find_outcome
from outliers.spec import DEFAULT_PROVIDER, PARTS, Part, StudySpec, chosen, digest, short_model_name
from outliers.study.prepare import prepare
from outliers.sweep.slips import errors_of, format_mistake, format_value, holds, lines, origin
from outliers.workspace import open_workspace

__all__ = [
    "Sweep", "SweepFile", "SweepStudy", "answer", "kept_for_next", "make_sweep", "merged", "next_to_start",
    "read_sweep",
]  # fmt: skip

BARE = {"model": "id", "corpus": "source"}
"""A section that may be written as a bare string, and the field that the string is; its axis in a matrix has the section's
name."""
PATHS = (("model", "id"), ("corpus", "source"), ("compute", "workspace"))
"""Fields that may be a path."""

MOST_STUDIES = 1000
"""A matrix grows fast: more studies are taken for a mistake."""
NEXT_SECONDS = 300
"""How long a rented machine is kept for the next study of the same capture, which starts within seconds."""

BESIDE = "beside the file"
"""Origin of a value that is not in the file: an option of the command, a parameter of the deployment."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class SweepFile(Part):
    """The content of a SWEEP.toml, as written."""

    name: str | None = Field(None, pattern=NAME, description="name of the sweep (default: the file's)")
    parallel: int = Field(1, ge=1, le=64, description="how many studies run at once")
    stagger_seconds: float = Field(
        15, ge=0, le=3600, description="at least so long between the starts of two models of the hub, in seconds"
    )
    needs: str | None = Field(None, description="what to do first where a model's folder or file is not there")
    defaults: dict[str, Any] = Field(default_factory=dict, description="parts of a StudySpec that hold for every study")
    matrix: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="field of a StudySpec -> values; every combination is a study"
    )
    study: tuple[dict[str, Any], ...] = Field((), description="the studies, each over the defaults")


class SweepStudy(Part):
    """One study of a sweep."""

    name: str = Field(pattern=NAME)
    spec: StudySpec

    @property
    def capture_key(self) -> str:
        """The same for studies that differ in criteria or target alone: they share a capture, and a machine."""
        spec = self.spec.model_dump(mode="json", include={"model", "corpus", "capture"})
        for name in ("perplexity", "store", "store_sequences", "disk_window"):  # in no capture_id
            spec["capture"].pop(name)
        for part in ("model", "corpus"):
            spec[part].pop("name")
        if spec["model"]["quantization"] == "auto":  # dequantizes what it can, as `none` asks for
            spec["model"]["quantization"] = "none"
        compute = self.spec.compute
        return digest([spec, chosen(compute.provider), compute.machine, compute.host, compute.workspace])

    @property
    def from_hub(self) -> bool:
        """Whether the model's name is one of the hub: neither a path nor built in."""
        name = self.spec.model.id
        return not (name.startswith(("builtin:", ".", "/", "~")) or name.endswith(".gguf") or Path(name).exists())

    @property
    def is_missing(self) -> bool:
        """Whether the model is a path that does not exist."""
        name = self.spec.model.id
        return name.startswith((".", "/", "~")) and not Path(name).expanduser().exists()


class Sweep(Part):
    """The studies of a sweep, and how they are run."""

    name: str
    parallel: int
    stagger_seconds: float
    studies: tuple[SweepStudy, ...]
    needs: str | None = None

    @property
    def remedy(self) -> str | None:
        """What to do first, where models' paths do not exist; None where all exist, or the file has no `needs`."""
        gone = [study.name for study in self.studies if study.is_missing]
        return f"{self.needs} (for {', '.join(gone)})" if gone and self.needs else None


def read_sweep(path: Path, changes: dict[str, Any] | None = None, settings: dict[str, Any] | None = None) -> Sweep:
    """The sweep in a TOML file.

    `changes`: sections of a StudySpec, `settings`: fields of SweepFile; both win over the file's. Raises BadInput with a line
    for each mistake: the file, the entry, the field, what is allowed.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path} is not TOML: {error}") from error
    content.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:64] or "sweep")
    try:
        SweepFile.model_validate(settings or {})
    except ValidationError as error:
        # the mistake is not in the file
        raise BadInput(lines(error, f"beside {path}", SweepFile)) from error
    return make_sweep(content | (settings or {}), str(path), path.absolute().parent, changes)


def make_sweep(
    content: dict[str, Any], place: str, folder: Path | None = None, changes: dict[str, Any] | None = None
) -> Sweep:
    """The sweep of parsed TOML. `place`: its name in messages; `folder`: its paths are relative to this (None: unchanged)."""
    try:
        file = SweepFile.model_validate(content)
    except ValidationError as error:
        raise BadInput(lines(error, place, SweepFile)) from error
    axes = tuple(_axis(name, values, place) for name, values in file.matrix.items())
    fields = [path for path, _ in axes]
    twice = next((path for path in fields if fields.count(path) > 1), None)
    if twice is not None:
        raise BadInput(f"{place}: [matrix]: {'.'.join(twice)} is there twice, by two names: make one list of it")
    entries = tuple(_whole(entry) for entry in file.study)
    if not entries and not any(path == ("model", "id") for path, _ in axes):
        raise BadInput(f"{place}: no study: write a [[study]] with its model, or model = [...] in [matrix]")
    _check_axes(axes, entries, place)
    defaults, given = _whole(file.defaults), _whole(changes or {})
    studies: list[SweepStudy] = []
    mistakes: list[str] = []
    for number, entry in enumerate(entries or ({},), 1):
        own = {key: value for key, value in entry.items() if key != "name"}
        free = tuple((path, values) for path, values in axes if not holds(own, path))
        for values in itertools.product(*(values for _, values in free)):
            cell = [(path, value) for (path, _), value in zip(free, values, strict=True)]
            if len(studies) >= MOST_STUDIES:
                raise BadInput(f"{place}: more than {MOST_STUDIES:,} studies: make the matrix smaller")
            layers = {"[defaults]": defaults, f"study {number}": own, "[matrix]": _nested(cell), BESIDE: given}
            try:
                spec = StudySpec.model_validate(_placed(merged(*layers.values()), folder))
                studies.append(SweepStudy(name=_name(entry, spec, cell, f"{place}: study {number}"), spec=spec))
            except ValidationError as error:
                for item in errors_of(error):
                    author = origin(item, layers, entry)
                    where = f"beside {place}" if author == BESIDE else f"{place}: {author}"
                    mistakes.append(f"{where}: {format_mistake(item, StudySpec)}")
    if mistakes:
        raise BadInput("\n".join(dict.fromkeys(mistakes)))
    _check_distinct(studies, place)
    return Sweep(
        name=file.name or "sweep",
        parallel=file.parallel,
        stagger_seconds=file.stagger_seconds,
        studies=tuple(_together(studies)),
        needs=file.needs,
    )


def answer(study: SweepStudy) -> Outcome | None:
    """The outcome of a study that is there already, None for one that must run. Raises as `prepare` and `find_outcome`."""
    workspace = open_workspace(study.spec.compute.workspace)
    check_options(study.spec.compute)
    return find_outcome(prepare(study.spec, workspace), workspace)


def next_to_start(
    sweep: Sweep, waiting: Iterable[SweepStudy], running: Collection[SweepStudy], since_hub_seconds: float
) -> SweepStudy | None:
    """The first study that may start now, or None.

    At most `parallel` run at once, two of one capture never, and models of the hub begin `stagger_seconds` apart.
    """
    if len(running) >= sweep.parallel:
        return None
    held = {study.capture_key for study in running}
    for study in waiting:
        if study.capture_key not in held and (not study.from_hub or since_hub_seconds >= sweep.stagger_seconds):
            return study
    return None


def kept_for_next(study: SweepStudy) -> SweepStudy:
    """The study with its rented machine kept for NEXT_SECONDS, so that the next study of its capture finds it."""
    compute = study.spec.compute
    if compute.keep_running or chosen(compute.provider) == DEFAULT_PROVIDER:
        return study
    kept = compute.model_copy(update={"keep_running": True, "keep_seconds": NEXT_SECONDS})
    return study.model_copy(update={"spec": study.spec.model_copy(update={"compute": kept})})


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries, field by field; the last one's values win."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = out.get(key)
            out[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return out


def _whole(content: dict[str, Any]) -> dict[str, Any]:
    """Turn sections that are written as a bare string into tables."""
    return {
        key: {BARE[key]: value} if key in BARE and isinstance(value, str) else value for key, value in content.items()
    }


def _axis(name: str, values: tuple[Any, ...], place: str) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Path of a matrix's field, and its values."""
    paths: dict[str, tuple[str, ...]] = {
        field: (field,) for field in ("publish_to", "label", "publish_text", "publish_log")
    }
    for part, kind in PARTS.items():
        for field in kind.model_fields:
            path = (part, field)
            # of fields of one name the first one's has it alone, as options have (capture.experts, probe.experts)
            paths.setdefault(part if BARE.get(part) == field else field, path)
            paths[f"{part}.{field}"] = path
    if name not in paths:
        short = sorted(known for known in paths if "." not in known)
        raise BadInput(f"{place}: [matrix]: {name} is not a field{nearest(name, short)}; known: {', '.join(short)}")
    if not values or len({json.dumps(value, default=str) for value in values}) < len(values):
        raise BadInput(f"{place}: [matrix]: {name} takes a list of different values; got {format_value(list(values))}")
    return paths[name], values


def _check_axes(
    axes: tuple[tuple[tuple[str, ...], tuple[Any, ...]], ...], entries: tuple[dict[str, Any], ...], place: str
) -> None:
    """Refuse an axis that every entry overrides: its values would be dropped silently."""
    for path, values in axes:
        if entries and all(holds(entry, path) for entry in entries):
            name = path[0] if BARE.get(path[0]) == path[-1] else ".".join(path)
            remedy = "write these as a [[study]] each" if path == ("model", "id") else "take it out, or theirs"
            lost = f"none of {format_value(list(values))} would run"
            raise BadInput(f"{place}: [matrix]: every [[study]] has its own {name}, so that {lost}: {remedy}")


def _nested(cell: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, value in cell:
        for step in reversed(path):
            value = {step: value}
        out = merged(out, value)
    return out


def _placed(content: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Make paths absolute, from `folder`: those that begin with ./ or ../, and those that exist there."""
    if folder is None:
        return content
    for part, field in PATHS:
        value = content.get(part, {}).get(field) if isinstance(content.get(part), dict) else None
        if not isinstance(value, str) or not value or value.startswith(("builtin:", "/", "~")):
            continue
        if value.startswith(("./", "../")) or (folder / value).exists() or part == "compute":
            content[part][field] = str((folder / value).resolve())
    return content


def _name(entry: dict[str, Any], spec: StudySpec, cell: list[tuple[tuple[str, ...], Any]], place: str) -> str:
    """The entry's name, else the model's, followed by the values of the matrix."""
    given = entry.get("name")
    if given is not None and not (isinstance(given, str) and re.fullmatch(NAME, given)):
        raise BadInput(f"{place}: name: letters, digits, '.', '_' and '-', at most 64; got {given!r}")
    # a study's name in a sweep is a key: that of a built-in model stays the end of its id
    short = short_model_name(spec.model.id.removeprefix("builtin:"))
    values = [value for path, value in cell if given or path != ("model", "id")]
    texts = ["+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value) for value in values]
    whole = "-".join([given or short, *(text.rstrip("/").rsplit("/", 1)[-1] for text in texts)])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", whole).lstrip("._-")[:64] or "study"


def _check_distinct(studies: list[SweepStudy], place: str) -> None:
    names: dict[str, int] = {}
    specs: dict[str, str] = {}
    for number, study in enumerate(studies, 1):
        same = specs.setdefault(digest(study.spec.model_dump(mode="json", exclude={"compute"})), study.name)
        if names.setdefault(study.name, number) != number:
            raise BadInput(f"{place}: two studies are called {study.name}: give each [[study]] a name of its own")
        if same != study.name:
            raise BadInput(f"{place}: {same} and {study.name} are the same study: leave one out, or give it a label")


def _together(studies: list[SweepStudy]) -> list[SweepStudy]:
    """Order studies as in the file, but put those that share a capture on a rented machine behind the first of them.

    The machine is kept from one to the next, and costs while other studies run between them.
    """
    first: dict[str, int] = {}
    for place, study in enumerate(studies):
        first.setdefault(study.capture_key, place)

    def turn(numbered: tuple[int, SweepStudy]) -> int:
        place, study = numbered
        return place if chosen(study.spec.compute.provider) == DEFAULT_PROVIDER else first[study.capture_key]

    return [study for _, study in sorted(enumerate(studies), key=turn)]

"""Finished studies: results as values and frames, from a workspace or from where they were published.

Every file is compared with the manifest's checksum when it is read.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from outliers.api.frames import Kind, framed
from outliers.errors import BadInput
from outliers.names import nearest
from outliers.publish.finished import read_finished
from outliers.publish.shelf import read_folders, read_store, read_study
from outliers.results.notes import ROWS_LEFT_OUT
from outliers.untrusted.strict_json import strict_json
from outliers.workspace import Workspace, open_workspace

NUMBERS = ("summary.json", "tokens.json", "features.parquet")
QUANTIZATION, EXPERTS, ROUTER = "quantization.parquet", "experts.parquet", "router.parquet"
OPTIONAL = (QUANTIZATION, EXPERTS, ROUTER)


@dataclass(frozen=True)
class Study:
    """One finished study. `place`: its folder or URL. `manifest`: what manifest.json says (docs/results.md)."""

    place: str
    manifest: Mapping[str, Any] = field(repr=False)
    _files: Mapping[str, bytes] = field(repr=False)

    @property
    def study_id(self) -> str:
        """The id of the study: same model, corpus, criteria and version, same id."""
        return str(self.manifest["study_id"])

    @property
    def capture_id(self) -> str:
        """The id of the activations; `open_capture` takes it where they are still in the workspace."""
        return str(self.manifest["capture_id"])

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json, a new copy each time; docs/results.md describes every key."""
        return dict(strict_json(self._files["summary.json"]))

    @property
    def tokens(self) -> dict[str, Any]:
        """tokens.json: the tokens at which outlier features are largest."""
        return dict(strict_json(self._files["tokens.json"]))

    def features(self, frame: Kind = "pandas") -> Any:
        """features.parquet: a row for each site, layer and feature that has a hit, with its exact counts.

        Of a large model not all rows are kept (docs/results.md): a warning says how many are.
        """
        import pyarrow.parquet as pq

        for note in self.summary.get("notes", ()):
            if note.startswith(ROWS_LEFT_OUT):
                warnings.warn(note, stacklevel=2)
        return framed(pq.read_table(io.BytesIO(self._files["features.parquet"])), frame)

    def quantization(self, frame: Kind = "pandas") -> Any:
        """quantization.parquet: a row for each site, layer and number format. Raises BadInput for a study without `--formats`."""
        import pyarrow.parquet as pq

        if QUANTIZATION not in self._files:
            raise BadInput(
                f"{self.place} has no {QUANTIZATION}: run the study with --formats, such as int8_token,nvfp4"
            )
        return framed(pq.read_table(io.BytesIO(self._files[QUANTIZATION])), frame)

    def experts(self, frame: Kind = "pandas") -> Any:
        """experts.parquet: a row for each layer and expert. Raises BadInput for a study that read no experts."""
        return self._of_experts(EXPERTS, frame)

    def router(self, frame: Kind = "pandas") -> Any:
        """router.parquet: a row for each layer with experts. Raises BadInput for a study that read no experts."""
        return self._of_experts(ROUTER, frame)

    def _of_experts(self, name: str, frame: Kind) -> Any:
        import pyarrow.parquet as pq

        if name not in self._files:
            raise BadInput(f"{self.place} has no {name}: the model has no experts, or the study ran with --experts off")
        return framed(pq.read_table(io.BytesIO(self._files[name])), frame)

    def systematic(self, frame: Kind = "pandas") -> Any:
        """A row for each systematic outlier feature, largest magnitude first; empty where there are none."""
        import pyarrow as pa

        columns = ("feature", "max_magnitude", "min", "max", "layer_fraction", "position_fraction", "sequences", "hits")
        rows = self.summary["systematic"]
        kinds = {"feature": pa.int64(), "sequences": pa.int64(), "hits": pa.int64()}
        table = {name: pa.array([row[name] for row in rows], kinds.get(name, pa.float64())) for name in columns}
        return framed(pa.table(table), frame)

    def _repr_html_(self) -> str:
        """What a notebook shows: the model, the reading, and the systematic features."""
        said, rows = self.manifest["headline"], self.summary["systematic"]
        head = ("feature", "max_magnitude", "min", "max", "layer_fraction", "position_fraction", "hits")
        cells = "".join("<tr>" + "".join(f"<td>{row[name]:.6g}</td>" for name in head) + "</tr>" for row in rows)
        title = (
            f"{said['model']}: {len(rows)} systematic outlier feature{'s' * (len(rows) != 1)} "
            f"by the reading {said['reading']} at {said['site']}"
        )
        names = "".join(f"<th>{name}</th>" for name in head)
        return f"<p>{escape(title)}</p><table><tr>{names}</tr>{cells}</table><p>{escape(self.place)}</p>"


def open_study(study: str | os.PathLike[str], workspace: str | os.PathLike[str] | None = None) -> Study:
    """The finished study of an id, of a results folder, or at the URL that `outliers study` prints when it publishes.

    workspace: where an id is looked for (default: $OUTLIERS_WORKSPACE, else ~/.outliers). Raises BadInput where there is no
    such study, DamagedResults or PublishRefused where a file is not what was written.
    """
    named = os.fspath(study)
    if "://" in named:
        found = read_study(named, NUMBERS)
        files = dict(found.files)
        there = {file["path"] for file in found.manifest["files"]}
        for name in OPTIONAL:
            files |= dict(read_study(named, (name,)).files) if name in there else {}
        return Study(found.url, found.manifest, files)
    folder = Path(named).expanduser()
    if os.sep not in named:
        folder = _folder_of(named, open_workspace(None if workspace is None else os.fspath(workspace)))
    finished = read_finished(folder)
    if finished is None:
        raise BadInput(f"{folder} holds no finished study: it has no manifest.json; run the study to its end")
    kept = (*NUMBERS, *OPTIONAL)
    return Study(str(folder), finished.manifest, {name: data for name, data in finished.files.items() if name in kept})


def _folder_of(study_id: str, workspace: Workspace) -> Path:
    """The results folder of an id, or of its beginning where that names one study."""
    known = sorted(path.parent.name for path in workspace.results.glob("*/manifest.json"))
    if study_id in known:
        return workspace.study(study_id)
    begun = [name for name in known if study_id and name.startswith(study_id)]
    if len(begun) == 1:
        return workspace.study(begun[0])
    which = f"{len(begun)} studies begin with" if begun else "there is no finished study"
    raise BadInput(f"{which} {study_id} in {workspace.root}{nearest(study_id, known)}; list_studies() lists all")


def list_studies(place: str | os.PathLike[str] | None = None, frame: Kind = "pandas") -> Any:
    """A row for each finished study of a workspace, or of an artifact store (a URL).

    Columns: study_id, capture_id, model, num_layers, hidden_size, num_tokens, site, reading, num_systematic, systematic (the 20
    features of largest magnitude; `Study.systematic` has all), place, which `open_study` takes. What can't be read is left
    out, with a warning that says why. Raises BadInput where there is no study.
    """
    import pyarrow as pa

    named = None if place is None else os.fspath(place)
    if named is not None and "://" in named:
        shelf = read_store(named, summaries=False)
    else:
        shelf = read_folders(open_workspace(named).results)
    for item in shelf.skipped:
        warnings.warn(f"{item.url} is left out: {item.why}", stacklevel=2)
    columns = ("model", "num_layers", "hidden_size", "num_tokens", "site", "reading", "num_systematic", "systematic")
    rows = [
        {"study_id": study.manifest["study_id"], "capture_id": study.manifest["capture_id"]}
        | {name: study.manifest["headline"][name] for name in columns}
        | {"place": study.url}
        for study in shelf.studies
    ]
    return framed(pa.Table.from_pylist(rows), frame)

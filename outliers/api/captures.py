"""A capture as lazy arrays with named dimensions: xarray over the Zarr group, each chunk checked when it is read.

bfloat16, which Zarr stores as its bits, is float32 on access: the same values. Positions past a sequence's end are NaN.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from outliers.api.routing import TableReader, dimensions_of
from outliers.errors import BadInput, CaptureError, CorruptCapture
from outliers.store.captures import find_capture
from outliers.store.chunks import ARRAYS, ChunkFiles, Journal
from outliers.store.fingerprint import layout_from, read_fingerprint
from outliers.store.journal import way_out
from outliers.store.verify import check_side
from outliers.study.expert_shapes import FIELDS
from outliers.study.layout import Layout
from outliers.units import format_ranges
from outliers.workspace import open_workspace

if TYPE_CHECKING:
    import xarray

DIMENSIONS = ("layer", "sequence", "position", "feature")


def open_capture(
    capture: str | os.PathLike[str],
    workspace: str | os.PathLike[str] | None = None,
    *,
    part: Literal["activations", "routing"] = "activations",
) -> xarray.Dataset:
    """The activations of a capture, by its id or its folder, as an xarray.Dataset that reads what is asked for.

    A variable for each site, of the dimensions (layer, sequence, position, feature); `to_dataarray("site")` makes the site a
    dimension too. A site whose width differs from the first one's has a dimension of its own, `feature_<site>`. Coordinates:
    `layer` (numbers of the model's layers), `length` (sequence; tokens), `token_id` (sequence, position). A chunk is read
    whole: all features of some positions of one layer and one sequence. Of a capture with --store rolling the attribute
    `freed_sequences` names the sequences that were counted and freed, such as `4:64`: reading one raises CaptureError.

    part: `routing` for the routing table of a mixture whose experts were read: a float32 variable for each field
    (`study.expert_shapes.FIELDS`) of the dimensions (layer, sequence, position, slot), router_margin without slots, and the same
    coordinates; NaN is unknown. A chunk is one field of one sequence, all layers.

    Raises BadInput where there is no such capture or part, or xarray is not installed, CaptureError for one that is not
    finished, CorruptCapture where lengths or token ids are not those that it was begun with; reading raises CorruptCapture where
    a checksum differs.
    """
    if part not in ("activations", "routing"):
        raise BadInput(f"open_capture: the part '{part}' is not known: give activations or routing")
    if importlib.util.find_spec("xarray") is None:
        raise BadInput("open_capture needs xarray: pip install 'outlier-features[notebook]'")
    import xarray
    import zarr

    home = open_workspace(None if workspace is None else os.fspath(workspace))
    folder = find_capture(home, os.fspath(capture))
    fingerprint = read_fingerprint(folder)
    if fingerprint is None:
        raise BadInput(f"{folder} is not a capture: it has no capture.json")
    layout = layout_from(fingerprint)
    journal = Journal.open(folder / "journal.jsonl")
    done, freed = journal.done, journal.freed
    if len(done) + len(freed) != layout.num_sequences:
        raise CaptureError(
            f"{folder} has {len(done)} of {layout.num_sequences} sequences: run its study again, which finishes it"
        )
    files, fixed = ChunkFiles(folder, layout), fingerprint["fixed"]
    if damage := check_side(files, fixed):
        raise CorruptCapture(f"{folder / damage[0].file} {damage[0].problem}: {way_out(folder)}")
    group = zarr.open_group(folder / ARRAYS, mode="r")
    variables = _sites(files, layout, done) if part == "activations" else _routing(files, layout, done)
    coordinates = {
        "layer": ("layer", list(layout.layers)),
        "length": ("sequence", np.asarray(group["lengths"])),
        "token_id": (("sequence", "position"), np.asarray(group["token_ids"])),
    }
    attributes = {name: fixed[name] for name in ("capture_id", "model", "revision") if name in fixed}
    if freed:
        attributes["freed_sequences"] = format_ranges(sorted(freed), half_open=True)
    return xarray.Dataset(variables, coordinates, attributes)


def _sites(files: ChunkFiles, layout: Layout, done: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Site -> its lazy variable."""
    width = next(iter(layout.widths.values()))
    found = {}
    for site, own in layout.widths.items():
        last = "feature" if own == width else f"feature_{site}"
        found[site] = ((*DIMENSIONS[:3], last), _lazy(SiteReader(files, layout, done, site)), {"dtype": layout.dtype})
    return found


def _routing(files: ChunkFiles, layout: Layout, done: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Field of the routing table -> its lazy variable. Raises BadInput where the capture read no experts."""
    fields = layout.experts.fields if layout.experts is not None else tuple(FIELDS)
    return {field: (dimensions_of(field), _lazy(TableReader(files, layout, done, field))) for field in fields}


def _lazy(reader: SiteReader | TableReader) -> Any:
    from xarray.core import indexing

    return indexing.LazilyIndexedArray(_adapter(reader))


def _adapter(reader: SiteReader | TableReader) -> Any:
    """A reader as xarray's lazy arrays ask for one: they give slices, integers and arrays, an axis each."""
    from xarray.backends import BackendArray
    from xarray.core.indexing import IndexingSupport, explicit_indexing_adapter

    class Lazy(BackendArray):
        """One site, or one field."""

        shape, dtype = reader.shape, reader.dtype

        def __getitem__(self, key: Any) -> Any:
            return explicit_indexing_adapter(key, self.shape, IndexingSupport.OUTER, reader.read)

    return Lazy()


class SiteReader:
    """One site of a finished capture, read chunk by chunk. `shape`: (layer, sequence, position, feature)."""

    def __init__(self, files: ChunkFiles, layout: Layout, done: dict[int, dict[str, Any]], site: str) -> None:
        self._files, self._layout, self._done = files, layout, done
        self._site = layout.aliases.get(site, site)
        self.shape = (len(layout.layers), layout.num_sequences, layout.positions, layout.widths[site])
        self.dtype = np.dtype(np.float32 if layout.dtype == "bfloat16" else layout.dtype)

    def read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """The values at an index for each axis: an integer, which drops its axis, a slice, or an array of integers."""
        axes = [np.arange(size)[index] for index, size in zip(key, self.shape, strict=True)]
        rows = [np.atleast_1d(axis) for axis in axes]
        found = np.full(tuple(row.size for row in rows), np.nan, self.dtype)
        for at, layer in enumerate(rows[0]):
            for number, sequence in enumerate(rows[1]):
                found[at, number] = self._pick(int(layer), int(sequence), rows[2], rows[3])
        return found.reshape(tuple(row.size for axis, row in zip(axes, rows, strict=True) if axis.ndim))

    def _pick(self, layer: int, sequence: int, positions: NDArray[np.int64], features: NDArray[np.int64]) -> Any:
        if sequence not in self._done:
            there = format_ranges(sorted(self._done), half_open=True)
            raise CaptureError(
                f"sequence {sequence} was counted and is not stored (--store), and {there} are there: --store-sequences keeps "
                "more, --store full all"
            )
        crcs = self._done[sequence]["crc32"][self._site]
        each = len(crcs) // len(self._layout.layers)
        rows = self._layout.chunk_positions
        found = np.full((positions.size, features.size), np.nan, self.dtype)
        for chunk in np.unique(positions // rows):
            if chunk >= each:
                continue  # past the sequence's end
            values = self._files.read(self._site, layer, sequence, int(chunk), crcs[layer * each + int(chunk)])
            mine = positions // rows == chunk
            found[mine] = as_numbers(values, self._layout.dtype)[np.ix_(positions[mine] - chunk * rows, features)]
        return found


def as_numbers(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Stored values as numbers: the bits of bfloat16 become float32, which has them exactly."""
    if dtype != "bfloat16":
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)

"""Arrow tables as the frames that people work with; pandas and polars are imported at their first use."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from outliers.errors import BadInput

Kind = Literal["pandas", "polars", "arrow"]


def framed(table: Any, kind: Kind) -> Any:
    """A pyarrow.Table as a pandas.DataFrame, a polars.DataFrame, or as it is.

    Raises BadInput for another kind, and where the library is not installed.
    """
    if kind == "arrow":
        return table
    if kind not in ("pandas", "polars"):
        raise BadInput(f"'{kind}' is not a kind of frame: pandas, polars or arrow")
    if importlib.util.find_spec(kind) is None:
        raise BadInput(f"{kind} is not installed: pip install {kind}, or ask for the frame 'arrow'")
    if kind == "pandas":
        return table.to_pandas()
    import polars

    return polars.from_arrow(table)

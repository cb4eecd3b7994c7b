"""The tables of docs/results.md, made from the models that write and read the files.

    python -m tests.support.result_tables        writes them anew, after a field or its description was changed

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is that of its model.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from outliers.atlas.row import AtlasFeature, AtlasRow
from outliers.results import schema
from outliers.results.schema.describe import markdown_table
from outliers.results.schema.fields import Strict

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "results.md"
ARROW = (
    *(schema.FeatureRecord, schema.QuantizationRecord, schema.ExpertRecord, schema.RouterRecord),
    *(schema.SensitivityRecord, AtlasRow, AtlasFeature),
)


def models() -> dict[str, type]:
    """Every model that is a part of a file, by name."""
    parts = [item for item in vars(schema).values() if isinstance(item, type) and issubclass(item, BaseModel)]
    return {model.__name__: model for model in (*parts, *ARROW) if model is not Strict}


def with_tables(text: str) -> str:
    """The document with its tables made anew. Raises KeyError for a table of no model."""
    known = models()

    def table(found: re.Match[str]) -> str:
        model = known[found[1]]
        return f"<!-- {found[1]} -->\n{markdown_table(model, arrow=model in ARROW)}<!-- /{found[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Write the tables into docs/results.md."""
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()

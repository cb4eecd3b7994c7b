"""A StudySpec as the words of the command `outliers study`: how its options are spelled, and the words that ask for one.

The command makes its parser of the same names (`flows.cli.options`), so that what is printed here can be typed there. It
knows no file and no machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outliers.spec import PARTS, StudySpec

RENAMED = {
    ("model", "id"): "model",
    ("corpus", "source"): "corpus",
    ("model", "name"): "model_name",
    ("corpus", "name"): "corpus_name",
    ("capture", "site_modules"): "site_module",
    ("probe", "experts"): "probe_experts",
}
"""Two fields bear the name of their part on the command line, one is given once a site, and of fields that two parts have the
part's name is a part too; all others bear their own."""
REPEATED = ("site_modules",)
"""Fields that are given once for each of their values."""
ALWAYS = (
    ("model", "id"),
    ("model", "revision"),
    ("model", "dtype"),
    ("corpus", "source"),
    ("corpus", "num_sequences"),
    ("corpus", "sequence_length"),
)
"""Fields that are said even where they are the default: a later version may have another one."""
ELSEWHERE = ("compute", "probe")
"""Parts that no number of a study depends on."""
RESULTS = ("label", "publish_text")
"""Fields of a StudySpec itself that are said; `publish_to` is for who runs it to choose."""


def option_name(part: str, field: str) -> str:
    """`--num-sequences` for corpus.num_sequences."""
    return "--" + RENAMED.get((part, field), field).replace("_", "-")


def study_words(spec: StudySpec, instead: Mapping[tuple[str, str], str] | None = None) -> list[str]:
    """`outliers study ...` as words, with every option on which a number depends; no machine and no target.

    `instead`: other words in the place of a field's value, by (part, field), such as a path for a model of somebody's own.
    """
    words = ["outliers", "study"]
    for part, model in PARTS.items():
        own = getattr(spec, part)
        for name, field in model.model_fields.items() if part not in ELSEWHERE else ():
            value = (instead or {}).get((part, name), getattr(own, name))
            if value is None or ((part, name) not in ALWAYS and value == field.get_default(call_default_factory=True)):
                continue
            words += _words(option_name(part, name), name, value)
    for name in RESULTS:
        if (value := getattr(spec, name)) != StudySpec.model_fields[name].default:
            words += _words(option_name("", name), name, value)
    return words


def _words(option: str, name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option]
    if name in REPEATED:
        return [word for item in value for word in (option, item)]
    return [option, ",".join(map(_text, value)) if isinstance(value, tuple) else _text(value)]


def _text(value: Any) -> str:
    """A value as it is typed: 6 for 6.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

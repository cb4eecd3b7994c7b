"""Filters of the atlas page: values of criteria and arithmetic, each with a box that can be unticked.

The page runs no script: its style hides what is unticked. A browser without `:has` shows everything and no boxes. Classes of the
style hold numbers, never a value, because a value may be any text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MAX_VALUES = 12
"""With more values a choice is a list of its own to read, and is left out."""


@dataclass(frozen=True)
class Value:
    """One box: `key` names it in the page, `text` is its label, `count` how many studies have it."""

    key: str
    text: str
    count: int


@dataclass(frozen=True)
class Choice:
    """The boxes of one property of the studies."""

    name: str
    values: tuple[Value, ...]


def choices(facts: Mapping[str, Sequence[str]]) -> tuple[Choice, ...]:
    """The choices among `facts`: name -> a text for each study, in the page's order. None where all studies are the same."""
    found = []
    for place, (name, texts) in enumerate(facts.items()):
        counts = Counter(texts)
        if 1 < len(counts) <= MAX_VALUES:
            values = (Value(f"{place}-{number}", text, counts[text]) for number, text in enumerate(counts))
            found.append(Choice(name, tuple(values)))
    return tuple(found)


def keys(made: Iterable[Choice], facts: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of the boxes of which each has to be ticked for what has these `facts` to be seen."""
    return tuple(
        value.key
        for choice in made
        for value in choice.values
        if choice.name in facts and value.text == facts[choice.name]
    )


def classes(own: Iterable[str]) -> str:
    """The classes by which the style hides something with these keys."""
    return " ".join(f"is-{key}" for key in own)

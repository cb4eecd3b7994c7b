"""What a person sees at the terminal: progress while a study runs, the table at its end. Everything goes to standard error
but the answer itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from outliers.events import Event
from outliers.outcome import Outcome
from outliers.plan import Plan

TABLE_ROWS = 30


class Steps:
    """Progress bars of the steps of a study, fed with the events of its jobs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bars: dict[str, TaskID] = {}
        self._tenth: dict[str, int] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bars while the block runs."""
        if not self.console.is_terminal:
            yield
            return
        with self._progress:
            yield

    def listen(self, step: str, event: Event) -> None:
        """One event of a job; hang this into `tasks.watch.LISTENERS`."""
        if event.kind == "log":
            self.console.print(Text(f"  {step}: {event.message}", style="" if event.level == "info" else "yellow"))
        elif event.kind == "progress" and event.total:
            if self.console.is_terminal:
                self._bar(event)
            else:
                self._line(event)

    def _bar(self, event: Event) -> None:
        if event.step not in self._bars:
            self._bars[event.step] = self._progress.add_task(event.step, total=event.total, unit=event.unit)
        self._progress.update(self._bars[event.step], completed=event.done)

    def _line(self, event: Event) -> None:
        """Without a terminal: a line at each tenth, so that a log stays a log."""
        tenth = 10 * event.done // (event.total or 1)
        if tenth > self._tenth.get(event.step, -1):
            self._tenth[event.step] = tenth
            self.console.print(f"  {event.step} {event.done:,} of {event.total:,} {event.unit}")


def show_outcome(console: Console, outcome: Outcome, held: int, answer: str) -> None:
    """The answer, the table, and where everything is. `held`: bytes of the capture on disk; `answer`: the rule in words."""
    count = len(outcome.systematic)
    console.print()
    if outcome.cached:
        console.print(f"[bold]{outcome.title}[/bold] was there already: nothing had to run")
    console.print(
        f"[bold]{count} systematic outlier feature{'' if count == 1 else 's'}[/bold] {answer}", highlight=False
    )
    if outcome.systematic:
        console.print(feature_table(outcome.systematic))
    if count > TABLE_ROWS:
        console.print(f"and {count - TABLE_ROWS} more, in the report")
    places = Table.grid(padding=(0, 2))
    places.add_row("report", Text(outcome.report))
    places.add_row("results", Text(outcome.results))
    if outcome.published:
        places.add_row("published", Text(f"{outcome.published} ({outcome.published_bytes / 1000:.0f} KB)"))
    if held:
        places.add_row("capture", Text(f"{outcome.capture_id}, {held / 1e6:,.0f} MB (`outliers captures rm` frees it)"))
    console.print(places, soft_wrap=True)


def feature_table(features: list[dict[str, Any]]) -> Table:
    """FEATUREs, the largest first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("feature", "max magnitude", "min", "max", "% of layers", "% of tokens", "sequences", "hits"):
        table.add_column(name, justify="right")
    for item in features[:TABLE_ROWS]:
        share = item["position_fraction"]
        table.add_row(
            str(item["feature"]),
            f"{item['max_magnitude']:g}",
            f"{item['min']:g}",
            f"{item['max']:g}",
            f"{100 * item['layer_fraction']:.1f}",
            "" if share is None else f"{100 * share:.1f}",
            f"{item['sequences']}/{item['of_sequences']}",
            f"{item['hits']:,}",
        )
    return table


def show_plan(console: Console, plan: Plan) -> None:
    """A plan as a table: what, how much, and where it would run."""
    table = Table.grid(padding=(0, 2))
    experts = f", {plan.num_experts} experts a layer" if plan.num_experts else ""
    table.add_row("model", Text(f"{plan.model}: {plan.architecture}, {plan.num_layers} layers{experts}, {plan.dtype}"))
    table.add_row("parameters", f"{count(plan.total_parameters)} total, {count(plan.active_parameters)} active")
    table.add_row("weights", size(plan.weight_bytes))
    table.add_row("memory", f"{size(plan.ram_bytes)} without a GPU; {size(plan.vram_bytes)} of GPU memory with one")
    table.add_row("disk", f"{size(plan.capture_bytes)} for the capture ({plan.capture_bytes:,} bytes)")
    if plan.capture_bytes_left != plan.capture_bytes:
        table.add_row("", f"{size(plan.capture_bytes_left)} of it still to write")
    table.add_row("tokens", f"{plan.tokens:,}")
    if plan.seconds:
        table.add_row("time", ", ".join(f"{step} about {seconds:g} s" for step, seconds in plan.seconds.items()))
    for offer in plan.offers:
        gpus = ", ".join(f"{gpu['name']} ({size(gpu['total_bytes'])})" for gpu in offer["gpus"]) or "no GPU"
        table.add_row(
            "machine",
            f"{offer['name']}: ${offer['price_per_hour']:.2f} an hour, {offer['cpus']} cores, {gpus}, "
            f"{size(offer['ram_available_bytes'])} of memory and {size(offer['disk_free_bytes'])} of disk free",
        )
    console.print(table, highlight=False, soft_wrap=True)
    for line in plan.assumptions:
        console.print(Text(f"  {line}", style="dim"))
    for line in plan.refusals:
        console.print(Text(f"does not fit: {line}", style="red"))


def count(number: int) -> str:
    """A number of parameters: 134.5M, 30.5B."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f}{unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes in powers of ten, as disks and the options count them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number} bytes"

"""The terminal: progress while a study runs on standard error, and the answer at its end on standard output (`answers`)."""

from __future__ import annotations

import contextlib
import logging
import shlex
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from flows.cli.answers import Answers
from outliers.events.event import LEVELS, Event
from outliers.units import clip, format_seconds
from outliers.untrusted.visible import visible

if TYPE_CHECKING:
    from outliers.planning.plan import GpuShare, Plan
    from outliers.publish.outcome import Outcome

TABLE_ROWS = 30
PLAN_OFFERS = 8
MB = 1_000_000
RATE_SECONDS = 5.0
"""How long a step runs before the time that is left is shown."""
PHASE_COLUMNS = 16
"""Columns of a phase's line that its spinner and its time take."""


@contextlib.contextmanager
def busy(console: Console, text: str) -> Iterator[None]:
    """Show a spinner and the time that has passed while the block runs, on a terminal."""
    if not console.is_terminal:
        yield
        return
    with _phase_line(console) as shown:
        shown.add_task(text, total=None)
        yield


@contextlib.contextmanager
def library_lines(console: Console) -> Iterator[None]:
    """Show the library's own log lines while the block runs: for instance, what is damaged and made again."""
    logger = logging.getLogger("outliers")
    handler = LineHandler(console)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class LineHandler(logging.Handler):
    """Prints log records on a console without control characters: they name files and models, and quote other programs."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        print_line(self._console, self.format(record), record.levelno)


def print_line(console: Console, text: str, level: int) -> None:
    """Print one line of a log, from a warning on in yellow. A terminal breaks it between words; a file gets one line."""
    style = "yellow" if level > logging.INFO else ""
    console.print(Text(visible(text), style=style), soft_wrap=not console.is_terminal)


def _phase_line(console: Console) -> Progress:
    """One line that goes when it ends: a spinner, what is done, and for how long."""
    words = TextColumn("{task.description}", markup=False)
    return Progress(SpinnerColumn(), words, TimeElapsedColumn(), console=console, transient=True)


class Remaining(ProgressColumn):
    """The time that is left, once a step has run for RATE_SECONDS: an estimate from its first moments is far off."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Empty before there is a rate and after the end."""
        long_enough = task.finished or (task.elapsed or 0.0) >= RATE_SECONDS
        left = task.time_remaining if long_enough and not task.finished else None
        return Text("" if left is None else f"{format_seconds(left)} left", style="progress.remaining")


class Steps:
    """Progress bars of the steps of a study, fed with the events of its jobs, and a line of what has no bar yet.

    Loading weights, compiling and dequantizing count nothing: the line has the step's last message and its age.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<8}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TimeElapsedColumn(),
            Remaining(),
            console=console,
        )
        self._phase = _phase_line(console)
        self._now: TaskID | None = None
        # the tasks of several parts speak at once
        self._lock = threading.Lock()
        self._bars: dict[str, TaskID] = {}
        self._tenth: dict[str, int] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bars while the block runs."""
        if not self.console.is_terminal:
            yield
            return
        with Live(Group(self._progress, self._phase), console=self.console, refresh_per_second=8, transient=False):
            try:
                yield
            finally:
                self._say(None)

    def listen(self, step: str, event: Event) -> None:
        """One event of a job; a listener for `StudyRun.listen`."""
        if event.kind == "log":
            print_line(self.console, f"  {step}: {event.message}", LEVELS[event.level])
            self._say(f"{step}: {event.message}")
        elif event.kind == "progress" and event.total:
            # a bar that is full says nothing of what follows it
            self._say(step if event.done >= event.total else None)
            event = _readable(event)
            if self.console.is_terminal:
                self._bar(event)
            else:
                self._line(event)

    def _say(self, text: str | None) -> None:
        """Show `text` and, from now on, its age below the bars; None shows nothing."""
        with self._lock:
            if self._now is not None:
                self._phase.remove_task(self._now)
                self._now = None
            if text is not None and self.console.is_terminal:
                room = max(PHASE_COLUMNS, self.console.width - PHASE_COLUMNS)
                self._now = self._phase.add_task(clip(visible(text), room), total=None)

    def _bar(self, event: Event) -> None:
        if event.step not in self._bars:
            self._bars[event.step] = self._progress.add_task(event.step, total=event.total, unit=event.unit)
        self._progress.update(self._bars[event.step], completed=event.done)

    def _line(self, event: Event) -> None:
        """Without a terminal: a line at each tenth, so that a log stays a log."""
        tenth = 10 * event.done // (event.total or 1)
        if tenth > self._tenth.get(event.step, -1):
            self._tenth[event.step] = tenth
            self.console.print(Text(f"  {event.step} {event.done:,} of {event.total:,} {event.unit}"))


def _readable(event: Event) -> Event:
    """Bytes as MB: eleven digits are hard to read."""
    if event.unit != "bytes" or event.total is None:
        return event
    return replace(event, done=-(-event.done // MB), total=-(-event.total // MB), unit="MB")


def next_commands(outcome: Outcome, workspace: str | None) -> list[str]:
    """What a person may ask next of a finished study, as commands. workspace: the folder that was given, None for the default."""
    study, place = outcome.study_id, f" --workspace {shlex.quote(workspace)}" if workspace else ""
    feature = f" --feature {outcome.systematic[0]['feature']}" if outcome.systematic else ""
    found = [f"outliers runs show {study}{feature}{place}"]
    if outcome.verdict is None:
        return [*found, f"outliers probe {study} --check{place}"]
    found.append(f"outliers advise {study} --budget 0.1{place}")
    return [*found, f"outliers export {study} --to llm-compressor --out recipe.yaml{place}"]


def show_outcome(console: Answers, outcome: Outcome, held: int, answer: str, commands: Sequence[str] = ()) -> None:
    """The answer, the table, and where everything is.

    held: bytes of the capture on disk. answer: the rule in words. commands: what may be asked next.
    """
    count = len(outcome.systematic)
    console.print()
    if outcome.cached:
        console.print(Text.assemble((visible(outcome.title), "bold"), " was there already: nothing had to run"))
    else:
        line(console, "study", f"{outcome.model} on {outcome.corpus}" if outcome.corpus else outcome.title)
    plural = "" if count == 1 else "s"
    others = f" ({outcome.disagreement})" if outcome.disagreement else ""
    head = (f"{count} systematic outlier feature{plural}", "bold")
    console.print(Text.assemble(head, visible(f" {answer}{others}")), soft_wrap=True)
    if outcome.systematic:
        console.table(feature_table(outcome.systematic))
    if count > TABLE_ROWS:
        console.print(f"and {count - TABLE_ROWS} more, in the report")
    for text in outcome.remarks():
        console.prose(visible(text))
    if outcome.verdict:
        console.print()
        console.prose(visible(outcome.verdict))
        console.print()
    line(console, "report", outcome.report)
    if outcome.probe:
        line(console, "probe", outcome.probe)
    line(console, "results", outcome.results)
    if outcome.published:
        line(console, "published", f"{outcome.published} ({outcome.published_bytes / 1000:.0f} KB)")
    if held:
        line(console, "capture", f"{outcome.capture_id}, {size(held)} (`outliers captures rm` frees it)")
    for number, command in enumerate(commands):
        line(console, "" if number else "next", command)


def line(console: Console, name: str, text: str, style: str = "") -> None:
    """One named fact; never broken into lines, so that a path can be copied."""
    console.print(Text(f"{name:<11} ", style="bold"), Text(visible(text), style=style), sep="", soft_wrap=True)


def feature_table(features: list[dict[str, Any]]) -> Table:
    """FEATUREs, the largest first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("feature", "magnitude", "min", "max", "% layers", "% tokens", "sequences", "hits"):
        table.add_column(name, justify="right", no_wrap=True)
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


def show_plan(console: Answers, plan: Plan) -> None:
    """A plan: what, how much, and where it would run."""
    from outliers.planning.plan import GpuShare

    experts = f", {plan.num_experts} experts a layer" if plan.num_experts else ""
    name = plan.model_name or plan.model
    line(console, "model", f"{name}: {plan.architecture}, {plan.num_layers} layers{experts}, {plan.dtype}")
    line(console, "parameters", f"{count(plan.total_parameters)} total, {count(plan.active_parameters)} active")
    line(
        console, "weights", f"{size(plan.weight_bytes)} in memory{_stored(plan)}, {size(plan.checkpoint_bytes)} on disk"
    )
    if plan.download_bytes:
        line(console, "download", f"{size(plan.download_bytes)} from the hub")
    line(console, "memory", f"{size(plan.ram_bytes)} without a GPU, {size(plan.host_ram_bytes)} with")
    if plan.schedule == "layers":
        reason = plan.schedule_reason or "a layer at a time (--schedule layers)"
        line(console, "schedule", f"{reason}; {size(plan.spool_bytes)} of disk between layers")
    for share in plan.gpus:
        which = "on a GPU" if len(plan.gpus) == 1 else f"on GPU {share.gpu}"
        cut = "" if len(plan.gpus) == 1 else f", where the model is cut over {len(plan.gpus)}"
        line(console, which, f"{gpu_share(share)}: one of {size(share.needed_bytes)} or more{cut}")
    line(console, "tokens", f"{plan.tokens:,}")
    if plan.spread:
        line(console, "shards", plan.spread)
    line(console, "disk", _disk(plan))
    if plan.experts == "off" and plan.num_experts:
        line(console, "experts", f"not read{', ' + plan.experts_reason if plan.experts_reason else ' (--experts)'}")
    if plan.experts != "off":
        why = f", {plan.experts_reason}" if plan.experts == "routing" and plan.experts_reason else ""
        took = f"{size(plan.experts_bytes)} of the memory is for this, {size(plan.counting_bytes)} to count them after the pass"
        line(console, "experts", f"{_EXPERTS[plan.experts]}{why}; {took}")
    line(console, "kept there", f"{size(plan.private_bytes)} of statistics, which `outliers export --full` brings home")
    for text in plan.assumptions:
        step, _, assumption = text.partition(": ")
        known = f"about {format_seconds(plan.seconds[step])}" if step in plan.seconds else "not known"
        line(console, step, f"{known}: {assumption}")
    for offer in plan.offers[:PLAN_OFFERS]:
        names = [gpu["name"] for gpu in offer["gpus"]]
        gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "no GPU"
        lasts = f"{'more than' if offer['left_out'] else 'about'} {format_seconds(offer['total_seconds'])}"
        lasts += f" without {' and '.join(offer['left_out'])}" if offer["left_out"] else ""
        cost = "" if offer["total_price"] is None else f", ${offer['total_price']:.2f} in all"
        many = offer["machines"]
        paid = f"${offer['price_per_hour']:.2f} an hour" + (f" each, {many} of them" if many > 1 else "")
        price = f"{paid}, {lasts}{cost}" if offer["price_per_hour"] else lasts
        free = f"{size(offer['ram_available_bytes'])} of memory and {size(offer['disk_free_bytes'])} of disk free"
        line(console, "machine", f"{offer['name']}: {price}; {offer['cpus']} cores, {gpus}, {free}")
        if offer is not plan.offers[0]:
            continue
        if offer["processes"] > 1:
            line(console, "processes", _side_by_side(offer))
        elif offer["placement"]:
            line(console, "", _placed(offer["placement"], len(offer["shares"]), len(plan.gpus)))
        for share in map(GpuShare.model_validate, offer["shares"]):
            total = size(offer["gpus"][share.gpu]["total_bytes"])
            line(console, f"GPU {share.gpu}", f"{gpu_share(share)}, of {total}")
    if len(plan.offers) > PLAN_OFFERS:
        line(console, "", f"and {len(plan.offers) - PLAN_OFFERS} more machines that fit (--json shows all)")
    for text in plan.hints:
        line(console, "hint", text)


def show_refusals(console: Console, plan: Plan) -> None:
    """Why a plan can't be run, on standard error as every refusal is."""
    for text in plan.refusals:
        line(console, "refused", text, style="red")


_EXPERTS = {"all": "every expert is read", "routing": "the routing is read, without the experts' values"}


def _disk(plan: Plan) -> str:
    """What the capture takes of the disk."""
    whole = f"{size(plan.capture_bytes)} for the capture ({plan.capture_bytes:,} bytes)"
    if plan.store == "full":
        return whole
    if plan.store == "none":
        memory = size(plan.device_pass_bytes if plan.gpus else plan.host_pass_bytes)
        kept, of = size(plan.held_bytes), "each GPU's memory" if plan.gpus else "main memory"
        return f"{kept} for the first sequences, of {whole}: --store none counts in the pass, in {memory} of {of}"
    return f"at most {size(plan.held_bytes)} at once, of {whole}: --store {plan.store}"


def _stored(plan: Plan) -> str:
    """How the weights lie in memory, where the checkpoint has them quantized."""
    if plan.quantization:
        return f" as they are stored ({plan.quantization})"
    return f", made plain ({plan.dtype}) from {plan.stored_quantization}" if plan.stored_quantization else ""


def _side_by_side(offer: dict[str, Any]) -> str:
    """How several processes of an offer share its GPUs and memory."""
    gpus = len(offer["shares"])
    own = f", each with {gpus} GPU{'s' * (gpus > 1)} of its own" if gpus else " on its cores"
    return f"{offer['processes']} at once{own}; {size(offer['needed_ram_bytes'])} of memory together"


def _placed(sentence: str, used: int, asked: int) -> str:
    """Where the model lies; of fewer GPUs than were asked, why."""
    if used >= asked:
        return sentence
    whole = "it holds the whole model" if used == 1 else "they hold the whole model"
    return f"{sentence}: {whole}, which is cut over {asked} only where it must be"


def gpu_share(share: GpuShare) -> str:
    """What one GPU holds: layers, weights, and the work of a layer."""
    return f"layers {share.layers}, {size(share.weight_bytes)} of weights and {size(share.work_bytes)} of work"


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

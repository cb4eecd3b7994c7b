"""The step `probe`: reads some sequences of a captured study again, with changes, and writes what they do to the model.

    <capture>/probes/<probe_id>/begun.json          the conditions that a resumed probe must match; sealed
    <capture>/probes/<probe_id>/statistics.npz      what the untouched pass shows of each site, with its seal next to it
    <capture>/probes/<probe_id>/journal.jsonl       a line for each (change, sequence)
    <capture>/probes/<probe_id>/numbers/            probes.json, sensitivity.parquet, and their checksums
    <capture>/probes/<probe_id>/lock                held by the process that measures

A killed probe goes on after its journal, and ends with the bits of one that was not. Under other conditions it is refused.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outliers.capture.devices import Devices, choose_devices
from outliers.capture.extract import conditions
from outliers.capture.library_errors import explained
from outliers.capture.load import PLAIN, fetch_weights, load_model
from outliers.corpus.tokens import Corpus, load_corpus
from outliers.errors import Busy, CaptureMismatch
from outliers.events.stream import Reporter
from outliers.files.atomic import write_atomic
from outliers.files.sealed import check_folder, drop_folder, read_sealed, seal_folder, write_sealed
from outliers.locks import held_if_free
from outliers.probe.asked import AUTO, asked_of, needs_findings
from outliers.probe.changes import (
    Change,
    Known,
    all_changes,
    error_formats,
    feature_sites,
    held_features,
    held_sites,
    quantized_sites,
)
from outliers.probe.checks import check_probe
from outliers.probe.engine import Batch, Engine
from outliers.probe.expert_choice import (
    Expert,
    Role,
    choose_experts,
    mapped_experts,
    routed_layers,
    wanted_experts,
)
from outliers.probe.findings import Findings, find_findings, require_findings
from outliers.probe.formats import Ranges
from outliers.probe.journal import ProbeJournal
from outliers.probe.numbers import Checked, Made, write_numbers
from outliers.probe.prefix import prefix_ids
from outliers.probe.readers import find_readers
from outliers.probe.session import Session, sharing_holds
from outliers.probe.sharing import Kept, kept_layers
from outliers.probe.silence import count_load
from outliers.probe.single_weights import Single, choose_weights, resolve_weights, spike_modules
from outliers.probe.statistics import LOAD, Collector, Rotated, Statistics, load, save, watch_spike
from outliers.probe.weights import is_transposed
from outliers.results.schema.probes import sensitivity_bytes
from outliers.spec.formats import parse_format
from outliers.store.chunks import Journal
from outliers.store.fingerprint import difference, read_fingerprint
from outliers.study.prepare import Prepared, model_info
from outliers.study.probes import PROBES, SENSITIVITY, probe_folder, probe_id
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

NUMBERS, JOURNAL, BEGUN = "numbers", "journal.jsonl", "begun.json"
_MEMORY = "give fewer --batch-sequences, a shorter --sequence-length, or a machine with more memory (--min-vram, --min-cpu-ram)"


def has_probe(prepared: Prepared, workspace: Workspace) -> bool:
    """Whether the numbers of the probe are here, every file of them as it was written."""
    return check_folder(probe_folder(prepared, workspace) / NUMBERS)


def probe(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    """Make or finish the probe that a prepared study asks for; what this call did.

    Raises BadInput for a probe that can't be made, Busy if another process makes it, CaptureMismatch under other conditions,
    ProbeMismatch where a check fails, SiteError where the readers of a site can't be found, and what loading a model raises.
    """
    check_probe(prepared)
    own = probe_id(prepared)
    folder = probe_folder(prepared, workspace)
    folder.mkdir(parents=True, exist_ok=True)
    with held_if_free(folder / "lock") as free:
        if not free:
            raise Busy(f"another process makes the probe {own} in {folder}: wait for it, or end it")
        if has_probe(prepared, workspace):
            log.info("the probe %s is complete: nothing to measure", own)
            reporter.progress("probe", 1, 1, "passes")
            return {"probe_id": own, "seconds": 0.0}
        return _Run(prepared, workspace, reporter, folder, own).run()


class _Run:
    """One call of `probe` that has something to do."""

    def __init__(self, prepared: Prepared, workspace: Workspace, reporter: Reporter, folder: Path, own: str) -> None:
        self.prepared, self.workspace, self.reporter = prepared, workspace, reporter
        self.folder, self.own = folder, own
        self.asked = asked_of(prepared.spec)

    def run(self) -> dict[str, Any]:
        """Load the model, look, measure, write."""
        began = time.monotonic()
        corpus = load_corpus(self.prepared.corpus, self.workspace)
        findings = find_findings(self.prepared, self.workspace, corpus)
        wanted_experts(self.prepared, findings.super_experts)
        systematic = require_findings(findings, self.prepared) if needs_findings(self.prepared.spec) else ()
        prefix = prefix_ids(self.prepared, self.workspace, findings.massive_token)
        spec = self._spec()
        info = self.prepared.model if spec is self.prepared.spec else model_info(spec, self.workspace)
        named = resolve_weights(self.prepared, self.workspace)
        devices = choose_devices(spec, info)
        compared = self._begin(self.prepared.model_copy(update={"model": info, "spec": spec}), devices)
        fetch_weights(
            info, self.workspace, lambda done, total: self.reporter.progress("download", done, total, "bytes")
        )
        model = load_model(info, self.workspace, devices.map(info), head=True)
        loaded = time.monotonic()
        log.info("loaded %s on %s in %.1f s", info.source.name, devices.kind, loaded - began)
        with explained(f"a probe of {info.source.name}", _MEMORY, PLAIN):
            result = self._measure(model, corpus, findings, systematic, prefix, named, devices, compared)
        return result | {
            "load_seconds": round(loaded - began, 3),
            "seconds": round(time.monotonic() - loaded, 3),
            "device": devices.kind,
        }

    def _spec(self) -> Any:
        """The spec in the dtype of the probe, with the head that it uses."""
        spec = self.prepared.spec
        if self.asked.probe_dtype == "study" or self.prepared.model.dtype == self.asked.probe_dtype:
            return spec
        return spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": self.asked.probe_dtype})})

    def _begin(self, prepared: Prepared, devices: Devices) -> str | None:
        """Check the conditions of an earlier begin, or note them; why losses can't be compared with the capture's, if so."""
        fixed = conditions(prepared, devices)
        found = read_sealed(self.folder / BEGUN)
        capture = self.workspace.capture(prepared.capture_id)
        captured = read_fingerprint(capture)
        if found is None:
            for name in (JOURNAL, "statistics.json"):
                (self.folder / name).unlink(missing_ok=True)
            threads = captured["threads"] if captured is not None else torch.get_num_threads()
            found = {"fixed": fixed, "threads": threads}
            write_sealed(self.folder / BEGUN, found)
        elif differs := difference(found, fixed):
            raise CaptureMismatch(
                f"the probe {self.own} was begun {differs}: go on under the old one, or remove {self.folder} and begin again"
            )
        torch.set_num_threads(int(found["threads"]))
        if captured is None:
            return "the capture is not on this machine"
        differs = difference(captured, fixed)
        return None if differs is None else f"the capture was begun {differs}"

    def _captured(self, why_not: str | None) -> tuple[dict[int, float], str | None]:
        """sequence -> loss in the capture's journal, and why there are none."""
        if why_not is not None:
            return {}, why_not
        journal = Journal.open(self.workspace.capture(self.prepared.capture_id) / "journal.jsonl")
        found = {sequence: float(line["nll"]) for sequence, line in journal.done.items() if "nll" in line}
        return found, None if found else "the capture has no losses (--perplexity)"

    def _measure(
        self,
        model: Any,
        corpus: Corpus,
        findings: Findings,
        systematic: tuple[int, ...],
        prefix: tuple[int, ...],
        named: tuple[Single, ...],
        devices: Devices,
        why_not: str | None,
    ) -> dict[str, Any]:
        prepared = self.prepared
        captured, why_not = self._captured(why_not)
        batches = batches_of(prepared, corpus, devices.first)
        engine = self._engine(model, batches[0], prefix)
        wanted = wanted_experts(prepared, findings.super_experts)
        statistics = self._statistics(engine, batches, systematic, wanted)
        prefer = self.asked.probe_dtype == "study" or prepared.model.dtype == self.asked.probe_dtype
        ranges = Ranges(findings, statistics, prefer)
        weights = choose_weights(engine, named, statistics, self.asked.weight, self.own)
        load = expert_load(statistics, prepared)
        chosen = choose_experts(wanted, load, self.own)
        mapped = tuple((layer, expert) for layer, expert in mapped_experts(prepared) if load[layer][expert])
        engine.silent_layers, engine.mapped = chosen.layers, dict(reversed(mapped))
        known = Known(
            systematic=systematic,
            magnitudes=ranges.magnitudes(feature_sites(prepared)),
            weights=tuple((one.at, one.group, one.of) for one in weights),
            floor_feature=_middle(statistics.mean_square(feature_sites(prepared)[0], prepared.layers[0])),
            silenced=chosen,
            mapped=mapped,
        )
        kept = self._kept(engine, batches[0], ranges, all_changes(prepared, known, self.own, shared=False))
        changes = all_changes(prepared, known, self.own, shared=kept is not None)
        journal = ProbeJournal.open(self.folder / JOURNAL)
        advance = self._progress(batches, changes)
        log.info("%d changes on %d sequences", len(changes), sum(batch.counted for batch in batches))
        Session(engine, journal, changes, ranges, kept, captured, error_formats(prepared), advance).run(batches)
        gates = Checked(captured=captured, why_not=why_not, shared=kept.wanted if kept is not None else ())
        unmapped = tuple(at for at in mapped_experts(prepared) if at not in set(mapped))
        chosen = replace(chosen, unreached=(*chosen.unreached, *unmapped))
        made = Made(prepared, self.own, changes, gates, ranges, weights, prefix, chosen, findings.super_experts)
        self._write(made, journal, [sequence for batch in batches for sequence in batch.measured])
        return {
            "probe_id": self.own,
            "changes": len(changes),
            "sequences": sum(batch.counted for batch in batches),
            "tokens": sum(sum(batch.lengths[: batch.counted]) for batch in batches),
        }

    def _engine(self, model: Any, batch: Batch, prefix: tuple[int, ...]) -> Engine:
        """The model with the readers of every site that is changed or looked at."""
        prepared, anatomy = self.prepared, self.prepared.model.anatomy
        sites = tuple(dict.fromkeys((*feature_sites(prepared), *quantized_sites(prepared))))
        base, ids = model.get_submodule(anatomy.backbone), batch.ids[:1, : batch.lengths[0]]
        readers = find_readers(base, anatomy, sites, prepared.layers, ids)
        return Engine(model, anatomy, readers, prefix, held_sites(prepared))

    def _statistics(
        self,
        engine: Engine,
        batches: tuple[Batch, ...],
        systematic: tuple[int, ...],
        wanted: list[tuple[Expert, Role]],
    ) -> Statistics:
        """One untouched pass over everything, and one with the prefix where there is one; goes on after a snapshot."""
        found = load(self.folder, self.prepared.layers)
        counts = bool(wanted or self.asked.map_experts)
        if counts and LOAD not in found.arrays:
            found = Statistics.zero(self.prepared.layers)  # a snapshot without them is not gone on with
        counted = self._load(found) if counts else {}
        held = dict.fromkeys(held_sites(self.prepared), held_features(self.prepared, systematic))
        rotated = rotated_ranges(self.asked.quantize, error_formats(self.prepared), bool(self.asked.hold))
        collect = Collector(found, rotated, held)
        before = Collector(found, rotated, held, prefix=len(engine.prefix))
        total, done = len(batches), 0
        for batch in batches:
            done += 1
            if found.sequences >= batch.measured.stop:
                continue
            lengths = tuple(length if n < batch.counted else 0 for n, length in enumerate(batch.lengths))
            with (
                self._spikes(engine, found, batch, lengths),
                count_load(engine.expert_modules(tuple(counted)), counted, lengths, engine.now),
                engine.looking(collect),
            ):
                collect.begin(lengths)
                engine.forward(batch)
            if engine.prefix:
                with engine.looking(before):
                    before.begin(lengths)
                    engine.forward(batch, prefix=True)
            save(self.folder, found)
            self.reporter.progress("look", done, total, "batches")
        return found

    def _load(self, found: Statistics) -> dict[int, Any]:
        """layer -> the array that its experts' tokens are counted in."""
        shape = (len(found.layers), self.prepared.model.num_experts or 0)
        tokens = found.arrays.setdefault(LOAD, np.zeros(shape))
        return {layer: tokens[found.layers.index(layer)] for layer in routed_layers(self.prepared)}

    @contextlib.contextmanager
    def _spikes(self, engine: Engine, found: Statistics, batch: Batch, lengths: tuple[int, ...]) -> Iterator[None]:
        handles = []
        if AUTO in self.asked.weight:
            for layer, module in spike_modules(engine.base, self.prepared):
                handles.append(watch_spike(found, layer, module, is_transposed(module), batch.sequences, lengths))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _kept(self, engine: Engine, batch: Batch, ranges: Ranges, changes: tuple[Change, ...]) -> Kept | None:
        """Outputs that let changes leave out layers, where that changes no bit of this model's."""
        wanted = sorted({change.first_layer - 1 for change in changes if change.first_layer})
        itemsize = torch.empty((), dtype=next(engine.base.parameters()).dtype).element_size()
        size = batch.ids.numel() * self.prepared.model.hidden_size * itemsize
        kept = Kept(engine.layers, kept_layers(wanted, size))
        if not kept.wanted:
            return None
        sites = tuple(dict.fromkeys(place[0] for place in engine.readers))
        if sharing_holds(engine, batch, kept, ranges, sites):
            log.info("layers before a change are left out: that changes no bit of this model's output")
            return kept
        log.warning(
            "leaving out the layers before a change gives this model other bits: every pass computes all layers"
        )
        return None

    def _progress(self, batches: tuple[Batch, ...], changes: tuple[Change, ...]) -> Callable[[int], None]:
        total, done = sum(batch.tokens for batch in batches) * (1 + len(changes)), 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            self.reporter.progress("probe", done, total, "tokens")

        return advance

    def _write(self, made: Made, journal: ProbeJournal, sequences: list[int]) -> None:
        """The numbers, in a draft that becomes the folder."""
        content, places = write_numbers(made, journal, sequences)
        why_not = made.checked.why_not
        compared = "gives the capture's losses" if why_not is None else f"was not compared with the capture: {why_not}"
        log.info("the untouched pass %s; a change that changes nothing gives a KL of 0", compared)
        draft = self.folder / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        write_atomic(draft / PROBES, content)
        write_atomic(draft / SENSITIVITY, sensitivity_bytes(places))
        seal_folder(draft)
        drop_folder(self.folder / NUMBERS)
        draft.rename(self.folder / NUMBERS)


def expert_load(statistics: Statistics, prepared: Prepared) -> dict[int, Any]:
    """layer -> (expert,) int64, the tokens of the probe that reach each; none where they are not counted."""
    if LOAD not in statistics.arrays:
        return {}
    own = statistics.arrays[LOAD].astype(np.int64)
    return {layer: own[statistics.layers.index(layer)] for layer in routed_layers(prepared)}


def batches_of(prepared: Prepared, corpus: Corpus, device: str) -> tuple[Batch, ...]:
    """The capture's batches up to the last sequence that the probe measures."""
    size = prepared.spec.capture.batch_sequences
    total = prepared.corpus.num_sequences
    wanted = min(asked_of(prepared.spec).probe_sequences, total)
    found = []
    for start in range(0, wanted, size):
        run = range(start, min(start + size, total))
        lengths = tuple(int(length) for length in corpus.lengths[run.start : run.stop])
        rows = corpus.ids[run.start : run.stop][:, : max(lengths)].astype(np.int64)
        ids = torch.from_numpy(rows).to(device)
        found.append(Batch(run, ids, lengths, min(run.stop, wanted) - start))
    return tuple(found)


def rotated_ranges(quantize: tuple[str, ...], errors: tuple[str, ...], held: bool) -> tuple[Rotated, ...]:
    """The ranges of rotated values that static formats need."""
    forms = [parse_format(name) for name in dict.fromkeys((*quantize, *errors))]
    widths = sorted({form.rotation for form in forms if form.is_static and form.rotation})
    return tuple(Rotated(width, own) for width in widths for own in ((False, True) if held else (False,)))


def _middle(values: Any) -> int:
    """The feature of the median mean square: neither dead nor an outlier."""
    order = np.argsort(values, kind="stable")
    return int(order[(order.size - 1) // 2])

"""What capturing costs beside other ways to read activations: the same weights, tokens, sites and disk, side by side.

    make bench-peers                                                an environment of its own in build/peers, SmolLM2
    python -m benchmarks.peers --peers hooks,hidden,ours            those that need no other package

Each way reads the residual stream after every decoder layer, one sequence a pass, and writes it to the disk:

    bare      the base model, nothing is read
    hooks     a forward hook a layer that keeps the tensor, and one torch.save a sequence
    hidden    output_hidden_states=True, and the same; of the last layer it gives the normed state
    nnsight   NNsight around the base model, `layer.output.save()` in a trace, and the same
    lens      TransformerLens: TransformerBridge around the model, run_with_cache of every block's output, and the same; it
              computes attention eagerly, and the head with it
    ours      hooks, staging buffer, chunks with checksums, fsync, journal: what a study does

Nobody but `ours` waits for the disk. The ways take turns within a round, every other round backwards, and each ratio is the
median of the rounds' own ratios to the bare pass, of seconds and of processor time (all threads), for a machine that others use
moves the seconds. First it is checked that all read the same values: every layer of every sequence, bit for bit, where a way
runs the same attention; TransformerLens is compared with hooks under eager attention as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from benchmarks.capture import open_bench, tell
from benchmarks.stages import Bench
from outliers.capture.load import load_model
from outliers.model.pretrained import load_tokenizer
from outliers.workspace import open_workspace

NAMES = {
    "bare": "bare forward",
    "hooks": "plain hooks, torch.save",
    "hidden": "output_hidden_states, torch.save",
    "nnsight": "nnsight, torch.save",
    "lens": "TransformerLens, torch.save",
    "ours": "this project, fsync and journal",
}
PACKAGES = {"nnsight": "nnsight", "lens": "transformer-lens"}
SITE = "resid"

Layers = dict[int, torch.Tensor]
"""Layer -> (position, feature), the residual stream after it."""
Reader = Callable[[torch.Tensor], Layers]
"""Reads one sequence; ids: (1, position)."""


class Peers:
    """One model for each way, since some change the modules that they wrap, and the way to read a sequence with it."""

    def __init__(self, bench: Bench, arguments: argparse.Namespace) -> None:
        self.bench, self.count = bench, len(bench.layout.layers)
        self._workspace = open_workspace(arguments.workspace)
        makers: dict[str, Callable[[], Reader]] = {
            "hooks": lambda: self.hooks(self._fresh()),
            "hidden": lambda: self.hidden(self._fresh()),
            "nnsight": lambda: self.nnsight(self._fresh()),
            "lens": lambda: self.lens(self._fresh()),
        }
        self.readers = {name: makers[name]() for name in arguments.peers if name in makers}

    def _fresh(self) -> torch.nn.Module:
        return load_model(self.bench.study.model, self._workspace, "cpu")

    def _base(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.get_submodule(self.bench.study.model.anatomy.backbone)

    def hooks(self, model: torch.nn.Module) -> Reader:
        """Plain forward hooks."""
        base, kept = self._base(model), {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                kept[layer] = (output[0] if isinstance(output, tuple) else output).detach()[0]

            return hook

        for number, layer in enumerate(base.get_submodule(self.bench.study.model.anatomy.layers).children()):
            layer.register_forward_hook(keep(number))

        def read(ids: torch.Tensor) -> Layers:
            kept.clear()
            with torch.inference_mode():
                base(input_ids=ids, use_cache=False)
            return dict(kept)

        return read

    def hidden(self, model: torch.nn.Module) -> Reader:
        """What transformers returns itself: the state before each layer, and the normed one after the last."""
        base = self._base(model)

        def read(ids: torch.Tensor) -> Layers:
            with torch.inference_mode():
                states = base(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
            return {layer: state[0] for layer, state in enumerate(states[1:])}

        return read

    def nnsight(self, model: torch.nn.Module) -> Reader:
        """nnsight around the base model, so that no head is computed."""
        import nnsight
        from nnsight import NNsight

        wrapped = NNsight(self._base(model))

        def read(ids: torch.Tensor) -> Layers:
            with torch.inference_mode():  # noqa: SIM117 - nnsight reads the source of its own block
                with wrapped.trace(input_ids=ids, use_cache=False):
                    saved = nnsight.save([])
                    for layer in wrapped.layers:
                        saved.append(layer.output)
            return {n: (value[0] if isinstance(value, tuple) else value)[0] for n, value in enumerate(saved)}

        return read

    def lens(self, model: torch.nn.Module) -> Reader:
        """TransformerLens around the whole model, which it needs."""
        from transformer_lens.model_bridge import TransformerBridge

        info = self.bench.study.model
        tokenizer = load_tokenizer(info.source, self._workspace)
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)  # it reads a config by name
            bridge = TransformerBridge.boot_transformers(
                folder, hf_model=model, tokenizer=tokenizer, device="cpu", dtype=getattr(torch, info.dtype)
            )
        names = [f"blocks.{layer}.hook_out" for layer in range(self.count)]

        def read(ids: torch.Tensor) -> Layers:
            with torch.inference_mode():
                _, cache = bridge.run_with_cache(ids, names_filter=names, use_cache=False)
            return {layer: cache[name][0] for layer, name in enumerate(names)}

        return read

    def run(self, name: str) -> tuple[float, float]:
        """Seconds, and processor seconds of all threads, of all sequences in one way, with what it writes."""
        folder = self.bench.calm()
        worked = time.process_time()
        if name in ("bare", "ours"):
            seconds = (self.bench.bare if name == "bare" else self.bench.zarr)(folder)
            return seconds, time.process_time() - worked
        began = time.perf_counter()
        for number, row in enumerate(self.bench.ids):
            torch.save(self.readers[name](row[None]), folder / f"{number}.pt")
        return time.perf_counter() - began, time.process_time() - worked

    def equality(self) -> dict[str, Any]:
        """Of each way: layers that are not those of plain hooks bit for bit, and the largest difference; one number a way."""
        plain, found = self.hooks(self._fresh()), {}
        wanted = [plain(row[None]) for row in self.bench.ids]
        for name, read in self.readers.items():
            found[name] = self._compared(read, wanted)
        if "lens" in self.readers:
            eager = self._fresh()
            eager.set_attn_implementation("eager")
            read = self.hooks(eager)
            found["lens, hooks under eager attention"] = self._compared(
                self.readers["lens"], [read(row[None]) for row in self.bench.ids]
            )
        folder = self.bench.calm()
        self.bench.zarr(folder)
        array: Any = zarr.open_group(folder / "activations.zarr", mode="r")[SITE]
        mine = iter(range(len(wanted)))
        found["ours"] = self._compared(lambda ids: self._stored(array, next(mine)), wanted)
        return found

    def _stored(self, array: Any, sequence: int) -> Layers:
        values = np.ascontiguousarray(array[:, sequence])  # (layer, position, feature)
        tensors = torch.from_numpy(values)
        if array.attrs["dtype"] == "bfloat16":
            tensors = tensors.view(torch.bfloat16)
        return dict(enumerate(tensors))

    def _compared(self, read: Reader, wanted: list[Layers]) -> dict[str, Any]:
        unlike: set[int] = set()
        largest = 0.0
        for row, layers in zip(self.bench.ids, wanted, strict=True):
            for layer, values in read(row[None]).items():
                if not torch.equal(values, layers[layer]):
                    unlike.add(layer)
                    largest = max(largest, float((values.float() - layers[layer].float()).abs().max()))
        return {"layers": self.count, "unlike": sorted(unlike), "largest_difference": largest}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    scratch = Path(tempfile.mkdtemp(prefix="benchmark-", dir=arguments.scratch))
    try:
        bench = open_bench(arguments, scratch)
        peers = Peers(bench, arguments)
        equal = peers.equality()  # and warm: first touches, compiled hooks
        for name, one in equal.items():
            tell(f"{name}: {one['layers'] - len(one['unlike'])} of {one['layers']} layers bit for bit")
        rounds: list[dict[str, tuple[float, float]]] = []
        for number in range(arguments.rounds):
            names = arguments.peers if number % 2 == 0 else list(reversed(arguments.peers))
            rounds.append({})
            for name in names:
                gc.collect()
                rounds[-1][name] = peers.run(name)
            tell(
                f"round {number + 1} of {arguments.rounds}: "
                + ", ".join(f"{n} {rounds[-1][n][0]:.2f} s, {rounds[-1][n][1]:.2f} of processors" for n in names)
            )
    finally:
        shutil.rmtree(scratch)
    ways: dict[str, Any] = {}
    for name in arguments.peers:
        ratios = [[row[name][kind] / row["bare"][kind] for row in rounds] for kind in (0, 1)]
        ways[name] = {
            "seconds": statistics.median(row[name][0] for row in rounds),
            "of_bare": statistics.median(ratios[0]),
            "least_and_most": [min(ratios[0]), max(ratios[0])],
            "processor_of_bare": statistics.median(ratios[1]),
            "version": version(PACKAGES[name]) if name in PACKAGES else "",
        }
    return {
        "model": arguments.model,
        "sequences": arguments.sequences,
        "length": arguments.length,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "bytes": bench.bytes,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "equality": equal,
        "ways": ways,
    }


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{found['model']}, {found['sequences']} x {found['length']} tokens, the residual stream of every layer: "
        f"{found['bytes'] / 1e6:.0f} MB a run, medians of {found['rounds']} rounds, torch {found['torch']}, "
        f"{found['threads']} of its threads",
        "",
        "| way | seconds | of bare | least and most | processor time of bare |",
        "|---|---|---|---|---|",
    ]
    for name, one in found["ways"].items():
        least, most = one["least_and_most"]
        title = f"{NAMES[name]}{' (' + one['version'] + ')' if one['version'] else ''}"
        spread = f"{least:.2f} to {most:.2f}"
        lines.append(
            f"| {title} | {one['seconds']:.2f} | {one['of_bare']:.2f} | {spread} | {one['processor_of_bare']:.2f} |"
        )
    lines.append("")
    for name, one in found["equality"].items():
        same = one["layers"] - len(one["unlike"])
        rest = f"; the largest difference is {one['largest_difference']:.3g}" if one["unlike"] else ""
        lines.append(f"{name}: {same} of {one['layers']} layers are those of plain hooks bit for bit{rest}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--peers", default=",".join(NAMES), help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--workspace", metavar="DIR", help="where the model and the corpus are kept")
    parser.add_argument("--scratch", metavar="DIR", help="what is written goes here: on the disk to be measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    arguments = parser.parse_args(argv)
    asked = arguments.peers.split(",")
    if unknown := [name for name in asked if name not in NAMES]:
        parser.error(f"--peers: {','.join(unknown)} is not known; known are {', '.join(NAMES)}")
    arguments.peers = [name for name in NAMES if name in asked or name == "bare"]
    arguments.sites = SITE
    torch.set_num_threads(arguments.threads)
    figures = measure(arguments)
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

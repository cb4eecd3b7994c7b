"""Captures made of given numbers: the real layout on disk, without a model, so that counting can be tested alone."""

from __future__ import annotations

import json

import numpy as np
import torch

from outliers.corpus.tokens import Corpus, CorpusInfo, TokenNames, token_hash, write_corpus
from outliers.counting.analyze import analyze
from outliers.model.activations import ActivationMemory
from outliers.model.anatomy import Anatomy
from outliers.model.describe import ModelInfo
from outliers.model.source import ModelSource
from outliers.model.weights import Weights
from outliers.results.write import json_bytes, load_findings, summarize_study
from outliers.spec import StudySpec, deciding_site, digest
from outliers.store.chunks import ChunkFiles, Journal, create_arrays
from outliers.store.durable import Unsynced
from outliers.store.fingerprint import shapes_of, write_fingerprint
from outliers.study.layout import STORAGE, Layout
from outliers.study.prepare import ID_LENGTH, Prepared

NO_WEIGHTS = Weights(
    total_parameters=1000,
    active_parameters=1000,
    checkpoint_bytes=2000,
    embedding_bytes=1000,
    layer_bytes=(500,),
    rest_bytes=500,
    embedding_modules=(),
    rest_modules=(),
    work=ActivationMemory(elements=1, float_elements=1, heads=1, windowed=False, unequal_heads=False),
)
"""Of a model that does not exist: a finished capture needs no weights."""


class Silent:
    """A Reporter that discards everything."""

    def log(self, level, message):
        pass

    def progress(self, step, done, total, unit):
        pass


def store(values, dtype):
    """float32 array -> (array in the storage dtype, the same values as float64 after rounding to `dtype`)."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(getattr(torch, dtype))
    exact = tensor.to(torch.float64).numpy()
    bits = tensor.view(torch.uint16).numpy() if dtype == "bfloat16" else tensor.numpy()
    return bits.astype(STORAGE[dtype], copy=False), exact


def prepared_for(acts, dtype, criteria=None, layers=None, lengths=None, **spec):
    """A Prepared whose capture would hold `acts`: {site: (layer, sequence, position, feature)}, padded after `lengths`."""
    num_layers, num_sequences, positions, _ = next(iter(acts.values())).shape
    sites = tuple(acts)
    full = StudySpec.model_validate(
        {
            "model": "synthetic",
            "corpus": {"source": "synthetic", "num_sequences": num_sequences, "sequence_length": positions},
            "capture": {"sites": sites},
            "criteria": criteria or {},
            **spec,
        }
    )
    ids = np.arange(num_sequences * positions, dtype=np.int32).reshape(num_sequences, positions)
    lengths = np.full(num_sequences, positions, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    corpus = CorpusInfo(
        source="synthetic",
        public=True,
        key=f"synthetic-{num_sequences}x{positions}-{int(lengths.sum())}",
        num_sequences=num_sequences,
        sequence_length=positions,
        num_tokens=int(lengths.sum()),
        num_documents=1,
        token_sha256=token_hash(ids, lengths),
    )
    widths = {site: array.shape[-1] for site, array in acts.items()}
    hidden = next(iter(widths.values()))
    model = ModelInfo(
        source=ModelSource(kind="folder", id="local:synthetic", name="synthetic", revision="0", path="/nowhere"),
        architecture="LlamaForCausalLM",
        dtype=dtype,
        quantization=None,
        attention_implementation="sdpa",
        experts_implementation=None,
        num_layers=num_layers,
        hidden_size=hidden,
        anatomy=Anatomy(
            backbone="model",
            layers="layers",
            sites={site: tuple(f"layers.{n}.{site}" for n in range(num_layers)) for site in widths},
            widths=widths,
            moe_layers=(),
            router=None,
            experts=None,
        ),
        vocab_size=100,
        max_positions=None,
        total_parameters=1000,
        active_parameters=1000,
        num_experts=None,
        experts_per_token=None,
        weight_bytes=2000,
        weights=NO_WEIGHTS,
    )
    study = digest({"criteria": full.criteria.model_dump(mode="json"), "dtype": dtype, "shape": list(widths.items())})
    return Prepared(
        spec=full,
        model=model,
        corpus=corpus,
        layers=tuple(range(num_layers)) if layers is None else layers,
        site=deciding_site(sites, full.criteria.site),
        text=True,
        capture_id=digest([dtype, num_sequences, positions, list(widths.items())])[:ID_LENGTH],
        study_id=study[:ID_LENGTH],
    )


def write_capture(prepared, workspace, acts, *, chunk_bytes=8 * 2**20, codec="none", order=None, lengths=None):
    """Write `acts` (storage dtype) as a finished capture; sequences are written in `order`, without their padding."""
    layout = begin_capture(prepared, workspace, acts, chunk_bytes=chunk_bytes, codec=codec, lengths=lengths)
    journal = Journal(workspace.capture(prepared.capture_id) / "journal.jsonl")
    sequences = order if order is not None else range(layout.num_sequences)
    write_sequences(prepared, workspace, layout, journal, acts, sequences, lengths)
    return layout


def begin_capture(prepared, workspace, acts, *, chunk_bytes=8 * 2**20, codec="none", lengths=None):
    """Begin a capture of `acts`, and write its corpus: no sequence is there yet."""
    first = next(iter(acts.values()))
    _, num_sequences, positions, _ = first.shape
    layout = Layout(
        widths={site: array.shape[-1] for site, array in acts.items()},
        layers=prepared.layers,
        num_sequences=num_sequences,
        positions=positions,
        dtype=prepared.model.dtype,
        codec=codec,
        chunk_bytes=chunk_bytes,
    )
    folder = workspace.capture(prepared.capture_id)
    folder.mkdir(parents=True)
    ids = np.arange(num_sequences * positions, dtype=np.int32).reshape(num_sequences, positions)
    lengths = np.full(num_sequences, positions, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    create_arrays(folder, layout, ids, lengths)
    write_fingerprint(folder, {"fixed": {"format": 1}, "layout": shapes_of(layout), "threads": 1})
    _write_corpus(prepared, workspace, ids, lengths)
    return layout


def write_sequences(prepared, workspace, layout, journal, acts, sequences, lengths=None):
    """Write and journal some sequences of `acts`, as a capture does."""
    files = ChunkFiles(workspace.capture(prepared.capture_id), layout)
    lengths = np.full(layout.num_sequences, layout.positions, np.int32) if lengths is None else np.asarray(lengths)
    for sequence in sequences:
        unsynced = Unsynced(files.root)
        entry = {"sequence": int(sequence), "crc32": {}, "sizes": {}, "bytes": 0}
        for site, array in acts.items():
            chunks = [
                c
                for layer in range(len(array))
                for c in files.write(site, layer, int(sequence), array[layer, sequence, : lengths[sequence]], unsynced)
            ]
            entry["crc32"][site], entry["sizes"][site] = [c for c, _ in chunks], [n for _, n in chunks]
        unsynced.sync()
        journal.append([entry])


def _write_corpus(prepared, workspace, ids, lengths):
    if (workspace.corpora / prepared.corpus.key).exists():
        return
    pieces = ["." if number % 5 == 0 else f" w{number}" for number in range(ids.shape[1])]
    starts = np.cumsum([0, *map(len, pieces[:-1])]).astype(np.int32)
    corpus = Corpus(
        info=prepared.corpus,
        ids=ids,
        lengths=lengths,
        starts=np.tile(starts, (ids.shape[0], 1)),
        texts=tuple("".join(pieces[:length]) for length in lengths),
        names=TokenNames(special={1: "<one>", 3: "<three>"}),
    )
    write_corpus(corpus, workspace)


def study(prepared, workspace, **options):
    """Analyze the capture: (Summary, content of summary.json)."""
    from outliers.corpus.tokens import load_corpus

    folder = analyze(prepared, workspace, Silent(), **options)
    found = load_findings(prepared, folder)
    return found.summary, plain(summarize_study(prepared, found, load_corpus(prepared.corpus, workspace)))


def plain(content):
    """A model of the schema as the JSON that is written of it."""
    return json.loads(json_bytes(content))

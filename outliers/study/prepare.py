"""StudySpec -> Prepared: every name is resolved and both ids are known before a machine is asked for.

The revision becomes a commit or a hash, `auto` and `all` become values, the text becomes token ids on disk.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from outliers.corpus.documents import find_local
from outliers.corpus.tokens import CorpusInfo, prepare_corpus
from outliers.errors import BadInput
from outliers.events.stream import Reporter
from outliers.files.sealed import SEAL, read_sealed
from outliers.hardware import find_gpus
from outliers.model.complete import check_checkpoint
from outliers.model.describe import (
    ModelInfo,
    check_method,
    check_place,
    describe_model,
    kept_method,
)
from outliers.model.quantization import Place, installed_packages
from outliers.model.source import find_model, local_path
from outliers.spec import (
    ANALYSIS_VERSION,
    DEFAULT_PROVIDER,
    EXPERTS_VERSION,
    FORMAT_VERSION,
    FORMATS_VERSION,
    LOCAL_PREFIX,
    StudySpec,
    chosen,
    digest,
    layers_in,
    path_name,
    public_name,
)
from outliers.spec.formats import ROTATIONS, parse_format
from outliers.study.experts import expert_mode, expert_shapes
from outliers.study.layout import Layout
from outliers.untrusted.visible import visible_name
from outliers.workspace import Workspace

FP8_PRODUCT = 2
"""How FP8 weights are made plain: 1 was transformers' product, which is another where the last block is smaller."""
ID_LENGTH = 16
"""Hex digits of an id: 64 bits, far beyond any number of studies one store will hold."""


class Prepared(BaseModel):
    """A study with nothing left open. It is `spec.json` on the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: StudySpec
    model: ModelInfo
    corpus: CorpusInfo
    layers: tuple[int, ...]
    site: str
    """The deciding site, or `block`."""
    text: bool
    """Whether the results show text of the corpus."""
    capture_id: str
    study_id: str

    @property
    def title(self) -> str:
        """The study for a person: `SmolLM2-135M-Instruct 8x512`."""
        return f"{self.model_name} {self.corpus.num_sequences}x{self.corpus.sequence_length}"

    @property
    def model_name(self) -> str:
        """What the model is called on this machine: by the name that was given, else that of its file, folder or id."""
        return self.spec.model.name or visible_name(self.model.source.name)

    @property
    def corpus_name(self) -> str:
        """What the corpus is called on this machine: by the name that was given, else that of its file, folder or id."""
        own = self.corpus.source.startswith(LOCAL_PREFIX)
        return self.spec.corpus.name or (
            visible_name(path_name(self.spec.corpus.source)) if own else self.corpus.source
        )

    @property
    def public_model(self) -> str:
        """What the model is called in what is published: no name of a file or folder unless it was given."""
        return self.spec.model.name or public_name(self.model.source.id)

    @property
    def public_corpus(self) -> str:
        """What the corpus is called in what is published."""
        return self.spec.corpus.name or self.corpus.source

    @property
    def extraction(self) -> str:
        """What one extraction makes: a capture for all of its studies, or with --store rolling what one study counts of it."""
        return self.capture_id if self.spec.capture.store == "full" else self.study_id

    def public_spec(self) -> dict[str, object]:
        """The spec as results may carry it: ids in the place of paths, no machine, no workspace, no target."""
        spec = self.spec.model_dump(mode="json", exclude={"compute", "publish_to", "probe"})
        if not self.spec.formats.formats:
            del spec["formats"]
        if self.spec.capture.experts == "auto":
            del spec["capture"]["experts"]
        # what is kept is in no result, and a window is the machine's
        for name in ("disk_window", *(("store", "store_sequences") if self.spec.capture.store == "full" else ())):
            del spec["capture"][name]
        for part in ("model", "corpus"):
            if spec[part]["name"] is None:
                del spec[part]["name"]
        spec["model"] |= {"id": self.model.source.id, "revision": self.model.source.revision, "dtype": self.model.dtype}
        spec["corpus"]["source"] = self.corpus.source
        return spec


def model_info(spec: StudySpec, workspace: Workspace, *, weights: bool = True) -> ModelInfo:
    """The description of a spec's model; checks what depends on the model's config. `weights`: whether its files must be here."""
    folder = local_path(spec.model.id)
    if (folder / "config.json").is_file() and (stays := kept_method(folder, spec.model.quantization)):
        check_method(folder.name, stays, _place(spec))
    source = find_model(spec.model, workspace, weights=weights)
    if spec.model.name is not None and not source.id.startswith(LOCAL_PREFIX):
        raise BadInput(
            f"--model-name {spec.model.name} is for a model of your own: {spec.model.id} is published by its name already"
        )
    info = describe_model(
        source,
        spec.model.dtype,
        workspace,
        quantization=spec.model.quantization,
        named=spec.capture.site_modules,
    )
    if info.quantization is not None:
        check_place(info, _place(spec))
    _check_sites(spec, info)
    _check_formats(spec, info)
    if info.max_positions is not None and spec.corpus.sequence_length > info.max_positions:
        raise BadInput(
            f"--sequence-length {spec.corpus.sequence_length} is more than the {info.max_positions} positions that "
            f"{info.source.name} was made for"
        )
    layers = resolve_layers(spec, info)
    _check_layers(spec, info, layers)
    mode = expert_mode(spec, info, layers)
    if spec.capture.store == "none" and mode != "off":
        raise BadInput(
            f"--store none counts no experts, and those of {info.source.name} are read (--experts {mode}): give --experts "
            "off, or --store rolling, which counts them"
        )
    if weights:
        check_checkpoint(info, workspace, head=spec.capture.perplexity)
    return info


def _place(spec: StudySpec) -> Place:
    """Where a study would compute, as far as it is known without asking a machine: this computer's packages and whether it has a
    GPU, or a machine with GPUs whose environment is made for the study."""
    here = chosen(spec.compute.provider) == DEFAULT_PROVIDER
    if spec.compute.gpu_count == 0:
        gpus: tuple[tuple[str, None], ...] = ()
    elif here:
        gpus = tuple((gpu.name, None) for gpu in find_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES")))
    else:
        gpus = (("any", None),)
    return Place(gpus, installed_packages() if here else None)


def _check_sites(spec: StudySpec, info: ModelInfo) -> None:
    for site in spec.capture.sites:
        if site not in info.anatomy.sites and site == "down_in" and info.anatomy.moe_layers:
            raise BadInput(
                f"the site down_in of {info.source.name} is in no layer, for each has experts in the place of an MLP: leave it "
                "out of --sites"
            )
        if site not in info.anatomy.sites:
            raise BadInput(
                f"the site {site} of {info.architecture} is not known: name its module with --site-module {site}=PATTERN, "
                "or leave it out of --sites"
            )
        if site not in info.anatomy.widths:
            raise BadInput(
                f"the site {site} of {info.source.name} has another width in some layers, and one array holds one width: "
                "leave it out of --sites"
            )


def _check_formats(spec: StudySpec, info: ModelInfo) -> None:
    """BadInput where a rotation does not fit the features of a captured site."""
    for name in spec.formats.formats:
        block = parse_format(name).rotation
        for site in spec.capture.sites:
            width = info.anatomy.widths[site]
            if block and width % block:
                fits = [other for other in ROTATIONS if width % other == 0]
                remedy = f"had{max(fits)}+ does" if fits else "no rotation does"
                raise BadInput(
                    f"--formats {name} rotates blocks of {block} features, and the site {site} of {info.source.name} has "
                    f"{width}, which {block} does not divide: {remedy}; or leave the site out of --sites"
                )


def _check_layers(spec: StudySpec, info: ModelInfo, layers: tuple[int, ...]) -> None:
    """BadInput where a site is not in one of the layers: an array has a row for each of them."""
    for site in spec.capture.sites:
        there = info.anatomy.layers_of(site)
        absent = [layer for layer in layers if layer not in there]
        if absent:
            raise BadInput(
                f"the site {site} of {info.source.name} is not in layer {absent[0]}, which has experts: leave it out of --sites, "
                f"or read the layers that have it with --layers {','.join(map(str, there))}"
            )


def resolve_layers(spec: StudySpec, info: ModelInfo) -> tuple[int, ...]:
    """The layers of a spec as numbers; BadInput for one that the model doesn't have."""
    asked = spec.capture.layers
    if asked == "all":
        return tuple(range(info.num_layers))
    try:
        layers = layers_in(asked, info.num_layers) if isinstance(asked, str) else asked
    except ValueError as error:
        raise BadInput(
            f"--layers {asked}: {error}; {info.source.name} has layers 0 to {info.num_layers - 1}"
        ) from error
    beyond = [layer for layer in layers if layer >= info.num_layers]
    if beyond:
        raise BadInput(f"layer {beyond[0]} was asked, and {info.source.name} has layers 0 to {info.num_layers - 1}")
    return layers


def layout_of(spec: StudySpec, info: ModelInfo) -> Layout:
    """The shapes on disk of a study's capture."""
    sites = spec.capture.sites
    others = {site: info.anatomy.alias_of(site) for site in sites}
    return Layout(
        widths={site: info.anatomy.widths[site] for site in sites},
        layers=resolve_layers(spec, info),
        num_sequences=spec.corpus.num_sequences,
        positions=spec.corpus.sequence_length,
        dtype=info.dtype,
        codec=spec.capture.codec,
        aliases={site: other for site, other in others.items() if other in sites},
        experts=expert_shapes(spec, info, resolve_layers(spec, info)),
    )


def prepare(spec: StudySpec, workspace: Workspace, reporter: Reporter | None = None) -> Prepared:
    """Resolve a spec. The caller has checked its options (`machines.options.check_options`).

    reporter: told what is looked at, and how much of the text is tokenized.
    Raises BadInput and its kinds for what does not exist or can't be read, HubUnavailable when the hub is silent."""
    documents = find_local(spec.corpus)  # first: a mistyped path is refused before a model is hashed
    if spec.corpus.name is not None and (documents is None or not documents.name.startswith(LOCAL_PREFIX)):
        raise BadInput(
            f"--corpus-name {spec.corpus.name} is for a text of your own: {spec.corpus.source} is published by its name already"
        )
    _say(reporter, f"looking at the model {spec.model.id}")
    info = model_info(spec, workspace)
    _say(reporter, f"{info.source.name}: {info.architecture}, {info.num_layers} layers, computed in {info.dtype}")
    corpus = prepare_corpus(
        spec.corpus, info.source, workspace, documents=documents, vocab_size=info.vocab_size, reporter=reporter
    )
    layers = resolve_layers(spec, info)
    text = spec.publish_text == "context" or (spec.publish_text == "auto" and corpus.public)
    capture = capture_digest(spec, info, corpus, layers, stored=info.stored_quantization)
    criteria = spec.criteria.model_dump(mode="json") | {
        "site": spec.deciding_site,
        "ladder": list(spec.criteria.magnitudes),
    }
    payload: dict[str, object] = {
        "capture": capture,
        "criteria": criteria,
        "label": spec.label,
        "text": text,
        "analysis_version": ANALYSIS_VERSION,
    }
    if spec.capture.perplexity:
        payload["perplexity"] = True
    if spec.formats.formats:
        payload["formats"] = [FORMATS_VERSION, list(spec.formats.formats), spec.formats.format_tokens]
    # a name changes what is published: two names of one study are two studies, as two labels are
    if spec.model.name is not None or spec.corpus.name is not None:
        payload["names"] = [spec.model.name, spec.corpus.name]
    study = digest(payload)
    return Prepared(
        spec=spec,
        model=info,
        corpus=corpus,
        layers=layers,
        site=spec.deciding_site,
        text=text,
        capture_id=capture[:ID_LENGTH],
        study_id=study[:ID_LENGTH],
    )


def _say(reporter: Reporter | None, message: str) -> None:
    if reporter is not None:
        reporter.log("info", message)


def capture_digest(
    spec: StudySpec, info: ModelInfo, corpus: CorpusInfo, layers: tuple[int, ...], *, stored: str | None
) -> str:
    """Digest of what determines the activations, and of nothing else. `stored`: the method the checkpoint is quantized in."""
    modules = info.anatomy.modules(spec.capture.sites, layers)
    payload: dict[str, object] = {
        "format": FORMAT_VERSION,
        "model": [info.source.id, info.source.revision, info.architecture],
        "dtype": info.dtype,
        "quantization": info.quantization,
        "attention": info.attention_implementation,
        "experts": info.experts_implementation,
        "tokens": corpus.token_sha256,
        "shape": [corpus.num_sequences, corpus.sequence_length],
        "batch_sequences": spec.capture.batch_sequences,
        "sites": [[m.site, m.layer, m.path, m.side] for m in modules],
    }
    if stored == "fp8" and info.quantization is None:
        payload["fp8_product"] = FP8_PRODUCT
    if (mode := expert_mode(spec, info, layers)) != "off":
        payload["expert_table"] = [EXPERTS_VERSION, mode]
    if corpus.lengths_sha256 is not None:
        payload["lengths"] = corpus.lengths_sha256
    return digest(payload)


def read_prepared(path: Path, workspace: Workspace) -> Prepared:
    """A file with a Prepared, or with a plain StudySpec, which is then prepared here. Raises BadInput."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict) and "capture_id" in content:
        if SEAL in content and (content := read_sealed(path)) is None:
            raise BadInput(f"{path} is not what was written there: run the same study again, which writes it anew")
        try:
            return Prepared.model_validate(content)
        except ValidationError as error:
            raise BadInput(f"{path}: {explain(error)}") from error
    return prepare(parse_spec(content, str(path)), workspace)


def parse_spec(content: object, place: str) -> StudySpec:
    """A StudySpec from parsed JSON; BadInput with one line a mistake."""
    try:
        return StudySpec.model_validate(content)
    except ValidationError as error:
        raise BadInput(f"{place}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """A pydantic error as one line: the field, what is wrong, what was given."""
    lines = []
    for item in error.errors(include_url=False):
        field = ".".join(str(step) for step in item["loc"]) or "spec"
        message = item["msg"].removeprefix("Value error, ")
        given = "" if item["type"] in ("value_error", "missing") else f" (given: {item['input']!r})"
        lines.append(f"{field}: {message}{given}")
    return "; ".join(lines)

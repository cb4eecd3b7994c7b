"""StudySpec: everything that defines a study, as one frozen value.

The same model is the options of the command, the parameters of the Prefect deployment and `spec.json` on a machine.
It knows nothing of files, models or machines beyond their names; `prepare` resolves those and gives the ids.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from outliers.spec.compute import DEFAULT_PROVIDER as DEFAULT_PROVIDER
from outliers.spec.compute import EXECUTOR as EXECUTOR
from outliers.spec.compute import PROVIDER_VARIABLE as PROVIDER_VARIABLE
from outliers.spec.compute import ComputeSpec as ComputeSpec
from outliers.spec.compute import chosen as chosen
from outliers.spec.formats import FormatsSpec as FormatsSpec
from outliers.spec.layers import LAYER_RANGES, read_layers
from outliers.spec.layers import layers_in as layers_in
from outliers.spec.part import Part as Part
from outliers.spec.part import bare
from outliers.spec.probe import ProbeSpec as ProbeSpec
from outliers.spec.store import check_store
from outliers.spec.targets import STORE_PATTERN as STORE_PATTERN
from outliers.spec.targets import STORE_SCHEMES as STORE_SCHEMES
from outliers.spec.targets import STORE_SHAPES as STORE_SHAPES
from outliers.spec.targets import bare_url as bare_url
from outliers.spec.targets import check_target_url
from outliers.spec.targets import split_dataset as split_dataset
from outliers.spec.words import BUILTIN_NAMES as BUILTIN_NAMES
from outliers.spec.words import LOCAL_PREFIX as LOCAL_PREFIX
from outliers.spec.words import PUBLIC_NAME as PUBLIC_NAME
from outliers.spec.words import digest as digest
from outliers.spec.words import has_login as has_login
from outliers.spec.words import path_name as path_name
from outliers.spec.words import public_name as public_name
from outliers.spec.words import short_model_name as short_model_name

SiteName = Literal["attn_in", "mlp_in", "o_in", "down_in", "resid"]
AnySiteName = Literal["block", SiteName]
"""A site, or `block`: attn_in and mlp_in together."""
ReadingName = Literal["pooled", "union", "per_layer", "affected"]

SITES: tuple[SiteName, ...] = ("attn_in", "mlp_in", "o_in", "down_in", "resid")
READINGS: tuple[ReadingName, ...] = ("pooled", "union", "per_layer", "affected")
OWN_WIDTH_SITES: tuple[SiteName, ...] = ("o_in", "down_in")
"""Sites whose features are not the hidden dimensions."""
BLOCK: Final = "block"
BLOCK_SITES: tuple[SiteName, ...] = ("attn_in", "mlp_in")

FORMAT_VERSION = 1
"""Of the capture on disk; part of capture_id."""
ANALYSIS_VERSION = 3
"""Raised whenever a number's meaning or value changes; part of study_id, so no mended bug is answered from old results."""
FORMATS_VERSION = 1
"""The same for the errors of number formats; part of the study_id of a study that has them."""
PROBE_VERSION = 1
"""The same for probes; part of probe_id."""
EXPERTS_VERSION = 1
"""The same for what is read of experts; part of the capture_id of a capture that has them."""


DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
"""Short names of dtypes, as other programs have them."""


class ModelSpec(Part):
    """Which model, and in which arithmetic."""

    model_config = ConfigDict(title="with options")

    id: str = Field(
        min_length=1,
        description="a hub id such as Qwen/Qwen3-30B-A3B, a folder, a .gguf file, or builtin:smollm2",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit on the hub; resolved to a commit before anything runs (default: main)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="what the model computes in; auto is the checkpoint's own (bfloat16 for a GGUF file)"
    )
    quantization: Literal["auto", "checkpoint", "none"] = Field(
        "auto",
        description="none makes stored weights (MXFP4, FP8) plain on loading; checkpoint computes with them as they are stored, "
        "which needs a GPU and packages; auto makes plain what can be",
    )
    name: str | None = Field(
        None,
        pattern=PUBLIC_NAME,
        description="what a model of your own is called where the study is published, such as Acme 7B (default: local: and a "
        "hash); part of the study's id where it is given",
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _spelled_out(cls, dtype: Any) -> Any:
        """The short names of dtypes stand for the long ones, in ids too."""
        return DTYPE_ALIASES.get(dtype, dtype) if isinstance(dtype, str) else dtype


class CorpusSpec(Part):
    """Which tokens the model reads."""

    model_config = ConfigDict(title="with options")

    source: str = Field(
        "HuggingFaceFW/fineweb-edu",
        min_length=1,
        description="a text file, a folder, a data set's name on the hub, or builtin:python-docs",
    )
    num_sequences: int = Field(16, ge=1, le=1_000_000, description="sequences to read")
    sequence_length: int = Field(2048, ge=2, le=1_048_576, description="tokens in each sequence")
    seed: int = Field(0, ge=0, description="order in which the documents are taken; the same seed gives the same ids")
    bos: Literal["auto", "always", "never"] = Field(
        "auto",
        description="what begins each sequence: auto, what the model's tokenizer puts before a text; always, at least its BOS "
        "token; never, nothing",
    )
    packing: Literal["joined", "documents"] = Field(
        "joined",
        description="joined cuts documents joined by EOS into sequences of equal length; documents gives each document a "
        "sequence of its own, cut at sequence_length, and padding that is never counted",
    )
    subset: str | None = Field(None, description="configuration of a hub data set, such as sample-10BT")
    split: str = Field("train", description="split of a hub data set")
    corpus_revision: str | None = Field(None, description="branch, tag or commit of a hub data set (default: main)")
    name: str | None = Field(
        None,
        pattern=PUBLIC_NAME,
        description="what a text of your own is called where the study is published, such as Acme manuals (default: local: and "
        "a hash); part of the study's id where it is given",
    )


class CaptureSpec(Part):
    """Which activations are kept on the machine's disk."""

    model_config = ConfigDict(title="with options")

    sites: tuple[SiteName, ...] = Field(
        BLOCK_SITES, min_length=1, description="places in every layer: attn_in, mlp_in, o_in, down_in, resid"
    )
    layers: Literal["all"] | tuple[int, ...] | Annotated[str, Field(pattern=LAYER_RANGES)] = Field(
        "all", description="all, or 0-based layers and ranges such as 0,5,11 or 0-5,20- (20 to the last)"
    )
    codec: Literal["none", "zstd"] = Field("none", description="compression of the capture: none, or shuffled zstd")
    store: Literal["full", "rolling", "none"] = Field(
        "full",
        description="what of the activations stays on the disk: full keeps all; rolling counts a window of sequences at a time "
        "and frees it, so that the disk holds at most two windows whatever the corpus; none counts in the forward pass and "
        "writes the first sequences alone; in no id, for the results are the same",
    )
    store_sequences: int = Field(
        4,
        ge=1,
        le=1_000_000,
        description="sequences at the beginning of the corpus that rolling and none keep, in whole batches",
    )
    disk_window: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="disk that a window of rolling may take, in GB (10^9 bytes), at least a batch (default: a tenth of what is "
        "free on the workspace's disk when the capture runs)",
    )
    batch_sequences: int = Field(
        1, ge=1, le=4096, description="sequences in one forward pass; part of a result, for it moves the last bits"
    )

    experts: Literal["auto", "all", "routing", "off"] = Field(
        "auto",
        description="what is read of a mixture's experts: all; routing (which tokens reach which experts); off; auto is all, or "
        "routing where the experts' kernels hide the rest, and off for a dense model",
    )
    perplexity: bool = Field(False, description="measure the model's perplexity on the corpus in the same pass")
    site_modules: tuple[str, ...] = Field(
        (),
        max_length=len(SITES),
        description="where a site is, for a family that is not known: SITE=PATTERN with * for the layer's number, such as "
        "attn_in=layers.*.input_layernorm, or mlp_in=layers.*.mlp:input for what a module receives",
    )

    @model_validator(mode="after")
    def _window_of_rolling(self) -> CaptureSpec:
        if self.disk_window is not None and self.store != "rolling":
            raise ValueError(
                f"--disk-window {self.disk_window:g} is the window of --store rolling, and --store {self.store} has none: "
                "leave one of them out"
            )
        return self

    @field_validator("sites")
    @classmethod
    def _canonical(cls, sites: tuple[SiteName, ...]) -> tuple[SiteName, ...]:
        return tuple(site for site in SITES if site in sites)

    @field_validator("layers", mode="before")
    @classmethod
    def _ranges(cls, layers: Any) -> Any:
        """Ranges as numbers, where each has an end; else the text, of which `layers_in` makes numbers once the model is known."""
        return read_layers(layers)

    @field_validator("layers")
    @classmethod
    def _sorted(cls, layers: Literal["all"] | tuple[int, ...] | str) -> Literal["all"] | tuple[int, ...] | str:
        if isinstance(layers, str):
            return layers
        if not layers or min(layers) < 0:
            raise ValueError(f"layers are 0-based numbers, or all; got {layers}")
        return tuple(sorted(set(layers)))

    @field_validator("site_modules")
    @classmethod
    def _named_once(cls, site_modules: tuple[str, ...]) -> tuple[str, ...]:
        named = [item.partition("=")[0] for item in site_modules]
        if len(set(named)) < len(named):
            raise ValueError(f"each site is named once; got {', '.join(site_modules)}")
        return tuple(sorted(site_modules))


class CriteriaSpec(Part):
    """What counts as a systematic outlier feature (LLM.int8(), arXiv 2208.07339, section 4.1)."""

    model_config = ConfigDict(title="with options")

    magnitude: float = Field(6.0, gt=0, allow_inf_nan=False, description="a hit is abs(x) >= this")
    layer_fraction: float = Field(0.25, gt=0, le=1, description="of the layers, at least this share is affected")
    position_fraction: float = Field(0.06, gt=0, le=1, description="of the tokens, at least this share is affected")
    reading: ReadingName = Field("pooled", description="which reading of the paper's rule decides")
    site: AnySiteName | None = Field(
        None, description="which site decides (default: block where attn_in and mlp_in are read, else the only one)"
    )
    ladder: tuple[float, ...] = Field(
        (3.0, 4.5, 6.0, 8.0, 12.0, 20.0, 50.0, 100.0),
        max_length=32,
        description="further magnitudes at which hits are counted in the same pass",
    )

    @field_validator("ladder")
    @classmethod
    def _ascending(cls, ladder: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < step < float("inf") for step in ladder):
            raise ValueError(f"magnitudes are positive finite numbers; got {ladder}")
        return tuple(sorted(set(ladder)))

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """The ladder with the deciding magnitude in it, ascending."""
        return tuple(sorted({*self.ladder, self.magnitude}))

    @property
    def layer_rule(self) -> Fraction:
        """layer_fraction as the decimal that was written, not as the float next to it: 6% of 100 is 6 exactly."""
        return Fraction(repr(self.layer_fraction))

    @property
    def position_rule(self) -> Fraction:
        """position_fraction as the decimal that was written."""
        return Fraction(repr(self.position_fraction))


class StudySpec(Part):
    """One study: a model, a corpus, what to keep, what to look for, where to run, where to publish."""

    model: Annotated[ModelSpec, bare("id")] = Field(description="the model")
    corpus: Annotated[CorpusSpec, bare("source")] = Field(default_factory=CorpusSpec, description="the text it reads")
    capture: CaptureSpec = Field(default_factory=CaptureSpec, description="the activations kept on disk")
    criteria: CriteriaSpec = Field(default_factory=CriteriaSpec, description="what is looked for")
    formats: Annotated[FormatsSpec, bare("formats", takes_list=True)] = Field(
        default_factory=FormatsSpec, description="number formats that are tried on the activations"
    )
    probe: Annotated[ProbeSpec, bare("probe")] = Field(
        default_factory=ProbeSpec, description="what is changed in the model to see what that does to it"
    )
    compute: ComputeSpec = Field(default_factory=ComputeSpec, description="the machine")
    publish_to: str | None = Field(
        None,
        description="artifact store: s3://bucket/prefix, hf://datasets/ORG/NAME/prefix or file:///folder (default: results stay "
        "in the workspace)",
    )
    label: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="becomes part of the study's id: a second publication of the same study, from other hardware",
    )
    publish_text: Literal["auto", "none", "context"] = Field(
        "auto", description="publish the text around outliers; auto: context for public text, none for your own files"
    )
    publish_log: bool = Field(False, description="publish run.log too, with paths and host names taken out")

    @field_validator("publish_to")
    @classmethod
    def _plain_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        return check_target_url(url)

    @model_validator(mode="after")
    def _consistent(self) -> StudySpec:
        self.deciding_site  # noqa: B018 - raises where it is undetermined
        if self.capture.store != "full":
            check_store(self)
        if self.probe.asked and self.compute.shards > 1:
            raise ValueError(
                "a probe reads the whole model on one machine, and --shards gives each machine a part of the corpus: leave one "
                "of them out; `outliers probe STUDY` probes the study once it is done"
            )
        self._check_processes()
        return self

    def _check_processes(self) -> None:
        processes, shards = self.compute.processes or 1, self.compute.shards
        if processes == 1:
            return
        if self.capture.store != "full" or self.compute.schedule == "layers":
            one = f"--store {self.capture.store}" if self.capture.store != "full" else "--schedule layers"
            raise ValueError(f"{one} reads with one process: leave --processes {processes} out")
        if shards > 1 and self.compute.runs_here:
            raise ValueError(
                f"--shards {shards} on this computer are processes already: leave --processes {processes} out, or give "
                f"--shards {shards * processes}"
            )
        batches = -(-self.corpus.num_sequences // self.capture.batch_sequences)
        if processes * shards > batches:
            each = f" on each of {shards} machines" if shards > 1 else ""
            raise ValueError(
                f"--processes {processes}{each} is more than the {batches} batches of {self.capture.batch_sequences} "
                f"sequence{'s' * (self.capture.batch_sequences > 1)} there are to share: at most {max(1, batches // shards)}"
            )

    @property
    def deciding_site(self) -> str:
        """The site whose list is `systematic`."""
        return deciding_site(self.capture.sites, self.criteria.site)


PARTS: dict[str, type[Part]] = {
    "model": ModelSpec,
    "corpus": CorpusSpec,
    "capture": CaptureSpec,
    "criteria": CriteriaSpec,
    "formats": FormatsSpec,
    "probe": ProbeSpec,
    "compute": ComputeSpec,
}
"""The parts of a StudySpec by their fields."""


def has_block(sites: tuple[str, ...]) -> bool:
    """Whether both sites of the block were captured."""
    return set(BLOCK_SITES) <= set(sites)


def deciding_site(sites: tuple[str, ...], asked: str | None) -> str:
    """`asked`, or block where both of its sites are read, or the only site; ValueError where that leaves a choice."""
    options = [*sites, *([BLOCK] if has_block(sites) else [])]
    if asked is not None:
        if asked not in options:
            raise ValueError(f"criteria site '{asked}' is not captured; captured: {', '.join(options)}")
        return asked
    if has_block(sites):
        return BLOCK
    if len(sites) == 1:
        return sites[0]
    raise ValueError(f"sites {', '.join(sites)} leave open which one decides: name it with --site")

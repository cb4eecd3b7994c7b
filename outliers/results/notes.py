"""The notes of summary.json: what a reader must know of its numbers, in sentences. It counts nothing."""

from __future__ import annotations

from outliers.counting.massive import Massive
from outliers.counting.summary import Summary
from outliers.model.families import INPUT
from outliers.results.intervals import FEWEST_SEQUENCES
from outliers.results.schema import Perplexity
from outliers.spec import BLOCK_SITES
from outliers.study.prepare import Prepared

ROWS_LEFT_OUT = "features.parquet holds "
"""How the note begins that says how many rows of the table are kept."""

GROWING = (
    "pooled, union and affected call a layer affected by a hit anywhere, which more tokens only add to: studies of different "
    "numbers of tokens do not compare by them; per_layer does, and a share of layers has no interval"
)
TEXT_LEFT_OUT = "text of the corpus is left out (--publish-text context shows it)"
RESID = (
    "resid: the residual stream grows with depth, so that magnitude {0:g} says nothing there; see the ladder in standard "
    "deviations"
)


def notes(prepared: Prepared, summary: Summary, massive: Massive | None, cut: list[str]) -> list[str]:
    """All notes but those of the table and of perplexity. cut: the lists that do not hold all of their features."""
    found = []
    if cut:
        found.append(f"lists cut to their largest features, see reading_counts: {', '.join(cut)}")
    found += _of_corpus(prepared)
    nonfinite = sum(int(totals.nonfinite.sum()) for totals in summary.sites.values())
    if nonfinite:
        found.append(
            f"{nonfinite:,} {'value is' if nonfinite == 1 else 'values are'} not finite: no hits, and in no other number, but "
            "their tokens stay in N, so that every fraction of tokens is lower for them; in the median of their own token they "
            "are 0"
        )
    if "resid" in summary.frame.captured:
        found.append(RESID.format(summary.frame.magnitude))
    if prepared.model.dtype == "float32":
        found.append(
            "kurtosis, median_magnitude, quantiles, sd_hits and the magnitude histogram are of values rounded to bfloat16; "
            "massive activations are decided by the exact median, and every other number is exact"
        )
    if massive is not None and massive.bounded:
        layers = ", ".join(str(prepared.layers[layer]) for layer in massive.bounded)
        found.append(
            f"the merged summaries only bound the median of layers {layers} at resid, to 0.4%: ratios there are of the middle of "
            f"the bound, and {massive.undecided:,} values are neither counted nor ruled out as massive; the whole capture on one "
            "machine tells"
        )
    return found + _of_model(prepared) + _of_text(prepared)


def _of_corpus(prepared: Prepared) -> list[str]:
    number, found = prepared.corpus.num_sequences, [GROWING]
    if number < 2:
        found.append("one sequence: there are no confidence intervals over sequences")
    elif number < FEWEST_SEQUENCES:
        found.append(
            f"{number} sequences: beside a share of tokens stand the least and the largest of a sequence, no confidence "
            f"interval; one that covers takes {FEWEST_SEQUENCES} sequences"
        )
    return found


def _of_model(prepared: Prepared) -> list[str]:
    found = []
    if (stored := prepared.model.stored_quantization) and prepared.model.quantization is None:
        found.append(
            f"the checkpoint is stored in {stored}; its weights were made plain ({prepared.model.dtype}) on loading"
        )
    if len(prepared.layers) < prepared.model.num_layers:
        found.append(
            f"{len(prepared.layers)} of {prepared.model.num_layers} layers were read: layer fractions are of those"
        )
    anatomy, sites = prepared.model.anatomy, prepared.spec.capture.sites
    for site in sites:
        other = anatomy.alias_of(site)
        if other in sites:
            found.append(f"{site} is the very same tensor as {other}: one norm feeds attention and MLP")
    named = [item.partition("=")[0] for item in prepared.spec.capture.site_modules]
    bare = [s for s in BLOCK_SITES if s not in named and s in sites and anatomy.sites[s][0].endswith(INPUT)]
    if bare:
        found.append(
            f"no norm comes before it in this family: {' and '.join(bare)} is the residual stream itself, whose scale grows "
            "with depth"
        )
    return found + [f"a site was named by hand: {item}" for item in prepared.spec.capture.site_modules]


def _of_text(prepared: Prepared) -> list[str]:
    found = []
    if prepared.corpus.lengths_sha256 is not None:
        found.append("sequences have unequal lengths: padding is masked and counted nowhere")
    if not prepared.text:
        found.append(TEXT_LEFT_OUT)
    return found


def perplexity_notes(prepared: Prepared, measured: Perplexity) -> list[str]:
    """How perplexity was measured, and why it is not a number where it is not."""
    corpus = prepared.spec.corpus
    windows = "documents cut at" if corpus.packing == "documents" else "windows of packed documents, each of"
    texts = [
        f"perplexity is of {windows} {corpus.sequence_length:,} tokens, without a sliding context: the first tokens of each are "
        "predicted from few, and it is higher than a sliding evaluation's"
    ]
    if measured.loss is None:
        texts.append("perplexity is not a number: the model's logits are not finite on this corpus")
    elif measured.value is None:
        texts.append(f"perplexity is beyond float64: exp of a loss of {measured.loss:.6f} nats a token")
    return texts

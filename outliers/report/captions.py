"""Heading and caption of every picture there may be, by file name, in the order of the page."""

from __future__ import annotations

from outliers.report.expert_plots import ENTROPY_PLOT, GIVERS_PLOT, LOAD_PLOT, OUTPUT_PLOT
from outliers.report.formats import FORMATS_PLOT
from outliers.report.layer_plots import MAX_TRAJECTORIES
from outliers.report.token_plots import MAX_KIND_ROWS, MAX_POSITION_ROWS

PLOT_TEXTS = {
    "heatmap.png": (
        "Layers and features",
        "Signed value of the largest magnitude of each feature in each layer at the deciding site: the systematic "
        "features (◆, above "
        "the line), then those that reach furthest. A dot, or a bold number, is a hit; a cell without one stayed below the "
        "magnitude, which is marked on the bar. The scale is that of a logarithm on both sides of zero, so that one cell can't "
        "wash out the others. A grey cell has no known value: results of before pictures.json hold the hits alone.",
    ),
    "trajectories.png": (
        "Each feature on its way through the model",
        f"Largest magnitude of the systematic features, the first {MAX_TRAJECTORIES} at most, in each layer of the "
        "residual stream where "
        "resid was read, else at each site that was; on a log axis. Grey: the median of all magnitudes there.",
    ),
    "largest_by_layer.png": (
        "Largest magnitudes by layer",
        "The kind of figure 2 of Sun et al. 2024, on a log axis: the largest magnitude in the whole corpus of the "
        "three features "
        "that reach furthest, and the median of all magnitudes. Sun et al. average the three largest values of a sequence over "
        "sequences; here each line is one maximum over all tokens, so that one token can make it. Dashed: the mean over "
        "the sequences of the largest in each, which is averaged as theirs is. Results of before pictures.json know "
        "the largest "
        "feature alone.",
    ),
    "layer_curves.png": (
        "Layer by layer, site by site",
        "Above: the largest magnitude of each layer; a thin line is a quantile of all its magnitudes. Below: the Pearson "
        "kurtosis of all its values.",
    ),
    "magnitudes.png": (
        "How many values are how large",
        "Share of all finite values whose magnitude is at least x, on two log axes, read at the lower edges of bins "
        "of four an octave. "
        "Where a line meets the dashed one is the share of hits. float32 values are rounded to bfloat16 for this count.",
    ),
    "sweep.png": (
        "Threshold sweep",
        "How many features pass at the deciding site when another magnitude is asked for, by each reading. A thin line "
        "leaves out the first token of each sequence; it is drawn where that changes a number.",
    ),
    "positions.png": (
        "Positions",
        f"The systematic features, the first {MAX_POSITION_ROWS} at most: share of the tokens at a position that have "
        "a hit in any layer. "
        "Where sequences differ in length it is the share of the feature's own tokens. Each row has its own scale.",
    ),
    "kinds.png": (
        "Kinds of tokens",
        f"The systematic features, the first {MAX_KIND_ROWS} at most: of their tokens with a hit in any layer, how "
        "many are special "
        "(BOS, EOS), delimiters (blanks or punctuation alone), digits, starts of words or pieces within words. Above "
        "the line: all "
        "tokens of the corpus. A feature whose bar looks like that one does not care for the kind.",
    ),
    "massive_surface.png": (
        "The largest massive activations",
        "The kind of figure 1 of Sun et al. 2024: tokens by features in the layer with the largest massive "
        "activation. A token is shown "
        "by its text, or as sequence:position. The floor is what is not listed as massive: of these cells nothing is "
        "known here but "
        "that.",
    ),
    "massive_positions.png": (
        "Positions of massive activations",
        f"The features of the massive activations, the first {MAX_POSITION_ROWS} at most: share of the tokens at a "
        "position on which they "
        "are massive in any layer. Each row has its own scale.",
    ),
}
FORMAT_TEXTS = {
    FORMATS_PLOT: (
        "Error by site and layer",
        "Every feature is quantized; static formats have the range of the whole corpus.",
    ),
}
"""The same of plots that stand below the heading of the number formats, of studies that have these."""
EXPERT_TEXTS = {
    LOAD_PLOT: (
        "Load",
        "Tokens of each routed expert over the mean of its layer, on a log scale: red above the mean, blue below. A hatched "
        "expert was reached by no token.",
    ),
    OUTPUT_PLOT: (
        "Largest output",
        "Largest magnitude of each routed expert's output over its tokens, on a log scale. A ring is a super expert by the "
        "reading over all tokens. A hatched expert is unknown.",
    ),
    ENTROPY_PLOT: (
        "Entropy and coverage by layer",
        "Above: entropy of the experts' shares of tokens over ln E. Below: the share of the layer's experts with few tokens.",
    ),
    GIVERS_PLOT: (
        "Who gives a feature",
        "Share of each layer's sum of squares of weighted outputs at the feature's channel, by expert; cross terms between "
        "experts are ignored. Grey: all other experts.",
    ),
}
"""The same of plots that stand below the heading of the experts, of mixtures."""
MASSIVE_PLOTS = ("massive_surface.png", "massive_positions.png")
"""Plots that stand below the heading of the massive activations."""
ALL_TEXTS = PLOT_TEXTS | FORMAT_TEXTS | EXPERT_TEXTS

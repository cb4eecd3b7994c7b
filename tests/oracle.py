"""The definitions of SCIENCE.md again, slowly: loops, Fractions and float64 over raw arrays.

Shares no code with the project. `acts` maps a site to an array (layer, sequence, position, feature) of float64 that
holds exactly the values that were stored.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def hit_masks(acts, magnitude):
    """site -> bool (layer, sequence, position, feature), block included where it can be had."""
    masks = {}
    for site, values in acts.items():
        mask = np.zeros(values.shape, bool)
        for at in np.ndindex(values.shape):
            x = float(values[at])
            mask[at] = np.isfinite(x) and abs(x) >= magnitude
        masks[site] = mask
    if "attn_in" in masks and "mlp_in" in masks:
        masks["block"] = masks["attn_in"] | masks["mlp_in"]
    return masks


def readings(mask, layer_fraction, position_fraction):
    """reading -> set of features that pass, from one site's mask; the fractions are strings such as "0.06"."""
    layer_share, position_share = Fraction(layer_fraction), Fraction(position_fraction)
    num_layers, num_sequences, positions, width = mask.shape
    tokens = num_sequences * positions
    found = {"pooled": set(), "union": set(), "per_layer": set(), "affected": set()}
    for j in range(width):
        per_layer = [int(mask[layer, :, :, j].sum()) for layer in range(num_layers)]
        touched = [n for n in per_layer if n]
        layers_ok = Fraction(len(touched), num_layers) >= layer_share
        union = sum(bool(mask[:, s, t, j].any()) for s in range(num_sequences) for t in range(positions))
        if layers_ok and Fraction(sum(per_layer), num_layers * tokens) >= position_share:
            found["pooled"].add(j)
        if layers_ok and Fraction(union, tokens) >= position_share:
            found["union"].add(j)
        strong = [n for n in per_layer if Fraction(n, tokens) >= position_share]
        if Fraction(len(strong), num_layers) >= layer_share:
            found["per_layer"].add(j)
        if layers_ok and touched and Fraction(sum(touched), len(touched) * tokens) >= position_share:
            found["affected"].add(j)
    return found


def legacy_pairs(masks, layer_fraction, position_fraction):
    """(sequence, feature) pairs of the earlier pipeline's reading; masks are of values rounded to bfloat16."""
    both = np.concatenate([masks["attn_in"], masks["mlp_in"]])  # every hook is its own layer
    hooks, num_sequences, positions, width = both.shape
    pairs = set()
    for s in range(num_sequences):
        for j in range(width):
            hit = both[:, s, :, j]
            share_of_hooks = Fraction(int(hit.any(axis=1).sum()), hooks)
            share_of_positions = Fraction(int(hit.any(axis=0).sum()), positions)
            if share_of_hooks >= Fraction(layer_fraction) and share_of_positions >= Fraction(position_fraction):
                pairs.add((s, j))
    return pairs


def to_bfloat16(x):
    """One float rounded to bfloat16, ties to even, worked out from its neighbours."""
    if x == 0 or not np.isfinite(x):
        return x
    exponent = int(np.floor(np.log2(abs(x))))
    step = 2.0 ** (exponent - 7)
    low = np.floor(abs(x) / step)
    rest = abs(x) / step - low
    up = rest > 0.5 or (rest == 0.5 and low % 2 == 1)
    return float(np.copysign((low + up) * step, x))


def pearson_kurtosis(values):
    """Of a flat array of finite float64."""
    mean = sum(values) / len(values)
    second = sum((x - mean) ** 2 for x in values) / len(values)
    fourth = sum((x - mean) ** 4 for x in values) / len(values)
    return fourth / second**2

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


def with_block(acts):
    """site -> (layer, sequence, position, feature); block has a leading axis of the two sites in the place of values."""
    return {site: values[None] for site, values in acts.items()} | (
        {"block": np.stack([acts["attn_in"], acts["mlp_in"]])} if {"attn_in", "mlp_in"} <= acts.keys() else {}
    )


def totals(acts, ladder, lengths):
    """site -> what a summary holds of it, from float64 arrays (layer, sequence, position, feature), padding cut by lengths."""
    real = np.arange(next(iter(acts.values())).shape[2])[None, :] < np.asarray(lengths)[:, None]  # (sequence, position)
    found = {}
    for site, members in with_block(acts).items():
        finite = np.isfinite(members) & real[None, None, :, :, None]
        sizes = np.where(finite, np.abs(members), -1.0)
        hits = np.stack([(sizes >= step).any(axis=0) for step in ladder])  # (K, layer, sequence, position, feature)
        found[site] = {
            "hits": hits.sum(axis=(2, 3)),
            "first_hits": hits[:, :, :, 0].sum(axis=2),
            "union": hits.any(axis=1).sum(axis=(1, 2)),
            "first_union": hits.any(axis=1)[:, :, 0].sum(axis=1),
            "max": np.where(finite, members, -np.inf).max(axis=(0, 2, 3)),
            "min": np.where(finite, members, np.inf).min(axis=(0, 2, 3)),
        }
        if site != "block":
            values = np.where(finite[0], members[0], 0.0)
            found[site]["nonfinite"] = (~finite[0] & real[None, :, :, None]).sum(axis=(1, 2, 3))
            found[site]["finite"] = finite[0].sum(axis=(1, 2))
            found[site]["moments"] = np.stack([(values**power).sum(axis=(1, 2)) for power in (1, 2, 3, 4)])
            found[site]["absolute"] = np.stack([(np.abs(values) ** power).sum(axis=(1, 2)) for power in (1, 2, 3, 4)])
    return found


def largest_tokens(acts, site, magnitude, lengths, keep):
    """feature -> (sequence, position, layer, member site, value) of its tokens of largest magnitude, in order."""
    members = ["attn_in", "mlp_in"] if site == "block" else [site]
    num_layers, num_sequences, _, width = acts[members[0]].shape
    found = {}
    for j in range(width):
        cells = []
        for s in range(num_sequences):
            for t in range(lengths[s]):
                best = None
                for layer in range(num_layers):
                    for member in members:
                        x = float(acts[member][layer, s, t, j])
                        if np.isfinite(x) and abs(x) >= magnitude and (best is None or abs(x) > abs(best[4])):
                            best = (s, t, layer, member, x)
                if best is not None:
                    cells.append(best)
        if cells:
            found[j] = sorted(cells, key=lambda cell: (-abs(cell[4]), cell[0], cell[1]))[:keep]
    return found


def quantile(magnitudes, level):
    """Nearest rank: the smallest value that at least this share does not exceed. level: a string such as "0.999"."""
    ordered = sorted(magnitudes)
    for rank, value in enumerate(ordered, start=1):
        if Fraction(rank, len(ordered)) >= Fraction(level):
            return value
    return ordered[-1]


def resampled(mask, resamples, layer_fraction, position_fraction):
    """reading -> a list of the features that pass, for each draw of whole sequences; seed 0 of numpy's frozen stream."""
    random = np.random.RandomState(0)
    found = {"pooled": [], "union": [], "per_layer": [], "affected": []}
    for _ in range(resamples):
        drawn = random.randint(0, mask.shape[1], mask.shape[1])
        for reading, features in readings(mask[:, drawn], layer_fraction, position_fraction).items():
            found[reading].append(features)
    return found


def _of_sequence(mask, feature, reading, affected, tokens):
    """(counted, out of how many) of each sequence for the share of tokens of a reading; None where it has none."""
    if reading == "per_layer":
        return None
    found = []
    for s, length in enumerate(tokens):
        own = mask[:, s, :length, feature]
        if reading == "union":
            found.append((int(own.any(axis=0).sum()), length))
        else:
            layers = mask.shape[0] if reading == "pooled" else affected
            found.append((int(own.sum()), layers * length))
    return found


def _counted(mask, feature, reading, lengths=None):
    tokens = [mask.shape[2]] * mask.shape[1] if lengths is None else lengths
    real = [mask[layer, s, :n, feature].any() for layer in range(mask.shape[0]) for s, n in enumerate(tokens)]
    affected = sum(any(real[layer * len(tokens) : (layer + 1) * len(tokens)]) for layer in range(mask.shape[0]))
    return _of_sequence(mask, feature, reading, affected, tokens)


def sequence_shares(mask, feature, reading):
    """The share of tokens of each sequence alone, the layers of `affected` being those of all; None for per_layer."""
    found = _counted(mask, feature, reading)
    return None if found is None else [count / whole for count, whole in found]


T_16 = 2.946712883338617
"""The t that 1% of Student's distribution with 15 degrees of freedom lies beyond, both ends together (a printed table: 2.947)."""


def logit_interval(mask, feature, reading, lengths=None):
    """Of 16 sequences: the two ends of the ratio of sums, on the logit scale; None for per_layer."""
    found = _counted(mask, feature, reading, lengths)
    if found is None:
        return None
    ratio = Fraction(sum(count for count, _ in found), sum(whole for _, whole in found))
    if ratio in (0, 1):
        return [float(ratio)] * 2
    squares = sum((count - ratio * whole) ** 2 for count, whole in found) * 16 / 15
    error = float(squares) ** 0.5 / sum(whole for _, whole in found)
    share = float(ratio)
    odds, factor = share / (1 - share), np.exp(T_16 * error / (share * (1 - share)))
    return [odds / factor / (1 + odds / factor), odds * factor / (1 + odds * factor)]

"""Triton kernels that count one layer of one or both sites of a group, on a CUDA device or under Triton's interpreter.

`count_tile` takes a tile of 32 x 64 values of both sites: extremes, hits at every magnitude of the ladder, histogram, keys. All
of it are integers, added or compared by atomic operations, so their order does not matter. `add_moments` adds the float64 sums
of a column row after row, as the compiled loops of `kernels.tile` do: no float is added by an atomic operation, and products
are not fused with sums. Values come as the integers of their bits. Knows pointers and strides. A kernel is started with each
pointer and number by itself, so the lists are long; `triton_ops` alone writes them.

Compiled for sm_80 and sm_90 a tile of 64 x 64 does not fit the registers. The histogram is one of 64-bit counters a layer in
the device's cache: Triton gives a program no memory of its own that it could address.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS: tl.constexpr = tl.constexpr(32)
COLUMNS: tl.constexpr = tl.constexpr(64)
HIGHEST: tl.constexpr = tl.constexpr(2**31 - 1)
LOWEST: tl.constexpr = tl.constexpr(-(2**31))
KEY_SHIFT: tl.constexpr = tl.constexpr(17)
PATTERNS: tl.constexpr = tl.constexpr(65_536)
FLOAT16_KIND: tl.constexpr = tl.constexpr(1)
FLOAT32_KIND: tl.constexpr = tl.constexpr(2)


# what differs from layer to layer is not compiled in: a variant takes seconds
@triton.jit(do_not_specialize=["layer", "source_one", "source_other", "positions"])
def count_tile(
    one,
    other,
    lengths,
    ladder,
    hits_one,
    hits_other,
    hits_both,
    first_one,
    first_other,
    first_both,
    own_one,
    own_other,
    own_both,
    extremes_one,
    extremes_other,
    nonfinite_one,
    nonfinite_other,
    histogram_one,
    histogram_other,
    tops_one,
    tops_other,
    keys_one,
    keys_other,
    positions,
    key_positions,
    width,
    layer,
    num_layers,
    source_one,
    source_other,
    PAIR: tl.constexpr,
    KIND: tl.constexpr,
    MASK: tl.constexpr,
    INFINITY: tl.constexpr,
    STEPS: tl.constexpr,
    DECIDING: tl.constexpr,
):
    """Count a tile of (sequence, position, feature) bits. Pointers and shapes are those of `state.SiteState`.

    one, other: contiguous, `positions` positions a sequence. lengths: (sequence,) int32. key_positions: positions of `keys`.
    source_one, source_other: the source bits of a key. PAIR: whether `other` is counted, and both together.
    """
    row = tl.program_id(2)
    length = tl.load(lengths + row)
    at = tl.program_id(0) * ROWS
    if at < length:
        rows = at + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (rows < length)[:, None] & (columns < width)[None, :]
        offsets = (row * positions + rows).to(tl.int64)[:, None] * width + columns[None, :]
        keys_at = (row * key_positions + rows).to(tl.int64)[:, None] * width + columns[None, :]
        place = layer * width + columns
        own_place = (row * num_layers + layer) * width + columns
        first = (rows == 0)[:, None]
        magnitude = _count_site(
            one, offsets, inside, columns < width, extremes_one, nonfinite_one, histogram_one, tops_one, keys_one,
            keys_at, place, own_place, layer, num_layers, width, source_one, KIND, MASK, INFINITY,
        )  # fmt: skip
        _count_hits(
            magnitude, first, columns < width, at, ladder, hits_one, first_one, own_one, place, own_place, num_layers,
            width, STEPS, DECIDING,
        )  # fmt: skip
        if PAIR:
            second = _count_site(
                other, offsets, inside, columns < width, extremes_other, nonfinite_other, histogram_other, tops_other,
                keys_other, keys_at, place, own_place, layer, num_layers, width, source_other, KIND, MASK, INFINITY,
            )  # fmt: skip
            _count_hits(
                second, first, columns < width, at, ladder, hits_other, first_other, own_other, place, own_place,
                num_layers, width, STEPS, DECIDING,
            )  # fmt: skip
            _count_hits(
                tl.maximum(magnitude, second), first, columns < width, at, ladder, hits_both, first_both, own_both, place,
                own_place, num_layers, width, STEPS, DECIDING,
            )  # fmt: skip


@triton.jit
def _count_site(
    values, offsets, inside, used, extremes, nonfinite, histogram, tops, keys, keys_at, place, own_place, layer,
    num_layers, width, source, KIND: tl.constexpr, MASK: tl.constexpr, INFINITY: tl.constexpr,
):  # fmt: skip
    """All of one site but its hits; returns the magnitudes as int32 bits, -1 where a value is not finite or not inside."""
    signed = tl.load(values + offsets, mask=inside, other=0).to(tl.int32)
    bits = signed & MASK
    finite = inside & (bits < INFINITY)
    magnitude = tl.where(finite, bits, -1)
    wrong = tl.sum((inside & (bits >= INFINITY)).to(tl.int32), 0)
    tl.atomic_add(nonfinite + place, wrong.to(tl.int64), mask=used & (wrong > 0), sem="relaxed")
    ordered = signed ^ ((signed >> 31) & MASK)
    least = tl.min(tl.where(finite, ordered, HIGHEST), 0)
    greatest = tl.max(tl.where(finite, ordered, LOWEST), 0)
    some = used & (least <= greatest)
    tl.atomic_min(extremes + place, least, mask=some, sem="relaxed")
    tl.atomic_max(extremes + num_layers * width + place, greatest, mask=some, sem="relaxed")
    tl.atomic_max(tops + own_place, tl.max(magnitude, 0), mask=some, sem="relaxed")
    if KIND == FLOAT32_KIND:
        whole = signed.to(tl.int64) & 0xFFFFFFFF
        pattern = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16
        # the largest float32 would round to infinity; it is counted as the largest finite bfloat16
        pattern = tl.where((pattern & 0x7FFF) == 0x7F80, pattern - 1, pattern)
        key = (bits.to(tl.int64) << KEY_SHIFT) | source | (signed < 0).to(tl.int64)
    else:
        pattern = (signed & 0xFFFF).to(tl.int64)
        long = (bits.to(tl.int64) << KEY_SHIFT) | source | (signed < 0).to(tl.int64)
        key = (long - 2147483648).to(tl.int32)
    bins = histogram + layer * PATTERNS + (pattern & 0xFFFF)
    tl.atomic_add(bins, tl.full(pattern.shape, 1, tl.int64), mask=finite, sem="relaxed")
    # one program has these keys in this launch, and launches follow each other
    before = tl.load(keys + keys_at, mask=finite, other=0)
    tl.store(keys + keys_at, tl.maximum(before, key), mask=finite)
    return magnitude


@triton.jit
def _count_hits(
    magnitude, first, used, at, ladder, hits, firsts, own, place, own_place, num_layers, width, STEPS: tl.constexpr,
    DECIDING: tl.constexpr,
):  # fmt: skip
    for step in tl.static_range(STEPS):
        limit = tl.load(ladder + step)
        hit = magnitude >= limit
        count = tl.sum(hit.to(tl.int32), 0)
        found = used & (count > 0)
        tl.atomic_add(hits + step * num_layers * width + place, count.to(tl.int64), mask=found, sem="relaxed")
        if step == DECIDING:
            tl.atomic_add(own + own_place, count, mask=found, sem="relaxed")
        if at == 0:
            begins = tl.sum((hit & first).to(tl.int64), 0)
            tl.atomic_add(firsts + step * num_layers * width + place, begins, mask=found & (begins > 0), sem="relaxed")


@triton.jit(do_not_specialize=["layer", "positions", "batch", "span_positions"])
def add_moments(
    values,
    lengths,
    moments,
    positions,
    width,
    layer,
    num_layers,
    batch,
    span_positions,
    KIND: tl.constexpr,
    MASK: tl.constexpr,
    INFINITY: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add the powers of WIDE columns, (4, L, W) float64, of one sequence after the other, a span at a time, row after row."""
    columns = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    used = columns < width
    place = moments + layer * width + columns
    step = num_layers * width
    total1 = tl.load(place, mask=used, other=0.0)
    total2 = tl.load(place + step, mask=used, other=0.0)
    total3 = tl.load(place + 2 * step, mask=used, other=0.0)
    total4 = tl.load(place + 3 * step, mask=used, other=0.0)
    for row in range(batch):
        length = tl.load(lengths + row)
        start = 0
        while start < length:
            stop = tl.minimum(start + span_positions, length)
            sum1 = tl.zeros([WIDE], tl.float64)
            sum2 = tl.zeros([WIDE], tl.float64)
            sum3 = tl.zeros([WIDE], tl.float64)
            sum4 = tl.zeros([WIDE], tl.float64)
            for position in range(start, stop):
                offset = (row * positions + position).to(tl.int64) * width
                signed = tl.load(values + offset + columns, mask=used, other=0).to(tl.int32)
                finite = (signed & MASK) < INFINITY
                x = tl.where(finite, _value(signed, KIND), 0.0)
                xx = x * x
                sum1 += x
                sum2 += xx
                sum3 += xx * x
                sum4 += xx * xx
            total1 += sum1
            total2 += sum2
            total3 += sum3
            total4 += sum4
            start = stop
    tl.store(place, total1, mask=used)
    tl.store(place + step, total2, mask=used)
    tl.store(place + 2 * step, total3, mask=used)
    tl.store(place + 3 * step, total4, mask=used)


@triton.jit
def _value(signed, KIND: tl.constexpr):
    """int32 of sign-extended bits as float64, exactly."""
    if KIND == FLOAT32_KIND:
        value = signed.to(tl.float32, bitcast=True).to(tl.float64)
    elif KIND == FLOAT16_KIND:
        value = signed.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float64)
    else:
        value = (signed << 16).to(tl.float32, bitcast=True).to(tl.float64)
    return value

"""What the forward and the backward kernels share: which tiles a program visits, and the scores of one tile.

A tile's rows are query positions i, its columns key positions j, both counted within their sequence. Scores are computed in
natural units only where something besides the scale changes them; otherwise the raw products stay, and `factor` (scale times
log2 e) enters the exponent's fused multiply-add, exp2(s * factor - m). With a bias the maximum m and lse are natural too, and
the difference comes first, exp2((s - m) * factor): a mask of finfo.min times log2 e would be -inf, and where scores lie far
from 0 only their difference is exact.
"""

import triton
import triton.language as tl

# Numbers that change from call to call. Triton would compile a kernel again where one is 1 or a multiple of 16; of the strides
# only those of large tensors are worth that, because wide loads follow from them.
CHANGING = (
    "batch", "heads", "group", "groups", "n_heads", "n_q", "n_k", "n_rows", "n_columns", "n_column_tiles", "n_row_tiles",
    "n_q_tiles", "n_k_tiles", "n_tiles", "n_work", "section", "left", "right", "threshold", "stride_lb", "stride_lh",
    "stride_slope_b", "stride_index_b", "stride_index_h", "index_end", "q_tokens", "k_tokens", "stride_bias_b",
    "stride_bias_h", "stride_mask_b", "stride_mask_h", "stride_dbias_b", "stride_dbias_h",
)  # fmt: skip


@triton.jit
def sixteens(n):
    """A multiple of 16 that the compiler knows to be one: what is masked by it may be read in vectors."""
    return n // 16 * 16


@triton.jit
def of_head(X, b, h, stride_b, stride_h, ALIGNED: tl.constexpr):
    """Where a head's part of a bias or mask begins. ALIGNED: its strides are multiples of 16, and that is as the compiler is to
    know it."""
    if ALIGNED:
        stride_b, stride_h = sixteens(stride_b), sixteens(stride_h)
    return X + b * stride_b + h * stride_h


@triton.jit
def tile_range(r0, r1, n, diagonal, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """The column tiles that rows r0..r1 see, of n columns: (first, last, full_first, full_last).

    Row r sees columns r + diagonal - left .. r + diagonal + right. Tiles first..last are visited; in those of
    full_first..full_last every row sees every column, so they need no mask.
    """
    low, high, full_low, full_high = 0, n, 0, n
    if LEFT:
        low = tl.maximum(r0 + diagonal - left, 0)
        full_low = tl.maximum(r1 - 1 + diagonal - left, 0)
    if RIGHT:
        high = tl.minimum(r1 + diagonal + right, n)
        full_high = tl.maximum(tl.minimum(r0 + diagonal + right + 1, n), 0)
    first = low // BLOCK
    last = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK), first)
    full_first = tl.minimum(tl.cdiv(full_low, BLOCK), last)
    full_last = tl.maximum(tl.minimum(full_high // BLOCK, last), full_first)
    return first, last, full_first, full_last


@triton.jit
def nth_masked(t, first, full_first, full_last):
    """The t-th of the tiles first..full_first, full_last..last."""
    before = full_first - first
    return tl.where(t < before, first + t, full_last + t - before)


@triton.jit
def work_item(work, n_tiles, heads, group, section, n_heads, HEAVY_LAST: tl.constexpr):
    """(tile, batch, head) of a unit of work. Heads come in sections whose keys and values fit the L2 cache together; within
    a section the tiles with the most work come first, so that the short ones fill the chip's tail."""
    per_section = section * n_tiles
    s = work // per_section
    rest = work % per_section
    heads_here = tl.minimum(section, n_heads - s * section)
    rank = rest // heads_here
    bh = s * section + rest % heads_here
    tile = n_tiles - 1 - rank if HEAVY_LAST else rank
    # More than 2^31 units are counted in 64 bits, but each of the three fits 32.
    return tile.to(tl.int32), (bh // heads).to(tl.int32), (bh % heads).to(tl.int32)


@triton.jit
def used(Used, b, most):
    """Sequence b's number of keys in use. On a GPU nobody has checked it: beyond `most` lies another sequence, or nothing."""
    return tl.maximum(tl.minimum(tl.load(Used + b), most), 0)


@triton.jit
def sequence(b, n, Cu, Used, VARLEN: tl.constexpr):
    """(first token, length) of sequence b; for dense tensors (0, n)."""
    start, length = tl.full((), 0, tl.int64), n
    if VARLEN:
        start = tl.load(Cu + b).to(tl.int64)
        length = (tl.load(Cu + b + 1) - start).to(tl.int32)
    if Used is not None:
        length = used(Used, b, length)
    return start, length


@triton.jit
def load_tile(
    base,
    r0,
    stride,
    n,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGE: tl.constexpr,
    TRANS: tl.constexpr,
    FAR: tl.constexpr,
    c0=0,
):
    """Rows r0 .. r0 + ROWS (of n, where EDGE says that this must be asked) of a matrix of WIDTH columns, padded with 0; of its
    columns those from c0, a multiple of COLUMNS."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    # One 64-bit scalar and 32-bit offsets, where they reach: pointers of a tile's elements are its largest use of registers.
    if FAR:
        r = r.to(tl.int64)
    start = base + r0.to(tl.int64) * stride + c0
    if TRANS:
        offsets, rows, columns = r[None, :] * stride + c[:, None], (r0 + r < n)[None, :], (c0 + c < WIDTH)[:, None]
    else:
        offsets, rows, columns = r[:, None] * stride + c[None, :], (r0 + r < n)[:, None], (c0 + c < WIDTH)[None, :]
    if EDGE:
        return tl.load(start + offsets, mask=rows & columns, other=0.0)
    elif WIDTH % COLUMNS == 0:
        return tl.load(start + offsets)
    else:
        return tl.load(start + offsets, mask=columns, other=0.0)


@triton.jit
def product(
    a_base,
    a0,
    stride_a,
    n_a,
    b_base,
    b0,
    stride_b,
    n_b,
    WIDTH: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    FAR: tl.constexpr,
):
    """A tile of a b^T of two matrices of WIDTH columns, CHUNK of them at a time: for rows too wide to be held."""
    total = tl.zeros((A_ROWS, B_ROWS), tl.float32)
    for c0 in tl.range(0, WIDTH, CHUNK):
        a = load_tile(a_base, a0, stride_a, n_a, WIDTH, A_ROWS, CHUNK, True, False, FAR, c0)
        b = load_tile(b_base, b0, stride_b, n_b, WIDTH, B_ROWS, CHUNK, True, True, FAR, c0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _tanh(x):
    # exp2 alone loses digits to cancellation near 0, which float32 inputs would show.
    e = tl.exp2(tl.minimum(x, 15.0) * 2.8853900817779268)
    square = x * x
    series = x * (1 - square * (0.33333334 - square * (0.13333334 - square * (0.05396825 - square * 0.021869488))))
    return tl.where(square < 0.0625, series, 1 - 2 / (e + 1))


@triton.jit
def modified_scores(
    qk, i, j, inside, diagonal, scale, softcap, slope, Bias, stride_bias_s, stride_bias_t, SOFTCAP: tl.constexpr
):
    """(scores, d score / d (q k^T * scale) or 1) of products qk at rows i, columns j; `inside` marks what exists.

    The order is that of reference.py. With nothing to modify the scores are the raw products.
    """
    derivative = 1.0
    if SOFTCAP:
        capped = _tanh(qk * (scale / softcap))
        derivative = 1 - capped * capped
        qk = capped * softcap
    elif Bias is not None or slope is not None:
        qk = qk * scale
    if slope is not None:
        qk -= slope * tl.abs(i + diagonal - j).to(tl.float32)
    if Bias is not None:
        bias = tl.load(Bias + i.to(tl.int64) * stride_bias_s + j * stride_bias_t, mask=inside, other=0.0)
        if Bias.dtype.element_ty == tl.float64:  # its lowest number is not -inf in float32 either
            lowest = -3.4028234663852886e38
            bias = tl.where(bias == float("-inf"), bias, tl.maximum(bias, lowest))
        qk += bias.to(tl.float32)
    return qk, derivative


@triton.jit
def seen(i, j, inside, diagonal, left, right, Mask, stride_mask_s, stride_mask_t, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which scores count, in a tile that needs a mask."""
    keep = inside
    if LEFT:
        keep = keep & (j >= i + diagonal - left)
    if RIGHT:
        keep = keep & (j <= i + diagonal + right)
    if Mask is not None:
        keep = keep & (tl.load(Mask + i.to(tl.int64) * stride_mask_s + j * stride_mask_t, mask=inside, other=0) != 0)
    return keep


@triton.jit
def kept_by_dropout(key, counter, bh, i0, j0, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """reference.keep_mask for the tile at (i0, j0): one Philox call gives the words of four columns."""
    i = (i0 + tl.arange(0, ROWS))[:, None]
    quad = (j0 // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    zero = tl.zeros((ROWS, COLUMNS // 4), tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, quad.to(tl.uint32) + zero, i.to(tl.uint32) + zero, zero + bh, zero + counter, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return (tl.reshape(words, (ROWS, COLUMNS)) >> 8).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=CHANGING)
def block_list(
    Mask,
    Used,
    Index,
    Count,
    stride_mask_b,
    stride_mask_h,
    stride_mask_r,
    stride_mask_c,
    heads,
    n_rows,
    n_columns,
    n_row_tiles,
    n_column_tiles,
    left,
    right,
    ALIGNED: tl.constexpr,
    USED_ROWS: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For each tile of rows the column tiles in which a boolean mask (and the window) leaves something to compute.

    Index (B, H, row tiles, n_column_tiles): the partly visible tiles from the front, the wholly visible ones from the back;
    Count (B, H, row tiles, 2): how many. Rows and columns are queries and keys, or for dK and dV keys and queries (then left
    and right change places and USED_ROWS says that seqused_k counts rows).
    """
    tile, bh = tl.program_id(0) % n_row_tiles, tl.program_id(0) // n_row_tiles
    b, h = bh // heads, bh % heads
    rows_here, columns_here = n_rows, n_columns
    if ALIGNED:
        if USED_ROWS:
            rows_here = sixteens(n_rows)
        else:
            columns_here = sixteens(n_columns)
    if Used is not None:
        if USED_ROWS:
            rows_here = used(Used, b, n_rows)
        else:
            columns_here = used(Used, b, n_columns)
    diagonal = 0 if TOP_LEFT else columns_here - rows_here
    r0 = tile * ROWS
    first, last, full_first, full_last = tile_range(
        r0, tl.minimum(r0 + ROWS, rows_here), columns_here, diagonal, left, right, LEFT, RIGHT, COLUMNS
    )
    if r0 >= rows_here:
        last = first
    row = bh.to(tl.int64) * n_row_tiles + tile
    out = row * n_column_tiles
    r = r0 + tl.arange(0, ROWS)
    base = of_head(Mask, b.to(tl.int64), h.to(tl.int64), stride_mask_b, stride_mask_h, ALIGNED)
    base += r.to(tl.int64)[:, None] * stride_mask_r
    partial, full = 0, 0
    for t in range(first, last):
        c = t * COLUMNS + tl.arange(0, COLUMNS)
        inside = (r < rows_here)[:, None] & (c < columns_here)[None, :]
        mask = tl.load(base + c.to(tl.int64)[None, :] * stride_mask_c, mask=inside, other=2)
        some = tl.max(tl.max(tl.where(mask == 1, 1, 0), 1), 0)
        every = (tl.min(tl.min(mask, 1), 0) > 0) & (t >= full_first) & (t < full_last)
        if every:
            full += 1
            tl.store(Index + out + n_column_tiles - full, t)
        elif some > 0:
            tl.store(Index + out + partial, t)
            partial += 1
    tl.store(Count + row * 2, partial)
    tl.store(Count + row * 2 + 1, full)


@triton.jit
def _zero_rows(X, first, n, width, BLOCK: tl.constexpr):
    """Rows first .. n of a dense matrix of `width` columns."""
    end = n.to(tl.int64) * width
    for at in range(first.to(tl.int64) * width + tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        tl.store(X + offsets, tl.zeros((BLOCK,), X.dtype.element_ty), mask=offsets < end)


@triton.jit(do_not_specialize=CHANGING)
def clear_tails(Q, Lse, K, V, CuQ, CuK, batch, heads, q_tokens, k_tokens, q_width, k_width, v_width, BLOCK: tl.constexpr):
    """What packed tokens behind the last sequence get: rows of zeros in the dense Q (q_tokens, q_width), K and V, and -inf in
    Lse (heads, q_tokens). Where the last sequence ends only the device knows, so a fixed number of programs looks there."""
    q_end = tl.load(CuQ + batch)
    _zero_rows(Q, q_end, q_tokens, q_width, BLOCK)
    if Lse is not None:
        for h in range(tl.program_id(0), heads, tl.num_programs(0)):
            row = Lse + q_tokens.to(tl.int64) * h
            for i0 in range(q_end, q_tokens, BLOCK):
                i = i0 + tl.arange(0, BLOCK)
                tl.store(row + i, tl.full((BLOCK,), float("-inf"), tl.float32), mask=i < q_tokens)
    if K is not None:
        k_end = tl.load(CuK + batch)
        _zero_rows(K, k_end, k_tokens, k_width, BLOCK)
        _zero_rows(V, k_end, k_tokens, v_width, BLOCK)

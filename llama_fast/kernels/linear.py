"""Linear layers of few rows, with what stands before (RMS norm) and after (rotary + cache, residual, SiLU) in the same launch.

One row, or two, go through `_in_registers`: activations stay in registers, weights stream past them as float32 multiply-adds.
More go through `_on_tensor_cores`: the same epilogues behind dots of 16 or more weight rows. `ops.takes` says how many rows.
Both read each weight once. Accumulation, norm and rotary angles are float32; activations keep their own dtype.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment, var-annotated"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl

from llama_fast.kernels.common import dot, start_next, to_float32, wait
from llama_fast.kernels.packets import _own_epoch, _own_inbox, _send_rows


@triton.jit
def _rows(block, N: tl.constexpr, R: tl.constexpr, EPILOGUE: tl.constexpr):
    """Weight rows of a block. "gated": R/2 gate rows, then the R/2 up rows N/2 below them."""
    r = tl.arange(0, R)
    if EPILOGUE == "gated":
        return (r // (R // 2)) * (N // 2) + block * (R // 2) + r % (R // 2)
    return block * R + r


@triton.jit
def _live(rows, N: tl.constexpr, EPILOGUE: tl.constexpr, r_first):
    """Which rows of a block exist; for "gated", up rows live when their gate row does."""
    if EPILOGUE == "gated":
        return tl.where(rows >= r_first + N // 2, rows < N, rows < N // 2)
    return rows < N


@triton.jit
def _weight_tile(weight, rows, live, FIRST: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, CHECK: tl.constexpr):
    """weight[rows, FIRST : FIRST + BK], zeros outside."""
    cols = FIRST + tl.arange(0, BK)
    pointers = weight + rows.to(tl.int64)[:, None] * K + cols[None, :]
    if FIRST + BK > K:
        return tl.load(pointers, mask=live[:, None] & (cols < K)[None, :], other=0.0, eviction_policy="evict_first")
    if CHECK:
        return tl.load(pointers, mask=live[:, None], other=0.0, eviction_policy="evict_first")
    return tl.load(pointers, eviction_policy="evict_first")


@triton.jit
def _vector_tile(vector, FIRST: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """vector[FIRST : FIRST + BK], zeros outside."""
    cols = FIRST + tl.arange(0, BK)
    if FIRST + BK > K:
        return tl.load(vector + cols, mask=cols < K, other=0)
    return tl.load(vector + cols)


@triton.jit
def _scales(scale, rows, live, SCALED: tl.constexpr):
    """One factor per weight row."""
    if SCALED:
        return tl.load(scale + rows, mask=live, other=0).to(tl.float32)
    else:
        return 1.0


@triton.jit
def _residuals(
    residual, rows, live, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, EPILOGUE: tl.constexpr
):  # fmt: skip
    """What "add" adds, [R, MP]."""
    if EPILOGUE == "add":
        m = tl.arange(0, MP)
        return tl.load(residual + m[None, :] * N + rows[:, None], mask=live[:, None] & (m < M)[None, :], other=0).to(
            tl.float32
        )
    else:
        return 0.0


@triton.jit
def _cos_sin(
    start, cos, sin, block, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, T: tl.constexpr, EPILOGUE: tl.constexpr,
    H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr,
):  # fmt: skip
    """For "rope": (positions [MP], cos and sin [R / 2, MP]) of a block's row pairs; values do not turn (1, 0)."""
    if EPILOGUE == "rope":
        m = tl.arange(0, MP)
        n = block * R + 2 * tl.arange(0, R // 2)
        position = tl.load(start + m // T, mask=m < M, other=0).to(tl.int64) + m % T
        rotated = (n < (H + HKV) * HD)[:, None] & (m < M)[None, :]
        angle = position[None, :] * (HD // 2) + ((n % HD) // 2)[:, None]
        return position, tl.load(cos + angle, mask=rotated, other=1), tl.load(sin + angle, mask=rotated, other=0)
    else:
        return 0, 0.0, 0.0


@triton.jit
def _finish(
    acc_RM, rows, live, block, scales, residuals, cos_sin, out, k_cache, v_cache, slots,
    M: tl.constexpr, MP: tl.constexpr, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, EPILOGUE: tl.constexpr,
    SCALED: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr,
):  # fmt: skip
    """Write a block of float32 products [R, MP]: scaled, then by EPILOGUE "plain" ("send"), "add", "gated" or "rope"."""
    m = tl.arange(0, MP)
    kind = out.dtype.element_ty
    if SCALED:
        acc_RM *= scales[:, None]
    if EPILOGUE == "gated":
        gate, up = tl.split(tl.permute(tl.reshape(acc_RM, [2, R // 2, MP]), [1, 2, 0]))
        n = block * (R // 2) + tl.arange(0, R // 2)
        value = gate / (1 + tl.exp(-gate)) * up
        mask = (n < N // 2)[:, None] & (m < M)[None, :]
        tl.store(out + m[None, :] * (N // 2) + n[:, None], value.to(kind), mask=mask)
    elif EPILOGUE == "rope":
        # A pair (2i, 2i + 1) of a head is two neighbouring weight rows, so it never leaves its block: R and HD are even.
        even, odd = tl.split(tl.permute(tl.reshape(acc_RM, [R // 2, 2, MP]), [0, 2, 1]))
        position, c, s = cos_sin
        first, second = even * c - odd * s, even * s + odd * c
        n = block * R + 2 * tl.arange(0, R // 2)
        head = n // HD
        mask = (n < N)[:, None] & (m < M)[None, :]
        is_q, is_v = (head < H)[:, None], (head >= H + HKV)[:, None]
        at_q = (m * (H * HD))[None, :] + n[:, None]
        kv_head = tl.where(head < H + HKV, head - H, head - H - HKV)
        if (
            not isinstance(slots, int) and slots.dtype.is_ptr()
        ):  # of a pool of pages [N, HKV, HD]: the slot of each row of activations
            slot = tl.load(slots + m, mask=m < M, other=0)[None, :] * HKV + kv_head[:, None]
        else:
            slot = ((m // T).to(tl.int64)[None, :] * HKV + kv_head[:, None]) * slots + position[None, :]
        at_cache = slot * HD + (n % HD)[:, None]
        tl.store(out + at_q, first.to(kind), mask=mask & is_q)
        tl.store(out + at_q + 1, second.to(kind), mask=mask & is_q)
        tl.store(k_cache + at_cache, first.to(kind), mask=mask & (~is_q) & (~is_v))
        tl.store(k_cache + at_cache + 1, second.to(kind), mask=mask & (~is_q) & (~is_v))
        tl.store(v_cache + at_cache, first.to(kind), mask=mask & is_v)
        tl.store(v_cache + at_cache + 1, second.to(kind), mask=mask & is_v)
    else:
        if EPILOGUE == "add":
            acc_RM += residuals
        tl.store(out + m[None, :] * N + rows[:, None], acc_RM.to(kind), mask=live[:, None] & (m < M)[None, :])


@triton.jit
def _block_tiles(weight, rows, live, K: tl.constexpr, BK: tl.constexpr, CHECK: tl.constexpr):
    """weight[rows, :] as a tuple of [R, BK] tiles."""
    tiles = ()
    for i in tl.static_range((K + BK - 1) // BK):
        tiles = tiles + (_weight_tile(weight, rows, live, i * BK, K, BK, CHECK),)
    return tiles


@triton.jit
def _products(
    tiles, xs, factors, M: tl.constexpr, MP: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    V: tl.constexpr, CONVERT: tl.constexpr,
):  # fmt: skip
    """[R, MP]: each weight row times each row of activations, xs[m * chunks + chunk]."""
    CHUNKS: tl.constexpr = (K + BK - 1) // BK
    accs, x_sums = (), ()
    for _ in tl.static_range(M):
        accs = accs + (tl.zeros([R, BK // V], tl.float32),)
        x_sums = x_sums + (tl.zeros([BK // V], tl.float32),)
    for i in tl.static_range(CHUNKS):
        wide = to_float32(tiles[i], CONVERT)
        grown, x_grown = (), ()
        for m in tl.static_range(M):
            # Sums of V neighbours stay inside one thread: [R, BK] -> [R, BK / V].
            x_i = xs[m * CHUNKS + i]
            grown = grown + (accs[m] + tl.sum(tl.reshape(wide * x_i[None, :], [R, BK // V, V]), 2),)
            if CONVERT == "offset":
                x_grown = x_grown + (x_sums[m] + tl.sum(tl.reshape(x_i, [BK // V, V]), 1),)
        accs = grown
        if CONVERT == "offset":
            x_sums = x_grown
    sums = ()
    for m in tl.static_range(M):
        acc = accs[m]
        if CONVERT == "offset":
            # acc is the sum of (1 + (w + 128) / 2^15) x. The 1s go thread by thread, while sums are short: 1e-4 of the result is lost.
            acc = (acc - x_sums[m][None, :]) * 32768.0 - x_sums[m][None, :] * 128.0
        sums = sums + (tl.sum(acc, 1) * factors[m],)
    if M == 1:
        return sums[0][:, None]
    columns = tl.arange(0, MP)[None, :]
    acc_RM = tl.zeros([R, MP], tl.float32)
    for m in tl.static_range(M):
        acc_RM = tl.where(columns == m, sums[m][:, None], acc_RM)
    return acc_RM


@triton.jit(do_not_specialize=["rank"])
def _in_registers(
    x, gain, weight, scale, residual, out, start, cos, sin, k_cache, v_cache, slots, eps,
    M: tl.constexpr, MP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
    T: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, EPILOGUE: tl.constexpr, CONVERT: tl.constexpr,
    BLOCKS: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
    inboxes, epochs, rank, SIZE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """M activation rows (MP: M padded to a power of two). A program owns BLOCKS blocks of R weight rows, `programs` blocks apart.

    V: elements of one 16-byte load, summed inside a thread before anything crosses threads. EARLY: `start` may be read before
    the wait. The last line's arguments are for the epilogue "send": what is written goes to all other ranks as well, of one row.
    """
    CHECK: tl.constexpr = N % (R * BLOCKS) != 0  # for "gated", R and N both count gate and up rows
    CHUNKS: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    start_next(PDL)
    rows = _rows(program, N, R, EPILOGUE)
    live = _live(rows, N, EPILOGUE, program * (R // 2))
    # Before the wait: weights, scales, gains, tables, which no kernel writes.
    tiles = _block_tiles(weight, rows, live, K, BK, CHECK)
    scales = _scales(scale, rows, live, SCALED)
    gains = ()
    if NORM:
        for i in tl.static_range(CHUNKS):
            gains = gains + (_vector_tile(gain, i * BK, K, BK),)
    if EARLY:
        cos_sin = _cos_sin(start, cos, sin, program, R, M, MP, T, EPILOGUE, H, HKV, HD)
    if EPILOGUE == "send":
        inbox = _own_inbox(inboxes, rank, R, SIZE, THREADS)
    wait(PDL)
    residuals = _residuals(residual, rows, live, N, M, MP, EPILOGUE)
    if not EARLY:
        cos_sin = _cos_sin(start, cos, sin, program, R, M, MP, T, EPILOGUE, H, HKV, HD)
    xs, factors = (), ()
    for m in tl.static_range(M):
        squares = tl.zeros([BK], tl.float32)
        for i in tl.static_range(CHUNKS):
            value = _vector_tile(x + m * K, i * BK, K, BK).to(tl.float32)
            if NORM:
                squares += value * value
                value *= gains[i].to(tl.float32)
            xs = xs + (value,)
        factor = 1.0
        if NORM:
            factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        factors = factors + (factor,)
    counts = ()
    if EPILOGUE == "send":
        for i in tl.static_range(BLOCKS):
            counts = counts + (_own_epoch(epochs, program + i * programs, N, R, BLOCK, THREADS),)
    for i in tl.static_range(BLOCKS):
        block = program + i * programs
        if i + 1 < BLOCKS:  # what the next block needs travels while this one is worked on
            next_rows = _rows(block + programs, N, R, EPILOGUE)
            next_live = _live(next_rows, N, EPILOGUE, (block + programs) * (R // 2))
            next_tiles = _block_tiles(weight, next_rows, next_live, K, BK, CHECK)
            next_scales = _scales(scale, next_rows, next_live, SCALED)
            next_residuals = _residuals(residual, next_rows, next_live, N, M, MP, EPILOGUE)
            next_cos_sin = _cos_sin(start, cos, sin, block + programs, R, M, MP, T, EPILOGUE, H, HKV, HD)
        acc_RM = _products(tiles, xs, factors, M, MP, R, K, BK, V, CONVERT)
        if EPILOGUE == "send":
            value_R = tl.sum(acc_RM * scales[:, None] if SCALED else acc_RM, 1)
            _send_rows(value_R, block, counts[i], inbox, rank, N, R, SIZE, WORDS, THREADS)
        _finish(acc_RM, rows, live, block, scales, residuals, cos_sin, out, k_cache, v_cache, slots,
                M, MP, N, R, T, EPILOGUE, SCALED, H, HKV, HD)  # fmt: skip
        if i + 1 < BLOCKS:
            tiles, rows, live = next_tiles, next_rows, next_live
            scales, residuals, cos_sin = next_scales, next_residuals, next_cos_sin


@triton.jit
def _on_tensor_cores(
    x, weight, scale, residual, out, start, cos, sin, k_cache, v_cache, slots,
    M: tl.constexpr, MP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    SLICES: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, T: tl.constexpr, SCALED: tl.constexpr,
    EPILOGUE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """M activation rows (MP: M padded to a power of two): weights [R, BK] times activations [BK, MP].

    SLICES: of the BK columns, each a warp's own sum [R, MP]; one warp's dots wait for each other, and would not keep up with memory.
    0: the columns are not sliced, so that a warp group multiplies: for tiles of 64 weight rows and many activations.
    AHEAD: tiles that are loaded into registers before the wait, and used last. The norm is a launch of its own here: inside,
    every program would repeat it for M rows beside its few weight rows.
    """
    CHECK: tl.constexpr = (N % R != 0) or (K % BK != 0)
    block = tl.program_id(0)
    start_next(PDL)
    rows = _rows(block, N, R, EPILOGUE)
    live = _live(rows, N, EPILOGUE, block * (R // 2))
    kind = x.dtype.element_ty
    scales = _scales(scale, rows, live, SCALED)
    ahead = ()
    for i in tl.static_range(AHEAD):
        ahead = ahead + (_tile_at(weight, rows, live, i * BK, K, BK, SLICES, CHECK),)
    wait(PDL)
    residuals = _residuals(residual, rows, live, N, M, MP, EPILOGUE)
    cos_sin = _cos_sin(start, cos, sin, block, R, M, MP, T, EPILOGUE, H, HKV, HD)
    acc_SRM = tl.zeros([SLICES, R, MP], tl.float32) if SLICES else tl.zeros([R, MP], tl.float32)
    for first in tl.range(AHEAD * BK, K, BK, num_stages=STAGES):
        w = _tile_at(weight, rows, live, first, K, BK, SLICES, CHECK)
        acc_SRM = dot(w.to(tl.float32).to(kind), _activations_at(x, first, M, MP, K, BK, SLICES, CHECK), acc_SRM)
    for i in tl.static_range(AHEAD):
        acc_SRM = dot(
            ahead[i].to(tl.float32).to(kind), _activations_at(x, i * BK, M, MP, K, BK, SLICES, CHECK), acc_SRM
        )
    acc_RM = tl.sum(acc_SRM, 0) if SLICES else acc_SRM
    _finish(acc_RM, rows, live, block, scales, residuals, cos_sin, out, k_cache, v_cache, slots,
            M, MP, N, R, T, EPILOGUE, SCALED, H, HKV, HD)  # fmt: skip


@triton.jit
def _tile_at(weight, rows, live, first, K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, CHECK: tl.constexpr):
    """weight[rows, first : first + BK] as [SLICES, R, BK / SLICES], zeros outside; `first` may be known at run time alone."""
    if SLICES:
        cols = first + tl.arange(0, SLICES)[:, None] * (BK // SLICES) + tl.arange(0, BK // SLICES)[None, :]
        pointers = weight + rows.to(tl.int64)[None, :, None] * K + cols[:, None, :]
        if CHECK:
            return tl.load(pointers, mask=live[None, :, None] & (cols < K)[:, None, :], other=0.0)
        else:
            return tl.load(pointers)
    else:
        col = first + tl.arange(0, BK)
        at = weight + rows.to(tl.int64)[:, None] * K + col[None, :]
        if CHECK:
            return tl.load(at, mask=live[:, None] & (col < K)[None, :], other=0.0)
        else:
            return tl.load(at)


@triton.jit
def _activations_at(
    x, first, M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """x[:, first : first + BK] as [SLICES, BK / SLICES, MP], zeros outside."""
    m = tl.arange(0, MP)
    if SLICES:
        cols = first + tl.arange(0, SLICES)[:, None] * (BK // SLICES) + tl.arange(0, BK // SLICES)[None, :]
        pointers = x + m[None, None, :] * K + cols[:, :, None]
        if CHECK:
            return tl.load(pointers, mask=(m < M)[None, None, :] & (cols < K)[:, :, None], other=0)
        else:
            return tl.load(pointers, mask=(m < M)[None, None, :], other=0)
    else:
        col = first + tl.arange(0, BK)
        at = x + m[None, :] * K + col[:, None]
        if CHECK:
            return tl.load(at, mask=(m < M)[None, :] & (col < K)[:, None], other=0)
        else:
            return tl.load(at, mask=(m < M)[None, :], other=0)


@triton.jit
def _norm(x, gain, out, eps, K: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """Grid (M,): RMS norm of rows, in float32."""
    start_next(PDL)
    cols = tl.arange(0, BK)
    g = tl.load(gain + cols, mask=cols < K, other=0).to(tl.float32)
    wait(PDL)
    at = tl.program_id(0) * K + cols
    value = tl.load(x + at, mask=cols < K, other=0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / K + eps) * g
    tl.store(out + at, value.to(out.dtype.element_ty), mask=cols < K)

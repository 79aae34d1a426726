"""Attention on the CPU: PyTorch's fused kernel forward, explicit matrix products backward.

Each sequence has calls of its own, never a padded batch, and neighbours are never merged: the
shapes that a kernel sees, and with them the order of its sums, depend on that sequence alone. A
sequence's result is therefore the same, to the last bit, alone and in any batch. (Head sizes that
8 divides; others shift rows in memory to where MKL's kernels may sum in another order.)

The backward works on active queries only. Per sequence with `a` active rows:

    P = softmax(scale q kᵀ)    dv = P[:, :a]ᵀ do
    dP = do vᵀ                 dS = P * (dP - rowsum(P * dP))
    dq = scale dS k            dk = scale dS[:, :a]ᵀ q

which is 3 products of `a × s` and 2 of `a × a` against 5 of `s × s` in the dense backward.
The softmax is computed again: that takes no longer than to apply a logsumexp left by the forward.
Shape suffixes: see `api`; in addition `a` and `s` active and key rows of one sequence, `n` query
rows by key head (`a` times the query heads that share it), `r` those of a tile.

Numbers: float32 and float64 are computed as they are. bfloat16 is widened to float32 sequence by
sequence in the backward, so that products, softmax and sums are float32 and only the results are
rounded; the forward kernel sums in float32 as well.
"""

import torch
import torch.nn.functional as F

from boe_vllm.attention.layout import AttentionLayout

DEFAULT_TILE_BYTES = 4 * 2**20
"""Temporaries of the backward per thread: two `[heads, rows, keys]` tiles that stay in cache."""


def forward(
    q_THP: torch.Tensor,
    k_SGP: torch.Tensor,
    v_SGP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
) -> torch.Tensor:
    """Plain attention of every packed sequence; `[T, H, P]`, contiguous, in q's dtype."""
    o_THP = q_THP.new_empty(q_THP.shape)
    grouped = q_THP.shape[1] != k_SGP.shape[1]
    for i in range(layout.num_sequences):
        if not layout.q_seqlens[i]:
            continue
        rows = slice(layout.q_starts[i], layout.q_starts[i + 1])
        keys = slice(layout.kv_starts[i], layout.kv_starts[i + 1])
        o_1HtP = F.scaled_dot_product_attention(
            q_THP[rows].transpose(0, 1).unsqueeze(0),
            k_SGP[keys].transpose(0, 1).unsqueeze(0),
            v_SGP[keys].transpose(0, 1).unsqueeze(0),
            scale=scale,
            enable_gqa=grouped,
        )
        o_THP[rows] = o_1HtP[0].transpose(0, 1)
    return o_THP


@torch.no_grad()
def backward(
    do_AHP: torch.Tensor,
    q_AHP: torch.Tensor,
    k_SGP: torch.Tensor,
    v_SGP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the active rows' q, k and v.

    Args:
        tile_bytes: most bytes of temporaries per thread (one row of one key head at the least).
            Heads and rows are tiled to fit; it changes results by rounding at most.

    Returns:
        dq `[A, H, P]`, dk `[A, G, P]`, dv `[A, G, P]`, contiguous, in q's dtype.
    """
    heads, width = k_SGP.shape[1:]
    group = q_AHP.shape[1] // heads
    dtype = torch.promote_types(q_AHP.dtype, torch.float32)
    # A group's query heads are more rows against the same keys: the sum over the group, which the
    # gradients of k and v need, becomes part of the matrix product.
    rows = [active * group for active in layout.active_seqlens]
    q_GnP = _by_key_head(q_AHP, heads, dtype).split(rows, 1)
    do_GnP = _by_key_head(do_AHP, heads, dtype).split(rows, 1)
    k_GsP, v_GsP = (x.transpose(0, 1).split(layout.kv_seqlens, 1) for x in (k_SGP, v_SGP))
    # Sequence by sequence, so that every product is written where it belongs.
    dq_packed = q_AHP.new_empty((layout.num_active * heads * group, width), dtype=dtype)
    dk_packed, dv_packed = q_AHP.new_empty((2, layout.num_active * heads, width), dtype=dtype)
    dq_nP = dq_packed.split([n * heads for n in rows])
    dk_nP, dv_nP = (
        x.split([active * heads for active in layout.active_seqlens])
        for x in (dk_packed, dv_packed)
    )
    tiles, buffers = _tiles(q_AHP, layout, heads=heads, dtype=dtype, tile_bytes=tile_bytes)
    for i, (tile_heads, tile_rows) in enumerate(tiles):
        if not layout.active_seqlens[i]:
            continue
        operands = (
            do_GnP[i],
            q_GnP[i],
            k_GsP[i].to(dtype),
            v_GsP[i].to(dtype),
            dq_nP[i].view(heads, -1, width),
            dk_nP[i].view(heads, -1, width),
            dv_nP[i].view(heads, -1, width),
        )
        split = [operands]
        if tile_heads < heads:
            split = list(zip(*(x.split(tile_heads) for x in operands), strict=True))
        for some_heads in split:
            _backward_heads(*some_heads, buffers, scale=scale, tile_rows=tile_rows * group)
    return (
        _by_row(dq_packed, layout, heads, group).to(q_AHP.dtype),
        _by_row(dk_packed, layout, heads, 1).to(q_AHP.dtype),
        _by_row(dv_packed, layout, heads, 1).to(q_AHP.dtype),
    )


def _tiles(
    q_AHP: torch.Tensor,
    layout: AttentionLayout,
    *,
    heads: int,
    dtype: torch.dtype,
    tile_bytes: int,
) -> tuple[list[tuple[int, int]], tuple[torch.Tensor, ...]]:
    """Key heads and active rows per tile of each sequence, and two buffers that fit any tile."""
    group = q_AHP.shape[1] // heads
    tiles = [
        _tile_shape(a, s, heads=heads, group=group, itemsize=dtype.itemsize, tile_bytes=tile_bytes)
        for a, s in zip(layout.active_seqlens, layout.kv_seqlens, strict=True)
    ]
    sizes = [h * r * group * s for (h, r), s in zip(tiles, layout.kv_seqlens, strict=True)]
    # One pair of buffers for all tiles: fresh memory for each would cost more in page faults than
    # the softmax does in arithmetic. Rounded up, so that the second one's alignment does not
    # depend on the batch.
    size = -(-max(sizes, default=0) // 64) * 64
    return tiles, q_AHP.new_empty((2, size), dtype=dtype).unbind()


def _backward_heads(
    do_GnP: torch.Tensor,
    q_GnP: torch.Tensor,
    k_GsP: torch.Tensor,
    v_GsP: torch.Tensor,
    dq_GnP: torch.Tensor,
    dk_GaP: torch.Tensor,
    dv_GaP: torch.Tensor,
    buffers: tuple[torch.Tensor, ...],
    *,
    scale: float,
    tile_rows: int,
) -> None:
    """The backward of some heads of one sequence, `tile_rows` rows at a time, into dq, dk, dv."""
    heads, active = dk_GaP.shape[:2]
    num_rows, num_keys = q_GnP.shape[1], k_GsP.shape[1]
    kT_GPs, vT_GPs = k_GsP.transpose(1, 2), v_GsP.transpose(1, 2)
    for start in range(0, num_rows, tile_rows):
        rows = min(tile_rows, num_rows - start)
        q_GrP, do_GrP, dq_GrP = q_GnP, do_GnP, dq_GnP
        if rows < num_rows:
            q_GrP, do_GrP, dq_GrP = (x.narrow(1, start, rows) for x in (q_GnP, do_GnP, dq_GnP))
        s_Grs, p_Grs = (b[: heads * rows * num_keys].view(heads, rows, num_keys) for b in buffers)
        torch.baddbmm(s_Grs, q_GrP, kT_GPs, beta=0, alpha=scale, out=s_Grs)
        torch.softmax(s_Grs, dim=-1, out=p_Grs)
        ds_Grs = torch.bmm(do_GrP, vT_GPs, out=s_Grs)
        torch._softmax_backward_data(ds_Grs, p_Grs, -1, ds_Grs.dtype, grad_input=ds_Grs)
        torch.baddbmm(dq_GrP, ds_Grs, k_GsP, beta=0, alpha=scale, out=dq_GrP)
        later = int(start > 0)  # beta: whether to add to what the rows before have left
        dsT_Gar, pT_Gar = (x.narrow(2, 0, active).transpose(1, 2) for x in (ds_Grs, p_Grs))
        torch.baddbmm(dk_GaP, dsT_Gar, q_GrP, beta=later, alpha=scale, out=dk_GaP)
        torch.baddbmm(dv_GaP, pT_Gar, do_GrP, beta=later, out=dv_GaP)


def _by_key_head(x_AHP: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """`[G, A * H / G, P]` in `dtype`: a copy for grouped heads or another dtype, else a view."""
    return x_AHP.to(dtype).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)


def _by_row(
    packed_nP: torch.Tensor, layout: AttentionLayout, heads: int, group: int
) -> torch.Tensor:
    """`[A, G * group, P]` of rows that lie sequence by sequence as `[G, a * group, P]`."""

    def build() -> torch.Tensor:
        index = torch.arange(len(packed_nP))
        for start, active in zip(layout.active_starts, layout.active_seqlens, strict=False):
            own = index.narrow(0, start * heads * group, active * heads * group)
            own.copy_(own.view(heads, active, group).transpose(0, 1).flatten())
        return index

    index = layout.memoised(("by_row", heads, group), build)
    return packed_nP.index_select(0, index).unflatten(0, (layout.num_active, heads * group))


def _tile_shape(
    active: int, num_keys: int, *, heads: int, group: int, itemsize: int, tile_bytes: int
) -> tuple[int, int]:
    """Key heads and active rows per tile.

    Rows are split only where one head alone does not fit, into equal parts; the split, which
    decides the order in which dk and dv are summed, does not depend on the number of threads.
    """
    if not active:
        return 0, 0
    row_bytes = 2 * group * num_keys * itemsize
    rows = min(active, max(1, tile_bytes // row_bytes))
    rows = -(-active // -(-active // rows))
    budget = tile_bytes * torch.get_num_threads()
    return min(heads, max(1, budget // (rows * row_bytes))), rows

"""
Compute StreamKL's forward pass on Hopper, in Gluon: an experiment without masks.

The products of the next tile of keys run on the tensor cores while the exponentials of this one are taken. Compiled
for sm_90 with Triton 3.6.0 and 3.7.1 without a GPU (178 registers, no spills, wgmma not serialized); never run.
"""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


# Its name in Triton 3.7, and in 3.6.
sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _math(s_1, s_2, m_1, l_1, m_2, l_2, acc, c_a, c_b):
    top_1 = gl.maximum(m_1, gl.max(s_1, 1) * c_a)
    top_2 = gl.maximum(m_2, gl.max(s_2, 1) * c_b)
    x_1 = gl.fma(s_1, c_a, -gl.expand_dims(top_1, 1))
    x_2 = gl.fma(s_2, c_b, -gl.expand_dims(top_2, 1))
    p_1 = gl.exp2(x_1)
    a_1 = gl.exp2(m_1 - top_1)
    acc = a_1 * (acc + l_1 * ((m_1 - top_1) - (m_2 - top_2))) + gl.sum(p_1 * (x_1 - x_2), 1)
    l_1 = a_1 * l_1 + gl.sum(p_1, 1)
    l_2 = gl.exp2(m_2 - top_2) * l_2 + gl.sum(gl.exp2(x_2), 1)
    return top_1, l_1, top_2, l_2, acc


@gluon.jit
def _load(d_1, d_2, row, s_1, s_2, bars, slot, pred):
    bar = bars.index(slot)
    mbarrier.expect(bar, d_1.block_type.nbytes + d_2.block_type.nbytes, pred)
    tma.async_copy_global_to_shared(d_1, [row, 0], bar, s_1.index(slot), pred)
    tma.async_copy_global_to_shared(d_2, [row, 0], bar, s_2.index(slot), pred)


@gluon.jit
def _kernel(
    q_1, k_1, q_2, k_2, out_0, out_1, out_2, n_q, n_k, c_a, c_b,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    tiles = n_q // BLOCK_Q
    head = pid // tiles
    row0 = head * n_q + (pid % tiles) * BLOCK_Q
    key0 = head * n_k
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_K, 16]
    )
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    sq_1 = gl.allocate_shared_memory(q_1.dtype, q_1.block_type.shape, q_1.layout)
    sq_2 = gl.allocate_shared_memory(q_2.dtype, q_2.block_type.shape, q_2.layout)
    sk_1 = gl.allocate_shared_memory(k_1.dtype, [STAGES] + k_1.block_type.shape, k_1.layout)
    sk_2 = gl.allocate_shared_memory(k_2.dtype, [STAGES] + k_2.block_type.shape, k_2.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    qbar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    mbarrier.init(qbar, count=1)
    mbarrier.expect(qbar, q_1.block_type.nbytes + q_2.block_type.nbytes)
    tma.async_copy_global_to_shared(q_1, [row0, 0], qbar, sq_1)
    tma.async_copy_global_to_shared(q_2, [row0, 0], qbar, sq_2)
    for i in gl.static_range(STAGES):
        _load(k_1, k_2, key0 + i * BLOCK_K, sk_1, sk_2, bars, i, i * BLOCK_K < n_k)
    m_1 = gl.full([BLOCK_Q], -1e30, gl.float32, layout=rows)
    m_2 = gl.full([BLOCK_Q], -1e30, gl.float32, layout=rows)
    l_1 = gl.full([BLOCK_Q], 0.0, gl.float32, layout=rows)
    l_2 = gl.full([BLOCK_Q], 0.0, gl.float32, layout=rows)
    acc = gl.full([BLOCK_Q], 0.0, gl.float32, layout=rows)
    zero = gl.zeros([BLOCK_Q, BLOCK_K], gl.float32, layout=mma)
    mbarrier.wait(qbar, 0)
    mbarrier.wait(bars.index(0), 0)
    s_1 = warpgroup_mma(sq_1, sk_1.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s_2 = warpgroup_mma(sq_2, sk_2.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s_1, s_2 = warpgroup_mma_wait(0, [s_1, s_2])
    count = n_k // BLOCK_K
    phase = 0
    slot = 0
    for j in range(1, count):
        old = slot
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
        # Every warp has read tile j - 1 out of its slot.
        sync()
        _load(k_1, k_2, key0 + (j - 1 + STAGES) * BLOCK_K, sk_1, sk_2, bars, old, j - 1 + STAGES < count)
        mbarrier.wait(bars.index(slot), phase)
        n_1 = warpgroup_mma(sq_1, sk_1.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        n_2 = warpgroup_mma(sq_2, sk_2.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        m_1, l_1, m_2, l_2, acc = _math(s_1, s_2, m_1, l_1, m_2, l_2, acc, c_a, c_b)
        s_1, s_2 = warpgroup_mma_wait(0, [n_1, n_2])
    m_1, l_1, m_2, l_2, acc = _math(s_1, s_2, m_1, l_1, m_2, l_2, acc, c_a, c_b)
    log_1 = gl.log2(l_1)
    log_2 = gl.log2(l_2)
    at = row0 + gl.arange(0, BLOCK_Q, layout=rows)
    gl.store(out_0 + at, (acc / l_1 + log_2 - log_1) * 0.6931471805599453)
    gl.store(out_1 + at, (m_1 + log_1) * 0.6931471805599453)
    gl.store(out_2 + at, (m_2 + log_2) * 0.6931471805599453)


def forward(q1, k1, q2, k2, block_q=128, block_k=64, stages=2, warps=8):
    """
    Compute KL and both log-sum-exps, `[B, H, N_Q]` in float32, of logits scaled by 1/sqrt(d).

    Queries and keys are `[B, H, N, d]`, contiguous, in half precision; N_Q and N_K must be multiples of the tiles.
    """
    heads, n_q, size = q1.shape[0] * q1.shape[1], q1.shape[2], q1.shape[3]
    n_k = k1.shape[2]
    scale = math.log2(math.e) / math.sqrt(size)

    def descriptor(x, rows):
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        return TensorDescriptor.from_tensor(x.reshape(-1, size), [rows, size], layout)

    kl, lse_1, lse_2 = (torch.empty(q1.shape[:3], dtype=torch.float32, device=q1.device) for _ in range(3))
    _kernel[(heads * n_q // block_q,)](
        descriptor(q1, block_q), descriptor(k1, block_k), descriptor(q2, block_q), descriptor(k2, block_k),
        kl, lse_1, lse_2, n_q, n_k, scale, scale,
        D=size, BLOCK_Q=block_q, BLOCK_K=block_k, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return kl, lse_1, lse_2

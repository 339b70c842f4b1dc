"""Attention on CPU: SGLang's torch_native backend with whole-batch decoding and target verification.

Legend of shape suffixes: T packed rows of the forward, B requests, Q query rows a request (padded), L context
positions (padded), H query heads, K key-value heads, G = H / K, D head size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Rows(NamedTuple):
    """Where a forward's query rows and their context lie."""

    q_lens_B: torch.Tensor
    """Query rows of each request; they are its last context positions."""
    kv_lens_B: torch.Tensor
    """Context length of each request, its query rows included."""
    slots_BL: torch.Tensor
    """KV slot of each context position; anything beyond kv_lens_B."""
    tree_mask_BQL: torch.Tensor | None = None
    """Which context positions each row sees, where drafts are trees; replaces causality."""


def attend(
    query_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rows: Rows,
    bias_BQL: torch.Tensor | None,
    *,
    scaling: float,
) -> torch.Tensor:
    """Attention of all requests in one gather and one kernel; returns [T, H, Dv].

    The heads of a group become further query rows of their key-value head, so keys and values are never expanded:
    on CPU that copy costs several times the attention itself.
    """
    requests, length = rows.slots_BL.shape
    rows_T, heads, dim = query_THD.shape
    kv_heads = k_cache.shape[1]
    flat_slots = rows.slots_BL.reshape(-1)
    key_BKLD = k_cache.flatten(1).index_select(0, flat_slots).view(requests, length, kv_heads, -1).transpose(1, 2)
    value_BKLD = v_cache.flatten(1).index_select(0, flat_slots).view(requests, length, kv_heads, -1).transpose(1, 2)
    width = int(rows.q_lens_B.max())
    packed = rows_T == requests * width
    index_BQ = None if packed else _row_index(rows.q_lens_B, width)
    query_BQHD = query_THD.view(requests, width, heads, dim) if index_BQ is None else query_THD[index_BQ]
    group = heads // kv_heads
    query_BKGQD = query_BQHD.view(requests, width, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    out_BKGQD = scaled_dot_product_attention(
        query_BKGQD.reshape(requests, kv_heads, group * width, dim),
        key_BKLD.to(query_THD.dtype),
        value_BKLD.to(query_THD.dtype),
        attn_mask=None if bias_BQL is None else bias_BQL.repeat(1, group, 1).unsqueeze(1),
        scale=scaling,
    ).view(requests, kv_heads, group, width, -1)
    out_BQHD = out_BKGQD.permute(0, 3, 1, 2, 4).reshape(requests, width, heads, -1)
    if packed:
        return out_BQHD.reshape(rows_T, heads, -1)
    return out_BQHD[torch.arange(width) < rows.q_lens_B[:, None]]


def attention_bias(rows: Rows, *, causal: bool, window: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Additive mask [B, Q, L] (0 or -inf), or None where every row sees every gathered position.

    Args:
        causal: a row sees positions up to its own; otherwise the whole context, its block included.
        window: how many positions before its own a row sees, in either case; -1 for all.
    """
    requests, length = rows.slots_BL.shape
    width = int(rows.q_lens_B.max())
    if width == 1 and requests == 1 and window < 0 and rows.tree_mask_BQL is None:
        return None
    key_L = torch.arange(length)
    # A padded row sees what the request's last one does: no row is fully masked (a softmax of nothing is NaN).
    row_BQ = torch.minimum(torch.arange(width), rows.q_lens_B[:, None] - 1)
    row_position_BQ = (rows.kv_lens_B - rows.q_lens_B)[:, None] + row_BQ
    if rows.tree_mask_BQL is not None:
        seen_BQL = rows.tree_mask_BQL
    elif causal:
        seen_BQL = key_L <= row_position_BQ[..., None]
    else:
        seen_BQL = (key_L < rows.kv_lens_B[:, None])[:, None].expand(requests, width, length)
    if window >= 0:
        seen_BQL = seen_BQL & (key_L >= row_position_BQ[..., None] - window)
    return torch.zeros(seen_BQL.shape, dtype=dtype).masked_fill_(~seen_BQL, -math.inf)


def _row_index(q_lens_B: torch.Tensor, width: int) -> torch.Tensor:
    """Packed row of each (request, query) cell [B, Q]; padding repeats the request's last row."""
    starts_B = q_lens_B.cumsum(0) - q_lens_B
    return starts_B[:, None] + torch.minimum(torch.arange(width), q_lens_B[:, None] - 1)


class BatchedTorchNativeBackend(TorchNativeAttnBackend):
    """Stands in for torch_native, and keeps its name: SGLang's position and allocation code tests for it.

    Takes decoding, target verification (uniform, ragged or trees) and non-causal draft blocks; leaves encoder-decoder
    models to SGLang.
    """

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self._bias_cache: dict[tuple[bool, int, torch.dtype], torch.Tensor | None] = {}
        mode = forward_batch.forward_mode
        self._rows: Rows | None = None
        if forward_batch.batch_size == 0 or forward_batch.encoder_lens is not None:
            return
        if mode.is_decode():
            self._rows = self._make_rows(forward_batch, torch.ones_like(forward_batch.seq_lens), verify=False)
        elif mode.is_target_verify():
            self._rows = self._make_rows(forward_batch, _verify_lens(forward_batch), verify=True)

    def _make_rows(self, forward_batch: ForwardBatch, q_lens_B: torch.Tensor, *, verify: bool) -> Rows:
        # A verifying batch still carries the committed lengths; a decoding one counts its new token.
        kv_lens_B = forward_batch.seq_lens + q_lens_B if verify else forward_batch.seq_lens
        length = int(kv_lens_B.max())
        slots_BL = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, :length].long()
        rows = Rows(q_lens_B.long(), kv_lens_B.long(), slots_BL)
        tree = getattr(forward_batch.spec_info, "custom_mask", None) if verify else None
        return rows if tree is None else rows._replace(tree_mask_BQL=unpack_tree_mask(tree, rows))

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        if self._rows is None or layer.is_cross_attention:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward_rows(self._rows, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        if layer.is_cross_attention or forward_batch.encoder_lens is not None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        if self._rows is not None:
            return self._forward_rows(self._rows, q, k, v, layer, forward_batch, save_kv_cache)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        return self._prefill(q.view(-1, layer.tp_q_head_num, layer.qk_head_dim), layer, forward_batch).flatten(1)

    def _forward_rows(
        self,
        rows: Rows,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        self._save(k, v, layer, forward_batch, save_kv_cache)
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        key = (causal, layer.sliding_window_size, q.dtype)
        if key not in self._bias_cache:
            self._bias_cache[key] = attention_bias(rows, causal=causal, window=key[1], dtype=q.dtype)
        return attend(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            rows,
            self._bias_cache[key],
            scaling=layer.scaling,
        ).flatten(1)

    def _save(
        self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch, save: bool
    ) -> None:
        if save and k is not None and v is not None:
            where = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)

    def _prefill(self, query_THD: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> torch.Tensor:
        """One request after the other: prompts differ too much in length to be padded."""
        k_cache = self.token_to_kv_pool.get_key_buffer(layer.layer_id).flatten(1)
        v_cache = self.token_to_kv_pool.get_value_buffer(layer.layer_id).flatten(1)
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        window = layer.sliding_window_size
        out, start = [], 0
        new_lens, lens = forward_batch.extend_seq_lens.tolist(), forward_batch.seq_lens.tolist()
        for row, new, length in zip(forward_batch.req_pool_indices.tolist(), new_lens, lens, strict=True):
            slots_L = self.req_to_token_pool.req_to_token[row, :length].long()
            query_HQD = query_THD[start : start + new].transpose(0, 1)
            whole = new == length and causal and window < 0
            bias = None
            if not whole:
                rows = Rows(torch.tensor([new]), torch.tensor([length]), slots_L[None])
                bias = attention_bias(rows, causal=causal, window=window, dtype=query_THD.dtype)
            out_HQD = scaled_dot_product_attention(
                query_HQD[None],
                k_cache.index_select(0, slots_L).view(1, length, layer.tp_k_head_num, -1).transpose(1, 2).to(query_THD),
                v_cache.index_select(0, slots_L).view(1, length, layer.tp_v_head_num, -1).transpose(1, 2).to(query_THD),
                attn_mask=None if bias is None else bias[:, None],
                is_causal=whole,
                enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
                scale=layer.scaling,
            )[0]
            out.append(out_HQD.transpose(0, 1))
            start += new
        return torch.cat(out)


def _verify_lens(forward_batch: ForwardBatch) -> torch.Tensor:
    """Query rows of each request in a verifying forward [B]: ragged ones from their layout, else one block each."""
    layout = getattr(forward_batch.spec_info, "ragged_verify_layout", None)
    if layout is not None:
        return layout.verify_lens
    return torch.full_like(forward_batch.seq_lens, forward_batch.spec_info.draft_token_num)


def unpack_tree_mask(flat: torch.Tensor, rows: Rows) -> torch.Tensor:
    """SGLang's tree mask on CPU, among the drafts only (request after request, [Q, Q]), as [B, Q, L].

    Every row also sees the whole committed context.
    """
    requests, length = rows.slots_BL.shape
    width = int(rows.q_lens_B.max())
    draft_BL = torch.arange(length) - (rows.kv_lens_B - width)[:, None]  # < 0 in the committed context
    in_block_BL = (draft_BL >= 0) & (draft_BL < width)
    index_BQL = draft_BL.clamp(0, width - 1)[:, None].expand(requests, width, length)
    tree_BQL = flat.view(requests, width, width).bool().gather(2, index_BQL)
    return (draft_BL < 0)[:, None] | (in_block_BL[:, None] & tree_BQL)

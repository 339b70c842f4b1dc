"""Pure torch versions of the CPU operators that SGLang imports from `sgl_kernel`.

Names, argument names and in-place outputs are those of SGLang's own operators.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from dspark_serving.errors import EnvironmentMismatchError

IMPLEMENTED = (
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
)
# Only the EAGLE family calls these, and on CPU it would verify greedily whatever temperature was asked for.
UNAVAILABLE = (
    "assign_draft_cache_locs_contiguous_cpu",
    "build_tree_kernel_efficient_cpu",
    "rotate_input_ids_cpu",
)


def unavailable(name: str) -> Callable[..., None]:
    """A function under an operator's name that says that this machine has no such operator."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise EnvironmentMismatchError(
            f"sgl_kernel.{name} is not available without an accelerator",
            expected="--speculative-algorithm dspark or ngram on this machine",
            fix="Choose one of those, or install a CPU build of sgl_kernel.",
        )

    return refuse


def _ragged_columns(starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row index and column of every cell of the half-open ranges [starts_b, ends_b), row by row: two [sum(lens)]."""
    lens = (ends - starts).long()
    rows = torch.repeat_interleave(torch.arange(lens.numel()), lens)
    within = torch.arange(int(lens.sum())) - torch.repeat_interleave(lens.cumsum(0) - lens, lens)
    return rows, starts.long()[rows] + within


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Gather the slots of positions [start, end) of each request into `out_cache_loc`, packed."""
    rows, columns = _ragged_columns(start_offset, end_offset)
    slots = req_to_token[req_pool_indices.long()[rows], columns]
    out_cache_loc.view(-1)[: slots.numel()] = slots.to(out_cache_loc.dtype)


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Scatter packed slots into positions [start, end) of each request's row of `req_to_token`."""
    rows, columns = _ragged_columns(start_offset, end_offset)
    req_to_token[req_pool_indices.long()[rows], columns] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Move KV rows src -> tgt in every buffer given by address and row stride in bytes."""
    if tgt_loc.numel() == 0:
        return
    rows = int(torch.maximum(tgt_loc.max(), src_loc.max())) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (rows * stride)).from_address(address)
        buffer = torch.frombuffer(memory, dtype=torch.uint8).view(rows, stride)
        buffer[tgt_loc.long()] = buffer[src_loc.long()]


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Pack the slots of the accepted tree nodes (index >= 0), in order."""
    kept = accept_index.reshape(-1)
    kept = kept[kept >= 0].long()
    accept_out_cache_loc[: kept.numel()] = out_cache_loc[kept]


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, accept_stride: int
) -> None:
    """The last accepted token of each request: its bonus token."""
    last = torch.arange(accept_lens.numel()) * accept_stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.reshape(-1)[last])


def verify_tree_greedy_cpu(
    *,
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Walk each draft tree along the target's argmax; `accept_token_num` counts drafts, without the bonus token.

    Shapes: candidates, retrive_*, target_predict [B, N]; accept_index [B, S] (padded with -1); predicts [B * N].
    """
    predicted = target_predict.reshape(candidates.shape).tolist()
    tokens, index = candidates.tolist(), retrive_index.tolist()
    child, sibling = retrive_next_token.tolist(), retrive_next_sibling.tolist()
    for b in range(candidates.shape[0]):
        node, path = 0, [index[b][0]]
        while len(path) < accept_index.shape[1]:
            follower = child[b][node]
            while follower != -1 and tokens[b][follower] != predicted[b][node]:
                follower = sibling[b][follower]
            if follower == -1:
                break
            predicts[index[b][node]] = predicted[b][node]
            node = follower
            path.append(index[b][node])
        predicts[index[b][node]] = predicted[b][node]
        accept_index[b, : len(path)] = torch.tensor(path, dtype=accept_index.dtype)
        accept_token_num[b] = len(path) - 1


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Positions, first children and next siblings of draft trees given by their ancestor masks (bool [B * N * N])."""
    n = draft_token_num
    order = torch.arange(n)
    ancestors = tree_mask.view(batch_size, n, n).bool() & (order[None, :] < order[:, None])
    positions.copy_((ancestors.sum(2) + verified_seq_len.view(-1, 1).long()).view(-1))
    retrive_index.copy_(torch.arange(batch_size * n).view(batch_size, n))
    parent = torch.where(ancestors, order, -1).amax(2)
    first_child = torch.where(ancestors, order[:, None], n).amin(1)
    retrive_next_token.copy_(torch.where(first_child < n, first_child, -1))
    siblings = (parent[:, :, None] == parent[:, None, :]) & (order[:, None] > order[None, :])
    first_sibling = torch.where(siblings, order[:, None], n).amin(1)
    retrive_next_sibling.copy_(torch.where((parent >= 0) & (first_sibling < n), first_sibling, -1))

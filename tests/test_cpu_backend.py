"""The CPU parts against plain references written here: attention, packed products, stand-in kernels."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dspark_serving.errors import EnvironmentMismatchError
from dspark_serving.sglang_adapter.cpu import kernels, standins
from dspark_serving.sglang_adapter.cpu.attention import (
    BatchedTorchNativeBackend,
    Rows,
    attend,
    attention_bias,
    unpack_tree_mask,
)
from dspark_serving.sglang_adapter.cpu.linear import PackedWeight, is_packable

HEADS, KV_HEADS, DIM, POOL = 6, 2, 8, 200


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scaling: float
) -> torch.Tensor:
    """One request, one head at a time: query [q, H, D], key and value [L, K, D], seen [q, L]; returns [q, H, D]."""
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        group = head // (query.shape[1] // key.shape[1])
        scores = (query[:, head] @ key[:, group].T) * scaling
        out[:, head] = scores.masked_fill(~seen, -math.inf).softmax(-1) @ value[:, group]
    return out


def seen_rows(q_len: int, kv_len: int, *, causal: bool, window: int) -> torch.Tensor:
    seen = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for row in range(q_len):
        own = kv_len - q_len + row
        for position in range(kv_len):
            seen[row, position] = (not causal or position <= own) and (window < 0 or position >= own - window)
    return seen


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cache() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(POOL, KV_HEADS, DIM), torch.randn(POOL, KV_HEADS, DIM)


def slots_for(kv_lens: list[int]) -> torch.Tensor:
    """Scattered slots; what lies beyond a request's context is another's."""
    table = torch.stack([torch.randperm(POOL) for _ in kv_lens])
    return table[:, : max(kv_lens)]


@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [([1], [7]), ([1, 1, 1], [5, 31, 1]), ([4, 4], [4, 40]), ([1, 5, 3], [20, 5, 64])],
    ids=["decode one", "decode", "uniform", "ragged"],
)
@pytest.mark.parametrize(
    ("causal", "window"),
    [(True, -1), (False, -1), (True, 3), (False, 5)],
    ids=["causal", "block", "sliding", "sliding block"],
)
def test_attention_equals_a_dense_reference(
    cache: tuple[torch.Tensor, torch.Tensor], q_lens: list[int], kv_lens: list[int], causal: bool, window: int
) -> None:
    rows = Rows(torch.tensor(q_lens), torch.tensor(kv_lens), slots_for(kv_lens))
    query = torch.randn(sum(q_lens), HEADS, DIM)
    bias = attention_bias(rows, causal=causal, window=window, dtype=torch.float32)
    found = attend(query, *cache, rows, bias, scaling=0.3)
    start = 0
    for request, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        slots = rows.slots_BL[request, :kv_len]
        seen = seen_rows(q_len, kv_len, causal=causal, window=window)
        expected = dense_attention(query[start : start + q_len], cache[0][slots], cache[1][slots], seen, 0.3)
        torch.testing.assert_close(found[start : start + q_len], expected)
        start += q_len


def test_attention_follows_a_tree_mask(cache: tuple[torch.Tensor, torch.Tensor]) -> None:
    # Two trees of three drafts: a chain, and two children of the first node.
    trees = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 0, 1]]])
    kv_lens = [8, 5]
    rows = Rows(torch.tensor([3, 3]), torch.tensor(kv_lens), slots_for(kv_lens))
    rows = rows._replace(tree_mask_BQL=unpack_tree_mask(trees.flatten(), rows))
    bias = attention_bias(rows, causal=True, window=-1, dtype=torch.float32)
    query = torch.randn(6, HEADS, DIM)
    found = attend(query, *cache, rows, bias, scaling=0.3)
    for request, kv_len in enumerate(kv_lens):
        slots = rows.slots_BL[request, :kv_len]
        seen = torch.cat([torch.ones(3, kv_len - 3), trees[request]], dim=1).bool()
        own = slice(3 * request, 3 * request + 3)
        expected = dense_attention(query[own], cache[0][slots], cache[1][slots], seen, 0.3)
        torch.testing.assert_close(found[own], expected)


class Pool:
    """A KV pool of one layer."""

    def __init__(self, cache: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.key, self.value = cache

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.key

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.value

    def set_kv_buffer(self, layer: Any, where: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key[where.loc], self.value[where.loc] = key, value


def test_prefill_with_a_cached_prefix_equals_a_dense_reference(cache: tuple[torch.Tensor, torch.Tensor]) -> None:
    from sglang.srt.layers.radix_attention import AttentionType
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    pool, table = Pool(cache), slots_for([12, 9])
    runner = SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool)
    new, lens = [12, 4], [12, 9]
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        batch_size=2,
        encoder_lens=None,
        req_pool_indices=torch.tensor([0, 1]),
        seq_lens=torch.tensor(lens),
        extend_seq_lens=torch.tensor(new),
        out_cache_loc=torch.cat([table[r, lens[r] - new[r] : lens[r]] for r in range(2)]),
    )
    layer = SimpleNamespace(
        layer_id=0, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, tp_v_head_num=KV_HEADS, qk_head_dim=DIM,
        attn_type=AttentionType.DECODER, sliding_window_size=-1, is_cross_attention=False, scaling=0.3,
    )  # fmt: skip
    backend = BatchedTorchNativeBackend(runner)
    backend.init_forward_metadata(batch)
    q, k, v = torch.randn(16, HEADS * DIM), torch.randn(16, KV_HEADS, DIM), torch.randn(16, KV_HEADS, DIM)
    found = backend.forward_extend(q, k, v, layer, batch).view(16, HEADS, DIM)
    for request, rows in enumerate((slice(0, 12), slice(12, 16))):
        slots = table[request, : lens[request]]
        seen = seen_rows(new[request], lens[request], causal=True, window=-1)
        expected = dense_attention(q.view(16, HEADS, DIM)[rows], pool.key[slots], pool.value[slots], seen, 0.3)
        torch.testing.assert_close(found[rows], expected)


def test_packed_product_returns_the_same_bits() -> None:
    weight = torch.randn(96, 64).bfloat16()
    if not is_packable(weight):
        pytest.skip("no packed bf16 product on this machine")
    for rows in (1, 5, 40):
        x = torch.randn(rows, 64).bfloat16()
        assert torch.equal(PackedWeight(weight)(x), nn.functional.linear(x, weight))
    assert not is_packable(weight.float())


def test_cache_location_kernels() -> None:
    table = torch.arange(40).view(4, 10)
    rows, start, end = torch.tensor([2, 0]), torch.tensor([1, 4]), torch.tensor([4, 6])
    slots = torch.zeros(5, dtype=torch.int64)
    kernels.assign_extend_cache_locs_cpu(rows, table, start, end, slots, 10)
    assert slots.tolist() == [21, 22, 23, 4, 5]
    kernels.assign_req_to_token_pool_cpu(rows, table, start, end, torch.tensor([90, 91, 92, 93, 94]), 10)
    assert table[2, 1:4].tolist() == [90, 91, 92]
    assert table[0, 4:6].tolist() == [93, 94]
    bonus = torch.zeros(2, dtype=torch.int64)
    kernels.fill_bonus_tokens_cpu(torch.tensor([7, 8, 9, 1, 2, 3]), torch.tensor([2, 1]), bonus, 3)
    assert bonus.tolist() == [8, 1]
    packed = torch.zeros(3, dtype=torch.int64)
    kernels.fill_accept_out_cache_loc_cpu(torch.tensor([0, -1, 3, 4]), torch.arange(50, 56), packed)
    assert packed.tolist() == [50, 53, 54]


def test_kv_rows_move_by_address() -> None:
    buffers = [torch.arange(24, dtype=torch.float32).view(6, 4), torch.arange(12, dtype=torch.int16).view(6, 2)]
    expected = [buffer.clone() for buffer in buffers]
    for buffer in expected:
        buffer[[1, 2]] = buffer[[2, 5]]
    kernels.copy_all_layer_kv_cache_cpu(
        torch.tensor([buffer.data_ptr() for buffer in buffers]),
        torch.tensor([buffer.stride(0) * buffer.element_size() for buffer in buffers]),
        torch.tensor([1, 2]),
        torch.tensor([2, 5]),
    )
    assert all(torch.equal(buffer, wanted) for buffer, wanted in zip(buffers, expected, strict=True))


def test_tree_kernels_walk_the_matching_branch() -> None:
    # Node 0 has the children 1 and 2, node 2 has the child 3.
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    positions, index = torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)
    child, sibling = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)
    kernels.reconstruct_indices_from_tree_mask(
        mask.flatten(), torch.tensor([10]), positions, index, child, sibling, 1, 4
    )
    assert positions.tolist() == [10, 11, 11, 12]
    assert child.tolist() == [[1, -1, 3, -1]]
    assert sibling.tolist() == [[-1, 2, -1, -1]]
    predicts, accepted = torch.full((4,), -1), torch.full((1, 3), -1)
    counts = torch.zeros(1, dtype=torch.int64)
    kernels.verify_tree_greedy_cpu(
        predicts=predicts, accept_index=accepted, accept_token_num=counts, candidates=torch.tensor([[5, 6, 7, 8]]),
        retrive_index=index, retrive_next_token=child, retrive_next_sibling=sibling,
        target_predict=torch.tensor([[7, 1, 8, 9]]),
    )  # fmt: skip
    assert (counts.tolist(), accepted.tolist()) == ([2], [[0, 2, 3]])
    assert predicts[[0, 2, 3]].tolist() == [7, 8, 9]


def test_stand_ins_yield_to_real_packages_and_name_what_is_missing() -> None:
    finder = standins._StandInFinder()
    spec = finder.find_spec("sgl_kernel", None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert finder.find_spec("torch", None) is None
    finder.exec_module(module)
    with pytest.raises(EnvironmentMismatchError, match="rotate_input_ids_cpu"):
        vars(module)["rotate_input_ids_cpu"]()
    standins.activate()
    if not standins.has_accelerator():
        assert isinstance(sys.meta_path[-1], standins._StandInFinder)

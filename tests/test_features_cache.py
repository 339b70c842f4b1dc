"""Cached features: error bounds, ring, damage, kill in mid-write, full disk, foreign directory."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from dspark_training.data.blocks import Sequences, pad
from dspark_training.data.store import Sample
from dspark_training.features.cache import CachedFeatures, CacheIdentity
from dspark_training.features.compress import CODECS, CodecName, deepspec_bytes_per_token
from dspark_training.features.source import Features, OnlineFeatures
from dspark_training.models.setup import feature_scale
from dspark_training.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serving.errors import OptionError
from tests.tiny_models import make_tiny_target

LAYERS = (0, 2)
CAP = 1 << 22


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = tmp_path_factory.mktemp("target")
    make_tiny_target(path, "llama")
    return Target.load(path)


@pytest.fixture(scope="module")
def scale_M(target: Target) -> torch.Tensor:
    return feature_scale(target, samples(), LAYERS)


class Counting:
    """An online source that remembers which rows it was asked for."""

    def __init__(self, target: Target, scale_M: torch.Tensor) -> None:
        self.inner = OnlineFeatures(target, LAYERS, scale_M)
        self.asked: list[str] = []

    def __call__(self, sequences: Sequences) -> Features:
        self.asked += sequences.keys
        return self.inner(sequences)


def samples(n: int = 8) -> list[Sample]:
    rng = random.Random(0)
    rows = []
    for i in range(n):
        ids = [rng.randrange(500) for _ in range(rng.randrange(12, 40))]
        rows.append(Sample(f"{i:03}", "math", 0.0, ids, [(4, 7), (8, len(ids))]))
    return rows


def cached(
    target: Target, scale_M: torch.Tensor, directory: Path, codec: CodecName = "int8", cap: int = CAP
) -> tuple[CachedFeatures, Counting]:
    inner = Counting(target, scale_M)
    return CachedFeatures(inner, directory, cap, codec, CacheIdentity.of(target, LAYERS, scale_M)), inner


@settings(max_examples=40, deadline=None)
@given(
    codec=st.sampled_from(list(CODECS)),
    rows=st.integers(0, 5),
    width=st.integers(1, 200),
    hidden=st.integers(1, 70),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_the_error_of_every_value_is_within_the_step_of_its_group(
    codec: CodecName, rows: int, width: int, hidden: int, seed: int, size: float
) -> None:
    x_NW = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * size
    quantiser = CODECS[codec].context
    scales, codes = quantiser.encode(x_NW, hidden)
    back_NW = quantiser.decode(scales, codes, width)
    assert codes.shape == (rows, quantiser.code_bytes(width, hidden))
    assert scales.nbytes + codes.nbytes == rows * quantiser.row_bytes(width, hidden)
    assert back_NW.shape == x_NW.shape
    group = quantiser.group or hidden
    for start in range(0, width, group):
        part, back = x_NW[:, start : start + group], back_NW[:, start : start + group]
        largest = part.abs().amax(-1, keepdim=True)
        # e4m3 keeps 3 bits behind the point: half a step is 1/16 of the value, or of its smallest normal number.
        step = part.abs() / 16 + largest * 2**-16 if quantiser.floating else largest / 2**quantiser.bits
        assert bool(((part - back).abs() <= step * 1.001 + largest * 2**-10 + 2**-14).all())


def test_a_hit_equals_its_miss_and_the_online_features_within_the_codec(
    target: Target, scale_M: torch.Tensor, tmp_path: Path
) -> None:
    sequences = pad(samples(4))
    online = OnlineFeatures(target, LAYERS, scale_M)(sequences)
    real, wanted = sequences.mask_BT.bool(), sequences.predicting_BT
    errors = {}
    for codec in CODECS:
        source, inner = cached(target, scale_M, tmp_path / codec, codec)
        first, second = source(sequences), source(sequences)
        assert inner.asked == list(sequences.keys), "the second call must not run the target"
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(first.top_BT, online.top_BT)
        assert torch.equal(first.normaliser_BT, online.normaliser_BT)
        assert not first.last_BTD[~wanted].any()
        difference = (first.context_BTM - online.context_BTM)[real].square().mean()
        errors[codec] = float((difference / online.context_BTM[real].square().mean()).sqrt())
        torch.testing.assert_close(first.last_BTD[wanted], online.last_BTD[wanted], atol=0.15, rtol=0.07)
    assert errors["int8"] < 0.015
    assert errors["fp8"] < 0.04
    assert errors["int4"] < 0.12
    assert errors["int3"] < 0.3
    assert errors["int8"] < errors["int4"] < errors["int3"], "fewer bits must be worse, or the codec does nothing"


def test_only_missing_rows_are_computed_and_other_tokens_under_the_same_key_are_missing(
    target: Target, scale_M: torch.Tensor, tmp_path: Path
) -> None:
    rows = samples(6)
    source, inner = cached(target, scale_M, tmp_path)
    source(pad(rows[:3]))
    inner.asked.clear()
    both = source(pad([rows[1], rows[4], rows[2]]))
    assert inner.asked == ["004"]
    alone = source(pad([rows[4]]))
    torch.testing.assert_close(both.context_BTM[1, : len(rows[4].ids)], alone.context_BTM[0])
    inner.asked.clear()
    source(pad([rows[1]._replace(ids=[*rows[1].ids[:-1], 7])]))
    source(pad([rows[1]._replace(spans=[(4, 9)])]))
    assert inner.asked == ["001", "001"]


def test_a_second_process_reads_what_the_first_wrote(target: Target, scale_M: torch.Tensor, tmp_path: Path) -> None:
    first, _ = cached(target, scale_M, tmp_path)
    expected = first(pad(samples(4)))
    second, inner = cached(target, scale_M, tmp_path)
    assert torch.equal(second(pad(samples(4))).context_BTM, expected.context_BTM)
    assert inner.asked == []
    assert second.counts.hits == 4


def test_a_damaged_record_is_computed_again_and_counted(
    target: Target, scale_M: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = cached(target, scale_M, tmp_path)
    expected = source(pad(samples(4)))
    (shard,) = tmp_path.glob("*.shard")
    data = bytearray(shard.read_bytes())
    data[100] ^= 1  # in the payload of the first record
    shard.write_bytes(data)
    again, inner = cached(target, scale_M, tmp_path)
    got = again(pad(samples(4)))
    assert inner.asked == ["000"]
    assert again.counts.damaged == 1
    assert "damaged" in caplog.text
    torch.testing.assert_close(got.context_BTM, expected.context_BTM, atol=0.05, rtol=0)
    third, inner = cached(target, scale_M, tmp_path)
    third(pad(samples(4)))
    assert inner.asked == [], "the new record takes the damaged one's place"


class FullDisk(io.FileIO):
    """Takes half of a write, then there is no space left."""

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        super().write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_warns_once_and_goes_on_online(
    target: Target, scale_M: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, inner = cached(target, scale_M, tmp_path / "a")
    healthy, _ = cached(target, scale_M, tmp_path / "b")
    rows = samples(8)
    source(pad(rows[:4]))
    (shard,) = (tmp_path / "a").glob("*.shard")
    size = shard.stat().st_size
    full = FullDisk(shard, "r+b")
    full.seek(size)
    source._ring._file = full
    for _ in range(2):
        torch.testing.assert_close(source(pad(rows[4:])), healthy(pad(rows[4:])), rtol=0, atol=0)
    assert caplog.text.count("disk is full") == 1
    assert shard.stat().st_size == size, "half a record is cut off again"
    inner.asked.clear()
    source(pad(rows[:4]))
    assert inner.asked == [], "what was cached is still read"


def test_a_foreign_cache_is_refused(target: Target, scale_M: torch.Tensor, tmp_path: Path) -> None:
    source, _ = cached(target, scale_M, tmp_path)
    source(pad(samples(4)))
    identity = CacheIdentity.of(target, LAYERS, scale_M)
    last_bit = identity._replace(scale_M=tuple(x * (1 + 1e-6) for x in identity.scale_M))
    CachedFeatures(Counting(target, scale_M), tmp_path, CAP, "int8", last_bit)
    foreign: dict[str, tuple[CodecName, CacheIdentity]] = {
        "codec": ("int4", identity),
        "layer_ids": ("int8", identity._replace(layer_ids=(0, 1))),
        "target": ("int8", identity._replace(target="another")),
        "scale": ("int8", identity._replace(scale_M=tuple(2 * x for x in identity.scale_M))),
    }
    for what, (codec, other) in foreign.items():
        with pytest.raises(OptionError, match=what):
            CachedFeatures(Counting(target, scale_M), tmp_path, CAP, codec, other)


def test_drafters_of_different_layers_share_a_cache_that_holds_them_all(
    target: Target, scale_M: torch.Tensor, tmp_path: Path
) -> None:
    sequences, width = pad(samples(4)), target.config.hidden_size
    source, _ = cached(target, scale_M, tmp_path)
    both = source(sequences)
    identity = CacheIdentity.of(target, LAYERS, scale_M)
    for layer_ids, expected in {
        (2,): both.context_BTM[..., width:],
        (2, 0): torch.cat([both.context_BTM[..., width:], both.context_BTM[..., :width]], -1),
    }.items():
        inner = Counting(target, scale_M)
        some = CachedFeatures(inner, tmp_path, CAP, "int8", identity, layer_ids)(sequences)
        assert inner.asked == []
        assert torch.equal(some.context_BTM, expected)
        assert torch.equal(some.last_BTD, both.last_BTD)
    with pytest.raises(OptionError, match=r"lack \[1\]"):
        CachedFeatures(Counting(target, scale_M), tmp_path, CAP, "int8", identity, (0, 1))


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    make_tiny_target(tmp_path / "a", "llama")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, moved = Target.load(tmp_path / "a"), Target.load(tmp_path / "b")
    assert CacheIdentity.of(first, LAYERS, None).target != ""
    moved.model.base_model.layers[1].mlp.up_proj.weight.data *= 1.01
    assert CacheIdentity.of(first, LAYERS, None) == CacheIdentity.of(Target.load(tmp_path / "a"), LAYERS, None)
    assert CacheIdentity.of(first, LAYERS, None) != CacheIdentity.of(moved, LAYERS, None)


def test_bytes_a_token_are_what_is_written_and_one_codec_reaches_a_quarter_of_deepspecs(
    target: Target, scale_M: torch.Tensor, tmp_path: Path
) -> None:
    rows = samples(8)
    tokens = sum(len(s.ids) for s in rows)
    share = sum(int(pad([s]).predicting_BT.sum()) for s in rows) / tokens
    for codec in CODECS:
        source, _ = cached(target, scale_M, tmp_path / codec, codec)
        source(pad(rows))
        stated = CODECS[codec].bytes_per_token(len(LAYERS), target.config.hidden_size, share)
        records = 8 * (32 + 8) / tokens  # header, and at most 7 bytes of padding
        assert stated <= source.counts.bytes_per_token <= stated + records
        assert source.counts.disk_bytes == pytest.approx(source.counts.bytes_per_token * tokens)
    smollm2 = deepspec_bytes_per_token(5, 576)
    assert smollm2 == 6918
    assert CODECS["int8"].bytes_per_token(5, 576) < 0.52 * smollm2
    assert CODECS["int3"].bytes_per_token(5, 576, predicting_share=0.75) < 0.25 * smollm2

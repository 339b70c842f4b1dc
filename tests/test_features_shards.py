"""The ring of records on disk: cap, order of eviction, several writers, damage, a kill in mid-write."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from dspark_training.features.shards import RecordRing

from dspark_serving.errors import OptionError


def test_the_ring_keeps_the_newest_records_under_the_cap(tmp_path: Path) -> None:
    ring = RecordRing(tmp_path, 16_000, seed=1)
    payloads = {i.to_bytes(16, "little"): bytes([i % 251]) * (100 + i) for i in range(200)}
    for digest, payload in payloads.items():
        assert ring.put(digest, payload)
        assert ring.disk_bytes() <= 16_000
        kept = ring.get(digest)
        assert kept is not None
        assert kept.tobytes() == payload
    alive = [i for i, digest in enumerate(payloads) if ring.get(digest) is not None]
    assert alive == list(range(alive[0], 200)), "the oldest go first"
    assert alive[0] > 0
    assert ring.evicted_shards > 0
    assert not ring.put(b"x" * 16, bytes(1001)), "a record larger than a shard is not kept"
    with pytest.raises(OptionError, match="cap"):
        RecordRing(tmp_path / "small", 100, seed=1)


def test_two_writers_share_a_directory_and_its_cap(tmp_path: Path) -> None:
    rings = [RecordRing(tmp_path, 32_000, seed=1, writer=(rank, 2)) for rank in range(2)]
    for i in range(300):
        rings[i % 2].put(i.to_bytes(16, "little"), bytes([i % 251]) * 200)
        assert rings[0].disk_bytes() <= 32_000
    for ring in rings:
        assert ring.get((299).to_bytes(16, "little")) is not None
        assert ring.get((298).to_bytes(16, "little")) is not None
        assert ring.get((0).to_bytes(16, "little")) is None
    alone = RecordRing(tmp_path, 16_000, seed=1)
    assert alone.disk_bytes() <= 16_000, "shards of a writer that is no more do not escape the cap"


def test_a_damaged_header_costs_the_rest_of_its_shard_and_nothing_else(tmp_path: Path) -> None:
    ring = RecordRing(tmp_path, 16_000, seed=1)
    for i in range(9):
        ring.put(bytes([i]) * 16, bytes([i]) * 264)  # three records a shard
    second = sorted(tmp_path.glob("*.shard"))[1]
    data = bytearray(second.read_bytes())
    data[296 + 21] ^= 255  # length of its second record
    second.write_bytes(data)
    again = RecordRing(tmp_path, 16_000, seed=1)
    assert [i for i in range(9) if again.get(bytes([i]) * 16) is None] == [4, 5]
    assert again.damaged == 1
    assert RecordRing(tmp_path, 16_000, seed=2).get(bytes(16)) is None, "another seed's records are not seen"


def test_a_kill_in_mid_write_loses_that_record_only(tmp_path: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from dspark_training.features.shards import RecordRing
        ring = RecordRing(Path(sys.argv[1]), 1 << 20, seed=1)
        for i in range(5):
            ring.put(bytes([i]) * 16, bytes([i]) * 1000)
        file = ring._file
        class Half:
            def tell(self): return file.tell()
            def write(self, data):
                file.write(data[:500])
                os.kill(os.getpid(), 9)
        ring._file = Half()
        ring.put(bytes([5]) * 16, bytes(1000))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=False)
    assert result.returncode == -9
    ring = RecordRing(tmp_path, 1 << 20, seed=1)
    for i in range(5):
        payload = ring.get(bytes([i]) * 16)
        assert payload is not None
        assert payload.tobytes() == bytes([i]) * 1000
    assert ring.get(bytes([5]) * 16) is None
    assert ring.put(bytes([5]) * 16, bytes(1000))
    assert RecordRing(tmp_path, 1 << 20, seed=1).get(bytes([5]) * 16) is not None

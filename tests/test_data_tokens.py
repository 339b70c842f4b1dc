"""The tokenised store, full disks, and what `dspark data stats` says."""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from dspark_training.data.chat import ChatTemplate
from dspark_training.data.skipped import Skipped
from dspark_training.data.stats import overlap, stats
from dspark_training.data.store import Sample, SampleStore, content_hash, split
from dspark_training.data.tokens import Summary, TokenStore, build, load_samples
from typer.testing import CliRunner

from dspark_serving.cli.main import app
from dspark_serving.errors import DataError
from tests.chat_tokenizers import CHATML, word_tokenizer


def samples(n: int, length: int = 20, largest: int = 49_000) -> list[Sample]:
    rng = random.Random(0)
    made = []
    for i in range(n):
        ids = [rng.randrange(largest) for _ in range(length)]
        made.append(
            Sample(f"{i:05}", "math", 0.8 * (i % 2), ids, [(4, 8), (10, length)], 0.9, (None, True, False)[i % 3])
        )
    return made


def stored(path: Path, made: list[Sample]) -> Path:
    SampleStore(path).append(made)
    return path


def test_a_tokenised_store_gives_back_every_sample(tmp_path: Path) -> None:
    made = samples(30)
    source = stored(tmp_path / "s.jsonl", made)
    skipped = Skipped(tmp_path / "skipped.jsonl")
    summary = build([source], tmp_path / "store", skipped)
    store = load_samples(tmp_path / "store")
    assert isinstance(store, TokenStore)
    assert list(store) == made == load_samples(source)
    assert store[3:5] == made[3:5]
    assert store[-1] == made[-1]
    assert summary == Summary(30, 600, 30 * 14, content_hash(reversed(made)), None)
    store.verify()
    assert skipped.counts == {}
    wide = build([stored(tmp_path / "w.jsonl", samples(3, largest=200_000))], tmp_path / "wide", skipped)
    assert list(load_samples(tmp_path / "wide")) == samples(3, largest=200_000)
    assert wide.content_hash != summary.content_hash


def test_a_million_tokens_take_a_few_megabytes_and_are_mapped_not_read(tmp_path: Path) -> None:
    source = stored(tmp_path / "s.jsonl", samples(2000, 500))
    build([source], tmp_path / "store", Skipped(None))
    size = sum(f.stat().st_size for f in (tmp_path / "store").rglob("*"))
    assert 2_000_000 < size < 2_500_000
    store = load_samples(tmp_path / "store")
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "store") in maps
    assert len(store) == 2000


def test_a_split_goes_by_the_keys_and_reads_from_the_store(tmp_path: Path) -> None:
    made = samples(30)
    build([stored(tmp_path / "s.jsonl", made)], tmp_path / "store", Skipped(None))
    train, held_out = split(load_samples(tmp_path / "store"), 0.1)
    assert (list(train), list(held_out)) == (made[3:], made[:3])
    assert (train[-1], train[1:3], len(train)) == (made[-1], made[4:6], 27)
    assert list(split(made[::-1], 0.1)[0]) == made[3:]


def test_what_cannot_be_trained_on_is_counted_and_written_down(tmp_path: Path) -> None:
    good, long, empty = samples(3)
    long = long._replace(ids=list(range(99)))
    empty = empty._replace(spans=[(3, 4)])
    outside = json.dumps(good._replace(spans=[(0, 99)], key="x")._asdict())
    negative = json.dumps(good._replace(ids=[-1] * 20, key="y")._asdict())
    source = stored(tmp_path / "s.jsonl", [good, long, empty, good])
    with source.open("a") as file:
        file.write(f'{outside}\n{negative}\n{{"ids": [1]}}\n{{\n')
    skipped = Skipped(tmp_path / "skipped.jsonl")
    build([source], tmp_path / "store", skipped, max_tokens=50)
    assert list(load_samples(tmp_path / "store")) == [good]
    assert skipped.counts == {
        "more than 50 tokens": 1,
        "empty answer": 1,
        "the same prompt again": 1,
        "a sample whose spans or ids cannot be": 2,
        "no sample": 1,
        "no JSON": 1,
    }
    with pytest.raises(DataError, match="no sample is left"):
        build([source], tmp_path / "none", skipped, max_tokens=2)
    assert not (tmp_path / "none").exists()
    with pytest.raises(DataError, match=r"s\.jsonl:5"):
        load_samples(source)


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": 5},
        {"domain": None},
        {"temperature": "hot"},
        {"temperature": math.nan},
        {"temperature": True},
        {"top_p": None},
        {"thinking": "yes"},
    ],
)
def test_a_sample_with_a_field_of_another_type_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    good = samples(1)[0]._asdict()
    (tmp_path / "s.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(good | wrong)}\n")
    with pytest.raises(DataError, match=r"s\.jsonl:2: no sample"):
        load_samples(tmp_path / "s.jsonl")


def test_whole_numbers_hash_as_the_floats_that_a_store_makes_of_them(tmp_path: Path) -> None:
    whole = samples(1)[0]._asdict() | {"temperature": 1, "top_p": 1}
    (tmp_path / "s.jsonl").write_text(json.dumps(whole) + "\n")
    build([tmp_path / "s.jsonl"], tmp_path / "store", Skipped(None))
    store = load_samples(tmp_path / "store")
    assert isinstance(store, TokenStore)
    store.verify()
    assert store.summary.content_hash == content_hash(load_samples(tmp_path / "s.jsonl"))


def test_answered_conversations_are_masked_by_the_template(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(CHATML)
    chat = ChatTemplate(tokenizer, [tokenizer.eos_token_id])
    said = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello you"}]
    rows = [{"messages": said}, {"messages": said[:1]}, {"prompt": ""}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    skipped = Skipped(tmp_path / "skipped.jsonl")
    build([tmp_path / "c.jsonl"], tmp_path / "store", skipped, template=chat)
    (sample,) = load_samples(tmp_path / "store")
    assert sample.spans == [(7, 10)]
    assert sample.temperature is None
    assert skipped.counts == {"no assistant message": 1, "empty user message": 1}
    with pytest.raises(DataError, match="Pass --target"):
        build([tmp_path / "c.jsonl"], tmp_path / "other", skipped)


def test_a_store_is_complete_or_absent_and_damage_is_noticed(tmp_path: Path) -> None:
    source = stored(tmp_path / "s.jsonl", samples(30))
    (tmp_path / ".partial-store").mkdir()
    (tmp_path / ".partial-store" / "half").write_text("")
    build([source], tmp_path / "store", Skipped(None))
    build([source], tmp_path / "store", Skipped(None))  # again: replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.jsonl", "store"]
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(DataError, match="exists"):
        build([source], mine, Skipped(None))
    with pytest.raises(DataError, match="no tokenised store"):
        load_samples(mine)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "store", other)
    (arrow,) = other.glob("*.arrow")
    data = bytearray(arrow.read_bytes())
    place = bytes(data).index(samples(1)[0].ids[7].to_bytes(2, "little") + samples(1)[0].ids[8].to_bytes(2, "little"))
    data[place] ^= 1
    arrow.write_bytes(data)
    with pytest.raises(DataError, match="hash"):
        TokenStore(other).verify()
    arrow.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError):
        list(TokenStore(other))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no sample"):
        load_samples(tmp_path / "empty.jsonl")


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s.jsonl")
    store.append(samples(3))
    before = store.path.read_bytes()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot be written") as caught:
            store.append(samples(500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "Free some" in caught.value.fix
    assert store.path.read_bytes() == before


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_not(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(30)]
    evaluation = [" ".join(words), " ".join(words[:9]), " ".join(words[:7])]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in evaluation))
    for text, found in [
        ("x " + " ".join(words[5:18]).upper() + "! y", 1),
        ("x " + " ".join(words[5:17]) + " y", 0),
        (" ".join(words[:9]), 1),  # all of the second, too little of the first
        (" ".join(words[:8]), 0),
        (" ".join(words), 2),
    ]:
        assert overlap([text], [path]) == [("eval", 3, 2, found)], text


def test_stats_of_prompts_and_samples(tmp_path: Path) -> None:
    text = "one two three four five six seven eight nine ten"
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": text}, {"prompt": text.title()}, {"prompt": text + " eleven", "domain": "math"}, {"prompt": ""}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = stats(prompts, Skipped(None))
    assert (found.kind, found.rows, found.domains) == ("prompts", 3, {"chat": 2, "math": 1})
    assert (found.duplicates, found.near_duplicates) == (1, 1)
    assert found.skipped == {"empty user message": 1}
    assert found.lengths == (31, pytest.approx(31 / 3), 10, pytest.approx(10.9), 11)
    source = stored(tmp_path / "s.jsonl", [*samples(4), samples(1)[0]._replace(key="again")])
    build([source], tmp_path / "store", Skipped(None))
    for path in (source, tmp_path / "store"):
        seen = stats(path, Skipped(None))
        assert (seen.kind, seen.rows, seen.duplicates) == ("samples", 5, 1)
        assert seen.temperatures == {"0": 3, "0.8": 2}
        assert seen.thinking == {"as the template": 3, "on": 1, "off": 1}
        assert seen.supervised is not None
        assert seen.supervised.total == 5 * 14
        assert seen.content_hash == content_hash(load_samples(source))
    with pytest.raises(DataError, match="Pass --target"):
        stats(source, Skipped(None), [prompts])


def test_the_command_line_builds_and_shows(tmp_path: Path) -> None:
    source = stored(tmp_path / "s.jsonl", samples(5))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "one two three four five six seven eight"}) + "\n")

    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, ["data", *arguments])
        return result.exit_code, result.stdout, result.stderr

    code, out, _ = run("build", str(source), "--out", str(tmp_path / "store"), "--max-tokens", "30")
    assert code == 0
    assert "5 samples, 100 tokens, 70 of them the assistant's" in out
    code, out, _ = run("stats", str(tmp_path / "store"), "--json")
    assert code == 0
    assert json.loads(out)["lengths"]["total"] == 100
    code, out, _ = run("stats", str(prompts), "--against", str(prompts))
    assert code == 0
    assert "1 of 1 prompts" in out
    code, _, err = run("stats", str(tmp_path / "nowhere.jsonl"))
    assert code == 2
    assert "does not exist" in err
    code, _, err = run("prompts", str(prompts), "--target", "x", "--out", "y", "--count", "chat")
    assert code == 2
    assert "DOMAIN=NUMBER" in err
    for command in ("prompts", "code-prompts", "answers", "build", "stats"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "Usage:" in out

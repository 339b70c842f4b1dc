"""Rows of every layout, datasets from disk, prompts from sources and by the target; what is skipped and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from dspark_training.data.code_prompts import code_prompts
from dspark_training.data.conversation import Prompt
from dspark_training.data.prompts import read_conversations, read_prompts, save_prompts
from dspark_training.data.skipped import Skipped
from dspark_training.data.text import Duplicates, degenerate
from dspark_training.data.written import Seeds, read_seeds, write_prompts
from dspark_training.target import Target

from dspark_serving.errors import DataError
from tests.tiny_models import make_tiny_target

CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
    {"from": "human", "value": "Bye"},
    {"from": "gpt", "value": "So long"},
]


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_every_layout_gives_the_same_conversation(tmp_path: Path) -> None:
    openai = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    rows = [
        {"prompt": "Hi", "system": "Be kind."},
        {"turns": ["Hi"], "system": "Be kind."},
        {"messages": [*openai, {"role": "assistant", "content": "Hello"}]},
        {"conversations": SHAREGPT[:3], "domain": "chat"},
    ]
    (prompt,) = read_prompts(written(tmp_path / "p.jsonl", *rows))
    expected = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    assert prompt == Prompt("chat", expected)
    two = read_prompts(written(tmp_path / "two.jsonl", {"turns": ["Hi", "Bye"], "domain": "mt"}, {"prompt": "Hi"}))
    assert [len(list(p.openings())) for p in two] == [2, 1]


def test_tools_of_both_layouts(tmp_path: Path) -> None:
    tool = {"name": "weather", "parameters": {}}
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Weather in Oslo?"},
            {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})},
            {"from": "observation", "value": "cold"},
        ],
        "tools": json.dumps([tool]),
    }
    openai = {
        "messages": [
            {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "cold"},
        ],
        "tools": [{"type": "function", "function": tool}],
    }
    (prompt,) = read_prompts(written(tmp_path / "p.jsonl", sharegpt, openai))
    assert prompt.tools == ({"type": "function", "function": tool},)
    assert prompt.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}


BAD = [
    ("{", "no JSON"),
    ({"prompt": "half a pair \ud83d"}, "text that is no Unicode"),
    ({"turns": ["whole", "\udc00"]}, "text that is no Unicode"),
    ({"prompt": "whole", "system": "\ud83d"}, "text that is no Unicode"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]}, "text that is no Unicode"),
    ("[1]", "not a JSON object"),
    ({"domain": "math"}, "no prompt, turns, messages or conversations"),
    ({"prompt": "  "}, "empty user message"),
    ({"messages": []}, "empty conversation"),
    ({"conversations": [{"from": "gpt", "value": "Hello"}]}, "no user message"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content that is not text"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown role 'narrator'"),
    ({"messages": "hi"}, "messages that are no list"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "a malformed tool call"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_row_is_named_or_skipped_with_its_reason(tmp_path: Path, line: Any, reason: str) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "fine"}, line, {"prompt": "fine too"})
    with pytest.raises(DataError, match=r"p\.jsonl:2: " + reason):
        read_prompts(path)
    skipped = Skipped(tmp_path / "p.skipped.jsonl")
    assert [p.text for p in read_prompts(path, skipped)] == ["fine", "fine too"]
    (row,) = [json.loads(text) for text in skipped.path.read_text().splitlines()]  # type: ignore[union-attr]
    assert (row["reason"], row["where"]) == (reason, f"{path}:2")
    assert skipped.summary().startswith(f"1 skipped (1 {reason})")
    Skipped(tmp_path / "p.skipped.jsonl")
    assert not (tmp_path / "p.skipped.jsonl").exists(), "a new run does not show the old one's rows"


def test_datasets_on_disk_in_the_layouts_of_sharegpt_and_open_perfectblend(tmp_path: Path) -> None:
    rows = [{"conversations": SHAREGPT, "source": "ultra"}, {"conversations": SHAREGPT[1:3], "source": "orca"}]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(tmp_path / "one.parquet")
    (tmp_path / "whole.json").write_text(json.dumps(rows))
    (tmp_path / "folder").mkdir()
    made.to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("saved", "one.parquet", "whole.json", "folder", "folder@train"):
        prompts = read_prompts(f"{tmp_path}/{name}")
        assert [(p.domain, p.text) for p in prompts] == [("ultra", "Bye"), ("orca", "Hi")], name
    assert len(read_prompts(tmp_path / "one.parquet", limit=1)) == 1
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(f"{tmp_path}/folder@missing")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(f"{tmp_path}/nowhere")


def test_messages_with_the_empty_fields_that_arrow_adds(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "cold"},
    ]
    datasets.Dataset.from_list([{"messages": messages}]).to_parquet(tmp_path / "m.parquet")
    ((where, conversation),) = read_conversations(tmp_path / "m.parquet")
    assert where.endswith("@train[0]")
    assert [set(m) for m in conversation.messages] == [
        {"role", "content"},
        {"role", "content", "tool_calls"},
        {"role", "content"},
    ]


def test_saved_prompts_are_read_back(tmp_path: Path) -> None:
    prompts = [
        Prompt.ask("math", "1 + 1?"),
        Prompt("chat", ({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), ({"function": {}},)),
    ]
    save_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts(tmp_path / "p.jsonl") == prompts
    assert prompts[1].with_suffix("!").text == "u!"


def test_duplicates_and_near_duplicates() -> None:
    seen = Duplicates()
    text = "Write a function that sorts a list of numbers and returns the largest one of them"
    assert seen.add(text) is None
    assert seen.add(text.upper() + "!") == "duplicate"
    assert seen.add(text + " please") == "near duplicate"
    assert seen.add("Write a function that sorts a list of words by the number of their vowels, please") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Why?", "too short"),
        ("Why is the sky \ufffd today", "broken characters"),
        ("Why is the sky aaaaaaaaaaaaaaaaaaaaaaaa", "a run of one character"),
        ("why is it so " * 8, "repeats itself"),
        ("Add two and two.\nAdd two and two.\nAdd two and two.\nNow stop.", "repeats itself"),
        ("Why is the sky blue in the morning and red in the evening, and what has dust to do with it?", None),
    ],
)
def test_degenerate_messages(text: str, reason: str | None) -> None:
    assert degenerate(text) == reason


def test_prompts_from_python_sources(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "class A:\n    def mean(self, values: list[float], weight=1, *rest) -> float:\n"
        '        """Return the weighted mean of all values.\n\n        >>> mean([1, 3])\n        2.0\n        """\n'
        '        return 0\n\ndef _hidden(x):\n    """Not public, however long this docstring is made to be."""\n'
        'def bare():\n    """Has no parameter, however long this docstring is made to be."""\n'
        'def short(x):\n    """Short."""\n'
    )
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text((tmp_path / "a.py").read_text().replace("mean", "other"))
    skipped = Skipped(tmp_path / "s.jsonl")
    (prompt,) = code_prompts(tmp_path, skipped, limit=None, seed=0)
    head = (
        "def mean(values: list[float], weight=1, *rest) -> float:\n"
        '    """ Return the weighted mean of all values.\n\n    >>> mean([1, 3])\n    2.0\n    """\n'
    )
    assert head in prompt.text
    assert skipped.counts == {"no Python": 1}
    with pytest.raises(DataError, match="no documented function"):
        code_prompts(tmp_path / "nowhere", skipped, limit=None, seed=0)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = tmp_path_factory.mktemp("target")
    make_tiny_target(path, "llama")
    return Target.load(path)


SEEDS = Seeds.model_validate(
    {"chat": {"openings": ["Why is {topic} so"], "topics": ["dust", "snow"]}, "code": {"openings": ["Write me a"]}}
)


class KilledError(Exception):
    pass


def test_the_target_writes_prompts_from_its_seeds_and_a_killed_run_goes_on(target: Target, tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    seen: list[tuple[int, int]] = []

    def kill(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 16:
            raise KilledError

    counts = {"chat": 20, "code": 20}
    with pytest.raises(KilledError):
        write_prompts(target, SEEDS, counts, out, seed=0, batch_size=8, progress=kill)
    assert not out.exists()
    log = out.with_suffix(".attempts.jsonl")
    before = log.read_text()
    assert before.count("\n") == 16
    with log.open("a") as file:
        file.write('{"attempt": "torn')
    prompts = write_prompts(target, SEEDS, counts, out, seed=0, batch_size=8)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert log.read_text().startswith(before)
    assert len({row["attempt"] for row in rows}) == len(rows) == 40
    assert prompts == read_prompts(out)
    assert len(prompts) == sum(row["dropped"] is None for row in rows) < 40
    heads = {"chat": ("Why is dust so", "Why is snow so"), "code": ("Write me a",)}
    assert all(p.text.startswith(heads[p.domain]) for p in prompts)


def test_seeds_are_validated(target: Target, tmp_path: Path) -> None:
    for bad, message in [
        ({"chat": ["Why"]}, "chat"),
        ({"chat": {"openings": []}}, "openings"),
        ({"chat": {"openings": ["Why {topic}"]}}, "no topics"),
    ]:
        (tmp_path / "s.json").write_text(json.dumps(bad))
        with pytest.raises(DataError, match=message):
            read_seeds(tmp_path / "s.json")
    with pytest.raises(DataError, match="no seeds for law"):
        write_prompts(target, SEEDS, {"law": 1}, tmp_path / "p.jsonl", seed=0, batch_size=8)

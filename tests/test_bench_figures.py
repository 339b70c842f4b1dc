"""The arithmetic of the measurements: ratios and their intervals, rows, tables, verdicts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dspark_serving.bench.arms import Arm, Attached
from dspark_serving.bench.outcome import write_outcome
from dspark_serving.bench.plan import Point
from dspark_serving.bench.report import markdown, plot_pareto
from dspark_serving.bench.results import ResultFile, Row
from dspark_serving.bench.runs import Run
from dspark_serving.bench.server_api import Counters, plugin_counters, sglang_counters
from dspark_serving.bench.statistics import requests_of, speed_ratio
from dspark_serving.bench.summary import accepted_length, by_point, goodput, rows_of, verified_tokens_per_round
from dspark_serving.bench.verdict import compare, paired, verdict
from dspark_serving.bench.workload import Dataset, Load
from tests.bench_runs import POINT, one_by_one, sample, settings_of

# ../shared/notes/results.md
RESULT_KEYS = {
    "arm", "target", "drafter", "family", "dataset", "temperature", "concurrency", "repetition", "requests",
    "output_tokens", "seconds", "tokens_per_second", "tokens_per_second_per_user", "accepted_length",
    "verified_tokens_per_round", "ttft_p50", "tpot_p50", "itl_p95", "equal_to_off",
}  # fmt: skip
ARMS = (
    Arm("off", Attached("http://a")),
    Arm("static", Attached("http://a"), drafter="a drafter", family="dspark"),
    Arm("scheduler", Attached("http://a"), drafter="a drafter", family="dspark"),
)
SETTINGS = settings_of(*ARMS)


def test_parts_of_the_time_add_up_to_the_run_even_when_requests_overlap() -> None:
    run = Run(one_by_one("off", [1.0]).key, 6.0, (sample(4.0), sample(2.0), sample(6.0)), None)
    assert requests_of([run]).share_RP[0].tolist() == pytest.approx([2.0, 1.0, 3.0])


def test_ratio_of_a_constant_gain_is_certain() -> None:
    seconds = [1.0, 5.0, 2.0, 9.0]
    off = [one_by_one("off", seconds, repetition=r) for r in range(3)]
    ours = [one_by_one("ours", [s / 1.5 for s in seconds], repetition=r) for r in range(3)]
    assert speed_ratio(ours, off) == pytest.approx((1.5, 1.5, 1.5))


def test_ratio_interval_covers_the_truth_at_least_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered, widths = [], []
    for _ in range(100):
        ours, off = [], []
        gains = rng.uniform(1.2, 2.2, 40)
        base = rng.uniform(1, 3, 40)
        for repetition in range(4):
            noise = rng.normal(1.0, 0.03)  # of the machine, in one arm's run
            off.append(one_by_one("off", list(base), repetition=repetition))
            ours.append(one_by_one("ours", list(noise * base / gains), repetition=repetition))
        ratio = speed_ratio(ours, off)
        truth = 1.0 / np.mean(1.0 / np.linspace(1.2, 2.2, 100_001))  # total time by total time, over all prompts
        covered.append(ratio.low <= truth <= ratio.high)
        widths.append(ratio.high - ratio.low)
    assert np.mean(covered) >= 0.88
    assert np.mean(widths) < 0.4, "an interval that is always right because it is huge says nothing"


def test_noise_between_repetitions_widens_the_interval() -> None:
    off = [one_by_one("off", [1.0, 1.0], repetition=r) for r in range(2)]
    ours = [one_by_one("ours", [1.0 + 0.2 * r] * 2, repetition=r) for r in range(2)]
    ratio = speed_ratio(ours, off)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((1 / 1.2, 4 / 4.4, 1.0))


def test_at_a_fixed_rate_arms_differ_in_the_speed_of_users() -> None:
    point = Point("gsm8k", 0.0, Load(request_rate=1.0))
    same_time = 100.0  # the rate decides when a run ends
    slow, fast = (
        [Run(one_by_one(arm, [1.0], point=point).key, same_time, (sample(s), sample(s)), None)]
        for arm, s in (("off", 4.0), ("ours", 2.0))
    )
    assert speed_ratio(fast, slow).value == pytest.approx(2.0)


def test_runs_are_compared_within_their_repetition() -> None:
    off = [one_by_one("off", [1.0], repetition=r) for r in (0, 1)]
    ours = [one_by_one("ours", [1.0], repetition=r) for r in (1, 2)]
    assert paired(ours, off) == ([ours[0]], [off[1]])


def test_accepted_length_is_pooled_over_rounds_by_the_servers_count() -> None:
    first, second = Counters(3, 3, 6, 18.0, {}), Counters(1, 1, 1, 2.0, {})
    runs = [one_by_one("ours", [1.0], counters=counters) for counters in (first, second)]
    assert accepted_length(runs) == 7 / 4
    assert verified_tokens_per_round(runs) == 20 / 4
    assert accepted_length([one_by_one("off", [1.0])]) is None
    assert verified_tokens_per_round([one_by_one("ours", [1.0], counters=first._replace(verified_tokens=None))]) is None


def test_counters_are_those_of_the_run() -> None:
    report = {"rounds": 10, "request_rounds": 40, "output_tokens": 70, "verified_tokens": 200, "policy": "full"}
    info = {"internal_states": [{"dspark": report | {"phase_seconds_total": {"verify": 4.0}}}]}
    after = plugin_counters(info)
    assert after is not None
    assert after.since(Counters(4, 10, 20, 50.0, {"verify": 1.0})) == Counters(6, 30, 50, 150.0, {"verify": 3.0})
    assert plugin_counters({"internal_states": [{"dspark": {"active": False}}]}) is None


def test_sglangs_mean_gives_the_rounds_of_servers_without_our_counters() -> None:
    info = {"speculative_num_draft_tokens": 6, "internal_states": [{"avg_spec_accept_length": 1.5}]}
    counters = sglang_counters(info, tokens=30)
    assert counters is not None
    assert (counters.request_rounds, counters.tokens / counters.request_rounds) == (20, 1.5)
    assert counters.verified_tokens == 120
    assert sglang_counters({"internal_states": [{}]}, tokens=30) is None


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    # ttft 0.1 s, 0.9 s for the 9 other tokens; the second takes twice as long.
    samples = [sample(1.0), sample(2.0)]
    assert goodput(samples, None, None) is None
    assert goodput(samples, 0.1, None) == 0.5
    assert goodput(samples, 0.2, 0.2) == 1.0
    assert goodput(samples, 0.2, 0.1 + 1e-9) == 0.5
    assert goodput(samples, 0.05, 0.2) == 0.0


def gains(**by_arm: float) -> list[Run]:
    """Two repetitions of each arm, so many times as fast as 6 seconds."""
    return [
        one_by_one(arm, [2.0 / gain, 4.0 / gain], repetition=repetition, text=f"not {repetition}" if gain < 1 else "a")
        for repetition in (0, 1)
        for arm, gain in by_arm.items()
    ]


def judged(runs: list[Run]) -> tuple[list[Row], str]:
    comparisons = compare("scheduler", ("off", "static"), by_point(SETTINGS, runs))
    return rows_of(SETTINGS, runs, comparisons), verdict(comparisons)


def test_rows_have_the_agreed_keys_and_summaries_compare() -> None:
    rows, _ = judged(gains(off=1.0, static=0.5, scheduler=2.0))
    assert all(set(row) >= RESULT_KEYS for row in rows)
    assert [row["repetition"] for row in rows] == [0, 1, 0, 1, 0, 1, None, None, None]
    summaries = {row["arm"]: row for row in rows if row["repetition"] is None}
    assert "ratio_to_off" not in summaries["off"]
    assert summaries["static"]["ratio_to_off"] == pytest.approx(0.5)
    assert (summaries["scheduler"]["best_other"], summaries["scheduler"]["ratio_to_best_other"]) == ("off", 2.0)
    assert {arm: row["equal_to_off"] for arm, row in summaries.items()} == {"off": 1.0, "static": 0.0, "scheduler": 1.0}
    assert (summaries["scheduler"]["output_tokens"], summaries["scheduler"]["seconds"]) == (40, 6.0)
    assert summaries["scheduler"]["tokens_per_second"] == pytest.approx(40 / 6)
    assert summaries["off"]["tpot_p50"] == pytest.approx(np.median([0.9 * 2 / 9, 0.9 * 4 / 9]))
    json.dumps(rows)  # no numpy scalars


def test_sampled_texts_are_not_compared() -> None:
    point = POINT._replace(temperature=1.0)
    settings = settings_of(*ARMS, temperatures=(1.0,))
    rows = rows_of(settings, [one_by_one(arm.name, [1.0], point=point) for arm in ARMS], [])
    assert {row["equal_to_off"] for row in rows} == {None}


def test_verdict_of_a_winner_names_no_lost_point() -> None:
    _, said = judged(gains(off=1.0, static=1.5, scheduler=1.8))
    assert "scheduler against the best of off, static: 1.20-1.20" in said
    assert "Nowhere below 0.97" in said
    assert "- off: 1.80-1.80 over 1 points (geometric mean 1.80); at x1: 1.80-1.80" in said


def test_a_fair_verdict_picks_the_rival_by_the_other_repetitions() -> None:
    speeds = {"off": (1.6, 0.8), "static": (0.8, 1.6), "scheduler": (1.2, 1.2)}  # each rival is lucky once
    runs = [
        one_by_one(arm, [2.0 / speed], repetition=repetition)
        for arm, both in speeds.items()
        for repetition, speed in enumerate(both)
    ]
    (comparison,) = compare("scheduler", ("off", "static"), by_point(SETTINGS, runs))
    assert comparison.fair is not None
    assert comparison.fair.value == pytest.approx(1.2 / 0.8), "the unlucky run of each"
    assert comparison.ratio.value == pytest.approx(1.2 * (1 / 1.6 + 1 / 0.8) / 2)
    said = verdict([comparison])
    assert "1.50-1.50, median 1.50; below 0.97 at 0 of 1 points." in said


def test_one_repetition_has_no_fair_verdict_and_a_steady_loser_loses_fairly_too() -> None:
    runs = gains(off=1.0, static=0.5, scheduler=0.9)
    _, said = judged(runs)
    assert "below 0.97 at 1 of 1 points: gsm8k T=0 x1 0.90." in said
    (comparison,) = compare("scheduler", ("off", "static"), by_point(SETTINGS, runs[:3]))
    assert comparison.fair is None


@pytest.mark.parametrize(
    ("gain", "complaint"),
    [(0.9, "Below 0.97 at 1 of 1 points (1 with the whole 95 % interval)"), (0.98, "surely behind")],
)
def test_verdict_names_where_the_candidate_loses(gain: float, complaint: str) -> None:
    _, said = judged(gains(off=0.5, static=1.0, scheduler=gain))
    assert complaint in said
    assert re.search(rf"- gsm8k T=0 x1: {gain:.2f} \({gain:.2f}-{gain:.2f}\) against static", said)


def test_verdict_lists_lost_points_worst_first_and_sums_up_each_rival() -> None:
    loads = tuple(Load(concurrency=c) for c in (1, 2, 32))
    settings = settings_of(*ARMS, loads=loads)
    speeds = {1: (1.0, 1.6, 1.6), 2: (1.0, 1.2, 1.08), 32: (1.0, 0.7, 0.8)}  # off, static, scheduler
    runs = [
        one_by_one(arm.name, [2.0 / speed], point=POINT._replace(load=Load(concurrency=load)))
        for load, by_arm in speeds.items()
        for arm, speed in zip(ARMS, by_arm, strict=True)
    ]
    said = verdict(compare("scheduler", ("off", "static"), by_point(settings, runs)))
    assert "best of off, static: 0.80-1.00** (median 0.90, 3 points). Below 0.97 at 2 of 3 points" in said
    assert re.findall(r"- gsm8k T=0 (x\d+): ([\d.]+) .* against (\w+)", said) == [
        ("x32", "0.80", "off"),
        ("x2", "0.90", "static"),
    ]
    mean = (1.0 * 0.9 * 0.8 / 0.7) ** (1 / 3)
    assert f"- static: 0.90-1.14 over 3 points (geometric mean {mean:.2f}); at x32: 1.14-1.14" in said


def test_result_is_written_beside_its_table_and_plot_and_says_what_is_missing(tmp_path: Path) -> None:
    settings = settings_of(*ARMS, datasets=(Dataset("gsm8k"), Dataset("chat")))
    runs = gains(off=1.0, static=0.5, scheduler=0.9)
    file = ResultFile("figures", tmp_path / "results" / "figures.json")
    write_outcome(settings, runs, file, "A note.")
    content = json.loads(file.path.read_text())
    assert set(content) == {"name", "created", "command", "git", "seconds", "environment", "rows", "notes"}
    assert set(content["environment"]) == {"cpu", "cores", "gpu", "python", "torch", "sglang", "plugin"}
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", content["git"])
    assert "6 of 12 runs are missing. Points without any run: chat T=0 x1" in content["notes"]
    assert "Below 0.97 at 1 of 1 points" in content["notes"]
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["figures.json", "figures.md", "figures.png"]


def test_table_and_plot_show_every_summary(tmp_path: Path) -> None:
    counters = Counters(2, 2, 5, 12.0, {"propose": 0.0246, "verify": 0.0912})
    runs = [one_by_one("off", [2.0, 4.0]), one_by_one("static", [1.0, 2.0], counters=counters)]
    rows = rows_of(SETTINGS, runs, [])
    text = markdown("Figures", rows, None, "a note")
    assert "| gsm8k | 0 | x1 | off | 3.3 | 3.8 | - |" in text
    assert "| gsm8k | 0 | x1 | static | 6.7 | 7.5 | 2.00 (2.00-2.00) | 2.50 | 6.00 |" in text
    assert "| gsm8k | 0 | x1 | static | 2 | 12.3 | 45.6 |" in text
    assert "goodput" not in text, "a column without figures"
    plot_pareto(rows, tmp_path / "figures.png")
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")

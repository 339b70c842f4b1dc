"""The gate by itself, told advantages by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from dspark_serving.scheduler.gate import DraftGate, SlowRatio, TimeBias, regime


def step(gate: DraftGate, advantage: float, requests: int = 64, context: int = 1000, newcomers: int = 0) -> str:
    """One round whose outcome is known at once."""
    verdict = "off" if gate.rests(requests, context, newcomers) else str(gate.decide(advantage, requests, context))
    gate.observe(verdict in ("draft", "warm-up", "probe"))
    return verdict


def resting(requests: int = 64) -> DraftGate:
    gate = DraftGate()
    while step(gate, 0.5, requests) != "off":
        pass
    return gate


def test_warms_up_for_as_many_rounds_as_a_judgement_needs() -> None:
    for requests, rounds in ((1, 16), (16, 4), (64, 1), (256, 1)):
        gate = DraftGate()
        verdicts = [step(gate, 0.5, requests) for _ in range(rounds + 1)]
        assert verdicts == ["warm-up"] * rounds + ["off"]


def test_between_stop_and_start_it_stays_as_it_is() -> None:
    drafting = DraftGate()
    assert {step(drafting, 1.01) for _ in range(20)} == {"warm-up", "draft", "plain-probe"}
    # 1.01 is enough to go on but not to start again, even when a look is due or the load jumps.
    gate = resting()
    assert {step(gate, 1.01) for _ in range(60)} == {"off"}
    assert step(gate, 1.01, requests=128) == "off"
    assert step(gate, 1.10, requests=256) == "draft"


def test_looks_more_rarely_each_time_and_never_gives_up() -> None:
    gate = resting()
    looks = [i for i in range(6000) if step(gate, 0.5) == "probe"]
    gaps = [b - a for a, b in pairwise(looks)]
    assert gaps[:3] == [129, 257, 513]  # one round goes to the verdict on the look before
    assert set(gaps[3:]) == {513}


def test_newcomers_bring_the_next_look_forward_less_each_time_it_is_in_vain() -> None:
    gate = resting()
    verdicts = [step(gate, 0.5, newcomers=64) for _ in range(400)]
    looks = [i for i, verdict in enumerate(verdicts) if verdict == "probe"]
    assert looks[0] == 15
    assert [b - a for a, b in pairwise(looks)] == [33, 65, 65, 65, 65, 65]  # one round goes to the verdict
    while step(gate, 1.5, newcomers=64) != "draft":
        pass
    while step(gate, 0.5) != "off":
        pass
    assert [step(gate, 0.5, newcomers=64) for _ in range(16)].index("probe") == 15, "a success makes them early again"


def test_a_look_waits_for_a_round_without_new_requests_but_not_for_ever() -> None:
    gate = resting()
    for _ in range(15):
        step(gate, 0.5, newcomers=40)
    assert [step(gate, 0.5, newcomers=n) for n in (41, 42, 42)] == ["off", "off", "probe"]
    gate = resting()
    verdicts = [step(gate, 0.5, newcomers=40 + i) for i in range(120)]
    assert 16 <= verdicts.index("probe") <= 32


def test_a_promising_look_goes_on_until_it_is_sure() -> None:
    gate = resting(requests=8)
    while step(gate, 1.5, requests=8) != "probe":
        pass
    verdicts = [step(gate, 1.5, requests=8) for _ in range(10)]
    assert verdicts == ["probe"] * 7 + ["draft"] * 3


@pytest.mark.parametrize(("advantage", "first", "last"), [(0.9, 2, 6), (0.6, 0, 0)])
def test_one_unlucky_round_does_not_end_a_look_at_a_single_request(advantage: float, first: int, last: int) -> None:
    gate = resting(requests=1)
    while step(gate, 1.5, requests=1) != "probe":
        pass
    assert first <= [step(gate, advantage, requests=1) for _ in range(20)].index("off") <= last


def test_wrong_starts_by_prediction_ask_for_clearer_ones() -> None:
    gate, started = resting(), []
    for i in range(40):
        requests = 64 if i % 2 else 128
        if step(gate, 1.1, requests=requests) == "draft":
            started.append(i)
            while step(gate, 0.9, requests=requests) != "off":
                pass
    assert started[:3] == [0, 1, 2]  # asked for 2, 4 and 8 %
    assert len(started) == 3  # 16 % from there on


def test_a_look_whose_outcome_never_comes_is_given_up() -> None:
    gate = resting()
    while gate.rests(64, 1000, 0) or gate.decide(0.5, 64, 1000) != "probe":
        pass
    waits = 0
    while gate.rests(64, 1000, 0):
        waits += 1
    assert waits < 100
    assert gate.decide(0.5, 64, 1000) == "off"


def test_plain_decoding_is_tried_soon_at_each_load_and_then_more_rarely() -> None:
    gate = DraftGate()
    for requests in (64, 8):
        tries = [i for i in range(600) if step(gate, 1.5, requests) == "plain-probe"]
        assert tries[0] <= 5
        assert [b - a for a, b in pairwise(tries)] == [8, 16, 32, 64, 128, 256]
    assert "plain-probe" not in {step(gate, 2.5, 32) for _ in range(600)}, "a clear gain needs no proof"


def test_slow_ratio_starts_at_one_and_forgets() -> None:
    ratio = SlowRatio(strength=16.0, memory=100.0)
    assert ratio.value == 1.0
    for _ in range(100):
        ratio.observe(5.0, 10.0)
    assert ratio.value == pytest.approx(0.5, abs=0.08)
    for _ in range(100):
        ratio.observe(10.0, 10.0)
    assert ratio.value == pytest.approx(1.0, abs=0.02)


def test_one_hiccup_does_not_move_the_time_bias_far() -> None:
    bias = TimeBias(prior=2.0)
    for _ in range(100):
        bias.observe(3, 1.2, 1.0)
    assert bias.value(3) == pytest.approx(1.2, rel=0.01)
    bias.observe(3, 100.0, 1.0)
    assert bias.value(3) < 1.25


def test_the_time_bias_of_a_new_load_is_that_of_the_loads_around_it_until_it_is_met() -> None:
    bias = TimeBias(prior=2.0)
    assert bias.value(4) == 1.0
    for _ in range(150):
        bias.observe(0, 2.0, 1.0)
    assert bias.value(0) == pytest.approx(2.0, rel=0.03)
    assert bias.value(4) == pytest.approx(2.0, rel=0.1)
    for _ in range(150):
        bias.observe(5, 1.0, 1.0)
    assert bias.value(4) < 1.2, "the nearer load says more"
    for _ in range(150):
        bias.observe(4, 1.5, 1.0)
    assert [round(bias.value(load), 1) for load in (0, 4, 5)] == [2.0, 1.5, 1.0]


def test_one_slow_round_elsewhere_does_not_decide_at_a_new_load() -> None:
    """Found in a trace: two slow rounds of one request made plain decoding of sixteen look 1.8 times too slow."""
    bias = TimeBias(prior=0.5)
    for measured in (1.63, 1.43):
        bias.observe(regime(1, 1), measured, 1.0)
    assert 1.0 < bias.value(regime(16, 16)) < 1.1


def test_a_fast_round_is_believed_sooner_than_a_slow_one() -> None:
    slow, fast = TimeBias(prior=0.5), TimeBias(prior=0.5)
    slow.observe(3, 3.0, 1.0)
    fast.observe(3, 1.0, 3.0)
    assert slow.value(3) < 1.35
    assert fast.value(3) < 0.6


def test_a_sample_after_a_long_time_of_the_other_way_counts_more() -> None:
    fresh, doubted = TimeBias(prior=2.0), TimeBias(prior=2.0)
    for bias in (fresh, doubted):
        for _ in range(200):
            bias.observe(2, 1.0, 1.0)
    for _ in range(200):
        doubted.doubt(2)
    for bias in (fresh, doubted):
        bias.observe(2, 1.25, 1.0)
    assert fresh.value(2) < 1.02
    assert doubted.value(2) > 1.06


def test_plain_decoding_is_tried_again_soon_after_it_surprised() -> None:
    gate = DraftGate()
    tries = []
    for i in range(200):
        if step(gate, 1.5, 8) == "plain-probe":
            tries.append(i)
            if len(tries) == 3:
                gate.surprised(regime(8, 0))
    assert [b - a for a, b in pairwise(tries)][:5] == [8, 16, 4, 8, 16]


def test_a_rarely_seen_way_is_believed_sooner() -> None:
    rare, often = TimeBias(prior=0.5), TimeBias(prior=2.0)
    assert rare.observe(1, 0.7, 1.0) == often.observe(1, 0.7, 1.0) == pytest.approx(math.log(0.7))
    assert rare.value(1) < 0.8 < often.value(1)


def looks(gate: DraftGate, requests: int, rounds: int, lost: float) -> list[int]:
    """When a resting gate looks, each look being in vain and costing so many plain rounds."""
    found = []
    for i in range(rounds):
        verdict = "off" if gate.rests(requests, 1000, requests) else str(gate.decide(0.5, requests, 1000))
        drafted = verdict == "probe"
        gate.observe(drafted, lost if drafted else 0.0)
        if drafted:
            found.append(i)
    return found


def test_looks_take_a_small_share_of_the_time_however_dear_they_are() -> None:
    cheap, dear = looks(resting(), 64, 2000, 0.0), looks(resting(), 64, 2000, 3.0)
    assert max(b - a for a, b in pairwise(cheap)) < 80
    assert min(b - a for a, b in pairwise(dear)) >= 150
    assert len(dear) * 3.0 <= 0.02 * 2000 + 3.0


def test_what_looks_cost_a_large_batch_does_not_keep_a_small_one_from_looking() -> None:
    gate = resting()
    looks(gate, 64, 40, 8.0)
    assert looks(gate, 4, 100, 0.0)

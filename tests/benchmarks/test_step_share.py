"""What the profiler's figures say of whose time it was."""

from __future__ import annotations

import cProfile
import pstats

import step_share

from vllm_ppow.acceptance import AcceptanceEstimate


def test_time_in_our_functions_and_in_what_is_built_in_below_them_is_ours():
    ours, theirs = (
        (f"{step_share.OURS}/window.py", 1, "choose"),
        ("/elsewhere/vllm/scheduler.py", 2, "schedule"),
    )
    stats = {
        ours: (5, 5, 1.0, 9.0, {theirs: (5, 5, 1.0, 9.0)}),
        theirs: (5, 5, 20.0, 30.0, {}),
        ("~", 0, "<built-in method max>"): (
            7,
            7,
            5.0,
            5.0,
            {ours: (2, 2, 2.0, 2.0), theirs: (5, 5, 3.0, 3.0)},
        ),
        ("/elsewhere/vllm/worker.py", 3, "wrapped"): (1, 1, 4.0, 4.0, {ours: (1, 1, 4.0, 4.0)}),
    }
    assert step_share.seconds_of_ours(stats) == 3.0


def test_a_real_profile_is_read():
    estimate, profiler = AcceptanceEstimate(4), cProfile.Profile()

    def work():
        for _ in range(200):
            estimate.observe(4, 2)
            sum(estimate.promises())

    profiler.runcall(work)
    stats = pstats.Stats(profiler)
    assert 0.3 * stats.total_tt < step_share.seconds_of_ours(stats.stats) < stats.total_tt

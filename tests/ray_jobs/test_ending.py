"""What a job and its workers tell each other: how far a run was when its workers were lost, and who left for what."""

from __future__ import annotations

from ray_jobs._ending import Bell


def test_what_is_trained_again_is_what_lies_beyond_the_checkpoint() -> None:
    bell = Bell()
    assert bell.begin(0) == 0
    bell.at(1120)
    assert bell.begin(960) == 160
    assert bell.begin(960) == 0  # lost before their first line: nothing more is trained again
    bell.at(1280)
    assert bell.begin(1280) == 0  # after a notice


def test_workers_give_up_one_by_one_and_the_first_one_s_reason_is_told() -> None:
    bell = Bell()
    assert bell.hopeless() is None
    assert [bell.give_up(1, "no bitsandbytes", "line 1"), bell.give_up(1, "no bitsandbytes", "line 1")] == [1, 1]
    assert bell.give_up(0, "too late", "line 2") == 2
    assert bell.hopeless() == ("no bitsandbytes", "line 1")


def test_workers_that_left_for_a_notice_have_not_answered_a_stop() -> None:
    bell = Bell()
    bell.begin(0)
    bell.leave("1120 images seen")
    assert not bell.ring(), "the next ones have not begun"
    bell.begin(1120)
    assert bell.ring()
    assert (bell.rung(), bell.left()) == (True, "")
    bell.leave("1440 images seen")
    assert bell.left() == "1440 images seen"


def test_while_workers_wait_for_gpus_nobody_would_hear_a_stop() -> None:
    assert not Bell().ring()

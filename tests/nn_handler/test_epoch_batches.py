"""The batches of an epoch, step by step, also after the data of a rank has failed."""

from __future__ import annotations

from shardckpt.nn_handler.epoch_batches import EpochBatches


def fails_after(count: int):
    yield from range(count)
    raise OSError("planted")


def steps(batches: EpochBatches, count: int, *, agreed: bool = False) -> list[list[int]]:
    return [batches.for_step(agreed=agreed) for _ in range(count)]


def test_an_epoch_is_divided_into_steps():
    batches = EpochBatches(iter(range(5)), per_step=2, count=5)
    assert steps(batches, 4) == [[0, 1], [2, 3], [4], []]
    assert (batches.failure, batches.repeats) == (None, 0)


def test_a_rank_whose_data_failed_uses_its_last_batches_again():
    batches = EpochBatches(fails_after(3), per_step=2, count=7)
    assert steps(batches, 5) == [[0, 1], [2, 0], [2, 0], [2], []]
    assert str(batches.failure) == "planted"
    assert batches.repeats == 4


def test_nothing_is_repeated_before_an_agreement_of_the_ranks():
    batches = EpochBatches(fails_after(3), per_step=2, count=7)
    assert steps(batches, 3, agreed=True) == [[0, 1], [2], []]
    assert isinstance(batches.failure, OSError)
    assert batches.repeats == 0


def test_nothing_is_repeated_if_the_ranks_may_have_other_numbers_of_batches():
    batches = EpochBatches(fails_after(1), per_step=1, count=None)
    assert steps(batches, 3) == [[0], [], []]
    assert isinstance(batches.failure, OSError)
    assert batches.repeats == 0


def test_data_that_fail_at_once_give_no_batch_to_repeat():
    batches = EpochBatches(fails_after(0), per_step=2, count=4)
    assert steps(batches, 2) == [[], []]
    assert isinstance(batches.failure, OSError)

"""torchft: one of the replica groups writes; resumed in new processes.

The first tests have a stand-in for the Manager. The others train with torchft itself.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.errors import CheckpointBusyError, LoadMismatchError, StateError
from shardckpt.integrations.torchft import resume
from tests.integrations.jobs import start_job
from tests.ranks import PRELOAD

JOB = Path(__file__).parent / "torchft_job.py"
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]


class Manager:
    """The methods of torchft.Manager that are used, for a group of one rank."""

    def __init__(self, rank=0):
        self.rank, self.step = rank, 0

    def current_step(self):
        return self.step

    def participating_rank(self):
        return self.rank

    def state_dict(self):
        return {"step": self.step, "batches_committed": 2 * self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def group(folder, rank=0, **options):
    """A replica group: its manager, its weight, and its checkpoints."""
    manager, weight = Manager(rank), torch.zeros(3)
    return manager, weight, resume(manager, folder, {"weight": weight}, **options)


def saved_at(group, *steps, every=1):
    """Commit steps in a group. Returns those that it saved."""
    manager, weight, checkpoints = group
    found = []
    for step in steps:
        manager.step = step
        weight.fill_(step)
        found += [one.step for one in [checkpoints.save(every=every)] if one is not None]
    return found


def steps(folder):
    return shardckpt.CheckpointManager(folder).all_steps()


def test_the_first_group_of_the_quorum_saves_steps_that_were_committed(tmp_path):
    writer, other = group(tmp_path), group(tmp_path, rank=1)
    joining = group(tmp_path, rank=None)
    assert saved_at(writer, 1, 2, 2, 3, 4, 4, every=2) == [2, 4]
    assert saved_at(other, 1, 2, 3, 4, every=2) == saved_at(joining, 4) == []
    manager, weight, checkpoints = group(tmp_path)
    assert manager.step == checkpoints.restored.step == 4
    assert weight.tolist() == [4, 4, 4]
    assert saved_at((manager, weight, checkpoints), 4) == []


def test_a_step_that_was_not_committed_is_not_saved_by_the_next_writer(tmp_path):
    first, second = group(tmp_path), group(tmp_path, rank=1)
    assert saved_at(first, 4, every=4) == [4]
    assert saved_at(second, 4, every=4) == []
    second[0].rank = 0  # the first group has left, and the next step failed
    assert saved_at(second, 4, every=4) == []


def test_the_next_writer_saves_at_once_if_the_step_is_missing(tmp_path):
    first, second = group(tmp_path), group(tmp_path, rank=1)
    assert saved_at(second, 1, 2, 3, 4, 5, every=4) == []
    assert saved_at(first, 1, 2, 3, 4, every=4) == [4]
    second[0].rank = 0
    assert saved_at(second, 6, 7, every=4) == []  # the first one had saved step 4
    assert saved_at(first, 5, 6, 7, 8, every=8) == [8]
    assert saved_at(second, 9, every=8) == []
    assert saved_at(first, 15, every=8) == []
    second[0].rank = 1
    assert saved_at(second, 16, every=8) == []
    second[0].rank = 0
    assert saved_at(second, 17, 18, every=8) == [17]
    assert steps(tmp_path) == [4, 8, 17]


def test_a_step_that_others_repeated_is_replaced(tmp_path):
    first, second = group(tmp_path), group(tmp_path)
    assert saved_at(first, 1) == [1]
    second[0].step = 1
    second[1].fill_(7)
    assert second[2].save().step == 1
    assert shardckpt.load_state(tmp_path / "step-1")["weight"].tolist() == [7, 7, 7]


@pytest.mark.parametrize("tolerate", [0, 1])
def test_two_groups_never_write_one_path_at_once(tmp_path, monkeypatch, tolerate):
    """The second group saves the step while the first one still writes it."""
    first, second = group(tmp_path), group(tmp_path, tolerate=tolerate)
    commit = shardckpt.saving.pipeline.commit
    failures = []

    def slow(*arguments):
        monkeypatch.setattr(shardckpt.saving.pipeline, "commit", commit)
        try:
            assert saved_at(second, 1) == [1]
        except CheckpointBusyError as error:
            failures.append(error)
        return commit(*arguments)

    monkeypatch.setattr(shardckpt.saving.pipeline, "commit", slow)
    if tolerate:
        with pytest.warns(UserWarning, match="Another save to this path is running"):
            assert saved_at(first, 1) == [1]
    else:
        assert saved_at(first, 1) == [1]
    assert len(failures) == 1 - tolerate
    shardckpt.verify(tmp_path / "step-1")
    assert saved_at(second, 2) == [2]


def test_retention_removes_the_checkpoints_of_other_groups(tmp_path):
    keep = [shardckpt.KeepLast(2)]
    first, second = group(tmp_path, keep=keep), group(tmp_path, keep=keep)
    saved_at(first, 1, 2, 3)
    saved_at(second, 4)
    assert steps(tmp_path) == [3, 4]


def test_each_group_gets_its_own_state_of_the_checkpoint_or_before(tmp_path):
    def groups(*ranks):
        states = [{"position": 10 * number} for number, _ in enumerate(ranks)]
        return states, [
            group(tmp_path, rank, replica_id=number, replica_state=states[number])
            for number, rank in enumerate(ranks)
        ]

    states, (first, second) = groups(0, 1)
    for step in range(1, 6):
        states[0]["position"] += 1
        states[1]["position"] += 1
        saved_at(first, step, every=2)
        if step < 4:
            saved_at(second, step, every=2)
    states, _ = groups(0, 1)
    assert states == [{"position": 4}, {"position": 12}]
    shutil.rmtree(tmp_path / "step-4")
    states, _ = groups(0, 1)
    assert states == [{"position": 2}, {"position": 12}]


def test_the_folder_may_be_in_an_object_store(tmp_path):
    folder, own = f"memory:/{tmp_path}", {"position": 7}
    assert saved_at(group(folder, replica_id=0, replica_state=own), 1, 2) == [1, 2]
    own["position"] = 0
    manager, weight, _ = group(folder, replica_id=0, replica_state=own)
    assert (manager.step, weight.tolist(), own) == (2, [2, 2, 2], {"position": 7})


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({"torchft": 1}, {}, "Invalid state for checkpoints with torchft"),
        ([], {}, "Invalid state for checkpoints with torchft"),
        ({}, {"replica_id": 1}, "needs its name"),
        ({}, {"replica_state": {}}, "needs its name"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, state, options, message):
    with pytest.raises(StateError, match=message):
        resume(Manager(), tmp_path, state, **options)


def test_the_remedy_of_a_mismatch_works_in_the_call(tmp_path):
    saved_at(group(tmp_path), 1)
    state = {"weight": torch.zeros(3), "bias": torch.zeros(3)}
    with pytest.raises(LoadMismatchError) as refused:
        resume(Manager(), tmp_path, state)
    assert "shardckpt.load(state, path, strict=False)" in refused.value.remedy
    assert shardckpt.load(state, tmp_path / "step-1", strict=False).missing == ("bias",)
    assert state["weight"].tolist() == [1, 1, 1]
    assert resume(Manager(), tmp_path / "new", state).restored is None


def test_an_invalid_interval_is_refused(tmp_path):
    with pytest.raises(StateError, match="Invalid value for every"):
        group(tmp_path)[2].save(every=0)


@pytest.fixture
def train(tmp_path):
    """Trains with replica groups, and returns what each printed, or why it printed nothing."""
    pytest.importorskip("torchft")
    from torchft.coordination import LighthouseServer

    PRELOAD.append("torchft")
    lighthouses = []

    def run(name, steps, *options, ranks=1, first=(), second=(), back=False, join_ms=10000):
        lighthouse = LighthouseServer(
            bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=join_ms, heartbeat_timeout_ms=1000
        )
        lighthouses.append(lighthouse)
        port = lighthouse.address().rsplit(":", 1)[1]

        def start(number, *more):
            arguments = [number, tmp_path / name, steps, port, *options, *more]
            return start_job(JOB, *arguments, ranks=ranks)

        others = range(1, 3 if "three" in options else 2)
        groups = [start(0, *first), *(start(number, *second) for number in others)]
        if back:
            groups[0].wait(60.0)
            while not (tmp_path / f"{name}-{steps}-1-at-9").exists():
                time.sleep(0.01)
            groups[0] = start(0, "back")
        results = [group.wait(60.0)[0] for group in groups]
        return [json.loads(text.splitlines()[-1]) if ok else text for ok, text in results]

    yield run
    for lighthouse in lighthouses:
        lighthouse.shutdown()


@pytest.mark.parametrize("options", [(), ("async",)])
def test_one_group_writes_and_all_resume_at_its_step(tmp_path, train, options):
    complete = train("complete", 8)
    train("run", 6, "position", *options)
    assert steps(tmp_path / "run") == [4]
    resumed = train("run", 8, "position", *options)
    assert [one["saved"] for one in resumed] == [[8], []]
    assert [one["first"] for one in resumed] == [4, 4]
    assert [one["position"] for one in resumed] == [4, 4]
    assert {one["digest"] for one in resumed} == {one["digest"] for one in complete}
    assert {one["batches"] for one in resumed} == {16}
    assert shardckpt.load_state(tmp_path / "run" / "step-8")["torchft"]["step"] == 8


def test_the_ranks_of_a_group_write_shards_and_one_rank_resumes_them(tmp_path, train):
    complete = train("complete", 8, ranks=2)
    train("run", 6, ranks=2)
    assert shardckpt.metadata(tmp_path / "run" / "step-4").world_size == 2
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    resumed = train("run", 8, ranks=2)
    assert {one["digest"] for one in resumed} == {one["digest"] for one in complete}
    one_rank = train("one", 8)
    assert one_rank[0]["sum"] == pytest.approx(complete[0]["sum"], rel=1e-4)


@pytest.mark.parametrize(
    ("death", "saved"),
    [("die-at-6", [4, 8]), ("die-in-save-4", [5, 8]), ("die-in-save-8", [4, 9])],
)
def test_another_group_writes_after_the_writer_died(tmp_path, train, death, saved):
    complete = train("complete", 12, "same")
    died, survivor = train("run", 10, "same", first=[death])
    assert "exit code -9" in died
    assert survivor["saved"] == saved[-len(survivor["saved"]) :] != []
    assert steps(tmp_path / "run") == saved
    shardckpt.verify(tmp_path / "run" / f"step-{saved[0]}")
    resumed = train("run", 12, "same")
    assert [one["first"] for one in resumed] == [saved[-1]] * 2
    assert {one["digest"] for one in resumed} == {complete[0]["digest"]}


def test_a_group_that_comes_back_takes_part_and_writes_again(tmp_path, train):
    complete = train("complete", 40, "same")
    options = {"first": ["die-at-6"], "second": ["wait-at-9"], "back": True}
    back, survivor = train("run", 40, "same", "position", **options)
    assert (back["first"], back["position"]) == (8, 4)
    assert (survivor["saved"][0], back["saved"][-1]) == (8, 40)
    assert sorted(survivor["saved"] + back["saved"]) == list(range(8, 41, 4))
    assert back["digest"] == survivor["digest"] == complete[0]["digest"]


def test_the_others_train_on_while_the_writer_takes_long(tmp_path, train):
    complete = train("complete", 12, "same", "three")
    options = {"first": ["slow-save-4"], "second": ["wait-at-9"], "join_ms": 300}
    slow, *others = train("run", 12, "same", "three", **options)
    assert slow["saved"][0] == 4
    assert [one["saved"][:2] for one in others] == [[5, 8], []]  # step 4 was missing
    assert steps(tmp_path / "run") == [4, 5, 8, 12]
    assert len({one["digest"] for one in [slow, *others]}) == 1
    assert slow["sum"] == pytest.approx(complete[0]["sum"], rel=1e-4)  # thirds are not exact

"""A source with the names, shapes and dtypes of the tensors of another checkpoint."""

from __future__ import annotations

import pytest
import torch

from shardckpt import errors
from shardckpt.convert.like import Like
from shardckpt.convert.sources import foreign

MODEL = {"head": torch.zeros(2, 3, dtype=torch.bfloat16), "step": torch.tensor(0)}


def source(state):
    return foreign("source", "a test", state)


def test_the_tensors_of_the_other_checkpoint_are_read_in_its_dtypes():
    state = {"extra": torch.ones(1), "head": torch.ones(2, 3), "step": torch.tensor(7), "lr": 0.1}
    with Like(source(state), foreign("model", "a test", MODEL)) as like:
        assert list(like.manifest.tensors) == ["head", "step"]
        read = like.read_box("head", (0, 0), (2, 2))
        assert torch.equal(read, torch.ones(2, 2, dtype=torch.bfloat16))
        assert like.read_box("step", (), ()) == 7
        assert like.origin.left_out.keys() == {"extra", "lr"}


@pytest.mark.parametrize(
    ("state", "actual"),
    [
        ({"step": torch.tensor(0)}, "head: absent"),
        ({"head": torch.ones(3, 2), "step": torch.tensor(0)}, "head: .*3, 2"),
        ({"head": torch.ones(2, 3), "step": torch.tensor(0.0)}, "step: "),
    ],
)
def test_a_source_without_these_tensors_is_an_error(state, actual):
    with pytest.raises(errors.LoadMismatchError, match=actual):
        Like(source(state), foreign("model", "a test", MODEL))

"""Tensors of devices are copied to host memory in pieces, one buffer ahead of the one in use."""

from __future__ import annotations

import pytest
import torch

from shardckpt.errors import UnsupportedLeafError
from shardckpt.io import devices, downloads
from shardckpt.saving import shard_writer
from tests.device_states import (
    MIB,
    File,
    image,
    produced,
    samples,
    values,
    written,
)
from tests.stand_in_device import DEVICES, to_device


def test_a_shard_has_the_bytes_that_were_submitted_before_the_save(machine):
    state = samples()
    assert written(produced(machine, state).values(), image(state.values()))


def test_tensors_of_cpu_and_devices_share_a_shard_in_order(machine):
    state = samples()
    mixed = {**state, **produced(machine, {n: state[n] for n in ("large", "tiny", "wide")})}
    assert written(mixed.values(), image(state.values()))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[::3],
        lambda t: t[1:2, 1:],
        lambda t: torch.view_as_complex(t[:, :1000].reshape(-1, 2)).conj(),
    ],
    ids=["turned", "strided", "cut", "conjugate"],
)
def test_views_of_devices_are_written_as_their_elements(machine, view):
    plain = values(8, 3000, 1001)
    there = produced(machine, {"t": plain})["t"]
    assert written([view(there)], image([view(plain).resolve_conj()]))


def test_work_of_another_stream_of_the_caller_comes_first(machine):
    with machine.new_stream(DEVICES[0]):
        state = samples()
        assert written(produced(machine, {"w": state["wide"]}).values(), image([state["wide"]]))


def test_one_buffer_is_copied_ahead_of_the_one_in_use(late):
    parts = {str(n): values(n, 2 * MIB) for n in range(4)}
    there = [to_device(tensor) for tensor in parts.values()]
    pieces = downloads.host_pieces(there, devices.submitted_work())
    next(pieces)
    assert len(late.locked) == 2
    (stream,) = late.streams
    assert len(stream.work) == 2  # the second buffer: its copy, and its event
    pieces.close()
    assert not stream.work


def test_small_tensors_share_a_buffer(late):
    there = [to_device(values(n, 100)) for n in range(50)]
    (piece,) = downloads.host_pieces(there, devices.submitted_work())
    assert piece.nbytes == 50 * 400
    assert sum(entry[0] == "reached" for entry in late.log) == 2  # the piece, and the end


def test_a_failed_write_leaves_no_copy_in_a_buffer(late):
    class Full(File):
        def write(self, view, *, offset):
            raise OSError("full")

    there = [to_device(values(n, 3 * MIB)) for n in range(5)]
    with pytest.raises(OSError, match="full"):
        shard_writer.write_shard(Full(1), header=b"", tensors=there)
    assert not any(stream.work for stream in late.streams)


def test_memory_that_is_gone_is_refused(late):
    tensor = torch.ones(9)
    there = to_device(tensor)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedLeafError):
        list(downloads.host_pieces([there], {}))


def test_a_device_without_a_mark_is_waited_for(late):
    there = produced(late, {"w": values(1, 9)})
    (piece,) = downloads.host_pieces(there.values(), {})
    assert piece.numpy().tobytes() == image([values(1, 9)])

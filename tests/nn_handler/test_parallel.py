"""The layout of a job, and the collectives of training."""

from __future__ import annotations

import datetime
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardckpt import NNHandler, errors
from shardckpt.nn_handler.parallel import (
    Layout,
    are_finite,
    average_gradients,
    checked_device,
    clip_gradients,
    gathered,
    join_ranks,
    largest,
    mean_over_ranks,
    synchronize_buffers,
    synchronize_gradients,
    wrap,
)
from tests.nn_handler.models import Net, NormNet


def test_an_unknown_parallel():
    with pytest.raises(errors.StateError, match="parallel"):
        NNHandler(Net, parallel="magic")


@pytest.fixture
def group_of_one():
    """A process group of this process alone."""
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    yield
    dist.destroy_process_group()


def alone(**options) -> Layout:
    return Layout(mode="none", device=torch.device("cpu"), **options)


def with_gradients(*gradients: list[float] | None) -> list[nn.Parameter]:
    found = [nn.Parameter(torch.zeros(2)) for _ in gradients]
    for parameter, gradient in zip(found, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    return found


def test_without_a_launcher_there_is_one_process():
    layout = join_ranks("auto", "cpu", options={"bucket_cap_mb": 3}, buffers="mean")
    assert (layout.mode, layout.rank, layout.data) == ("none", 0, (0, 1))
    assert (layout.options, layout.buffers) == ({"bucket_cap_mb": 3}, "mean")


def test_auto_is_ddp_in_a_process_group(group_of_one):
    assert join_ranks("auto", "cpu").mode == "ddp"
    assert join_ranks("fsdp", "cpu").mode == "fsdp"
    assert join_ranks("none", "cpu").mode == "none"


@pytest.mark.parametrize(
    ("options", "text", "actual"),
    [
        ({"parallel": "dp"}, "Unknown value for parallel", "'dp'"),
        ({"buffers": "sum"}, "Unknown value for buffers", "'sum'"),
        ({"tp_plan": {}}, "mesh does not fit", "dimensions (), parallel='auto'"),
        ({"mesh": ("x",)}, "mesh does not fit", "dimensions ('x',), parallel='auto'"),
        ({"mesh": None}, "mesh does not fit", "dimensions (), parallel='auto'"),
        (
            {"mesh": ("dp",), "parallel": "ddp"},
            "mesh does not fit",
            "dimensions ('dp',), parallel='ddp'",
        ),
        (
            {"mesh": ("dp",), "tp_plan": {}},
            "mesh does not fit",
            "dimensions ('dp',), parallel='auto'",
        ),
        ({"options": {"wrap": ()}}, "Unknown parallel_options for ddp", "wrap"),
        (
            {"options": {"wrap": (), "gradients": 1}, "parallel": "fsdp"},
            "Unknown parallel_options for fsdp",
            "gradients",
        ),
    ],
)
def test_wrong_arguments_are_refused(options, text, actual):
    if "mesh" in options:
        options = {**options, "mesh": SimpleNamespace(mesh_dim_names=options["mesh"])}
    with pytest.raises(errors.StateError, match=text) as caught:
        join_ranks(options.pop("parallel", "auto"), "cpu", **options)
    assert caught.value.actual == actual


def test_devices_are_checked():
    assert checked_device("meta") == torch.device("meta")
    assert checked_device(torch.device("cpu")).type == "cpu"
    for wrong in ("gpu", 3, ["cpu"]):
        with pytest.raises(errors.StateError, match="Invalid device") as caught:
            checked_device(wrong)
        assert caught.value.actual.startswith(f"{wrong!r}: ")
        assert "by name" in caught.value.remedy
    with pytest.raises(errors.StateError, match="does not exist on this machine") as caught:
        checked_device("cuda:99")
    assert caught.value.actual == "cuda:99"


def test_means_are_sums_by_counts():
    assert mean_over_ranks({"a": (6.0, 4.0), "b": (0.0, 1.0)}) == {"a": 1.5, "b": 0.0}
    assert math.isnan(mean_over_ranks({"a": (0.0, 0.0)})["a"])
    assert mean_over_ranks({}) == {}


def test_one_process_exchanges_nothing():
    value = object()
    assert gathered(value, alone()) == [value]
    assert largest([3, -2]) == [3, -2]


def test_a_collective_in_a_group_gives_the_numbers_back(group_of_one):
    assert largest([3, -2]) == [3, -2]
    layout = Layout(mode="ddp", device=torch.device("cpu"))
    assert gathered("a", layout) == ["a"]


def test_gradients_are_clipped_by_the_norm_of_all_of_them():
    parameters = with_gradients([3.0, 0.0], None, [0.0, 4.0])
    clip_gradients(parameters, 10.0)
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[3.0, 0.0], [0.0, 4.0]]
    clip_gradients(parameters, 1.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-5)
    assert parameters[2].grad.tolist() == pytest.approx([0.0, 0.8], abs=1e-5)
    clip_gradients(with_gradients(None), 1.0)  # nothing to clip


@pytest.mark.parametrize(
    ("gradients", "finite"),
    [
        (([1.0, 2.0], [3.0, 4.0]), True),
        (([1.0, 2.0], [math.inf, 4.0]), False),
        (([math.nan, 2.0], None), False),
        ((None, None), True),
    ],
)
def test_gradients_that_are_not_finite_are_found(gradients, finite):
    assert are_finite(with_gradients(*gradients)) is finite


def test_the_average_over_ranks_skips_what_is_not_trained(group_of_one):
    one, other, frozen = with_gradients([2.0, 4.0], None, None)
    frozen.requires_grad_(False)
    assert average_gradients([one, other, frozen]) == [True, False]
    assert one.grad.tolist() == [2.0, 4.0]
    assert other.grad is None


def test_an_average_without_a_group_only_looks_for_gradients():
    assert average_gradients(with_gradients([1.0, 2.0], None)) == [True, False]
    assert average_gradients([]) == []


def test_a_model_on_the_meta_device_is_not_wrapped():
    with torch.device("meta"):
        model = Net()
    assert wrap(model, Layout(mode="ddp", device=torch.device("cpu"))) is model
    assert model.head.weight.is_meta


def test_ddp_wraps_a_model_only_if_it_is_trained(group_of_one):
    layout = Layout(mode="ddp", device=torch.device("cpu"))
    wrapped = wrap(Net(), layout)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    assert not wrapped.find_unused_parameters
    assert wrap(Net(), layout, find_unused=True).find_unused_parameters
    asked = Layout(
        mode="ddp", device=torch.device("cpu"), options={"find_unused_parameters": False}
    )
    assert not wrap(Net(), asked, find_unused=True).find_unused_parameters
    frozen = Net().requires_grad_(False)
    assert wrap(frozen, layout) is frozen


def test_ddp_leaves_the_average_of_gradients_to_the_last_batch(group_of_one):
    model = wrap(Net(), Layout(mode="ddp", device=torch.device("cpu")))
    for now in (False, True):
        synchronize_gradients(model, now=now)
        assert model.require_backward_grad_sync is now
    static = Layout(mode="ddp", device=torch.device("cpu"), options={"static_graph": True})
    model = wrap(Net(), static)
    synchronize_gradients(model, now=False)
    assert model.require_backward_grad_sync  # torch needs it in the first backward pass
    synchronize_gradients(Net(), now=False)  # a model without a wrapper has nothing to set


@pytest.mark.parametrize("buffers", ["rank0", "mean"])
def test_buffers_of_every_dtype_and_shape_get_their_own_values_back(group_of_one, buffers):
    model = NormNet()
    model.register_buffer("empty", torch.zeros(0, 4))
    model.register_buffer("scalar", torch.tensor(3.5, dtype=torch.float64))
    model.body[1].running_mean.copy_(torch.arange(8.0))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    layout = Layout(mode="ddp", device=torch.device("cpu"), buffers=buffers)
    synchronize_buffers(model, layout)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

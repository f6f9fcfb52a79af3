"""Tensors that own their memory, and tensors that do not."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from shardckpt.errors import UnsupportedLeafError
from shardckpt.io.tensor_memory import address_of, check_memory, owns_memory, plain_address


def freed() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def truncated(view: slice) -> torch.Tensor:
    """A view whose storage was cut to half of its size."""
    tensor = torch.ones(8)
    part = tensor[view]
    tensor.untyped_storage().resize_(16)
    return part


OWNED = {
    "plain": lambda: torch.ones(2, 3),
    "a view": lambda: torch.ones(4, 4)[1:3, ::2],
    "expanded": lambda: torch.ones(1).expand(100),
    "empty": lambda: torch.empty(0, 3),
    "before the end of a cut storage": lambda: truncated(slice(0, 4)),
}
NOT_OWNED = {
    "freed": freed,
    "beyond the end of its storage": lambda: truncated(slice(2, 6)),
    "strided beyond the end": lambda: truncated(slice(0, 8, 3)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "a wrapper": lambda: TwoTensor(torch.ones(2), torch.ones(2)),
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(3)),
}


@pytest.mark.parametrize("name", OWNED)
def test_a_tensor_with_all_its_elements_in_its_storage_owns_its_memory(name):
    tensor = OWNED[name]()
    assert owns_memory(tensor)
    check_memory(tensor)
    assert address_of(tensor) == tensor.data_ptr()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", NOT_OWNED)
def test_a_tensor_without_its_elements_is_refused_by_name(name):
    tensor = NOT_OWNED[name]()
    assert not owns_memory(tensor)
    with pytest.raises(UnsupportedLeafError, match="does not own memory") as caught:
        check_memory(tensor, name="layer.w")
    assert caught.value.tensor == "layer.w"
    assert type(tensor).__qualname__ in caught.value.actual
    with pytest.raises(UnsupportedLeafError):
        address_of(tensor)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.ones(4), True),
        (lambda: torch.ones(4)[2:], True),
        (freed, False),
        (lambda: truncated(slice(0, 4)), True),
        (lambda: truncated(slice(1, 5)), False),
    ],
)
def test_the_fast_check_of_plain_tensors_agrees(make, expected):
    tensor = make()
    assert plain_address(tensor) == (tensor.data_ptr() if expected else 0)
    assert owns_memory(tensor) == expected


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("make", NOT_OWNED.values(), ids=NOT_OWNED)
def test_no_other_tensor_has_a_plain_address(make):
    assert plain_address(make()) == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse CSR")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(4, 4).T,
        lambda: torch.ones(0, 3),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.eye(3).to_mkldnn(),
    ],
)
def test_tensors_of_other_layouts_have_no_plain_address(make):
    assert plain_address(make()) == 0

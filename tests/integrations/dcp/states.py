"""A nested state for the interfaces of DCP."""

from __future__ import annotations

import torch


def a_state(scale: float = 1.0):
    return {
        "w": torch.arange(12.0).reshape(3, 4) * scale,
        "half": torch.ones(5, dtype=torch.bfloat16) * scale,
        "nested": {"list": [1, 2, torch.ones(3) * scale], "pair": (1, "b"), "bytes": b"x"},
    }


def zeros():
    return {
        "w": torch.zeros(3, 4),
        "half": torch.zeros(5, dtype=torch.bfloat16),
        "nested": {"list": [0, 0, torch.zeros(3)], "pair": (0, ""), "bytes": b""},
    }


def is_full(state) -> bool:
    expected = a_state()
    return (
        torch.equal(state["w"], expected["w"])
        and torch.equal(state["half"], expected["half"])
        and torch.equal(state["nested"]["list"][2], torch.ones(3))
        and state["nested"]["list"][:2] == [1, 2]
        and state["nested"]["pair"] == (1, "b")
        and state["nested"]["bytes"] == b"x"
    )

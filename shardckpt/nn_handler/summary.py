"""Describe a handler as text."""

from __future__ import annotations

from torch import nn

from shardckpt.nn_handler.training_state import TrainingState

__all__ = ["summary"]


def summary(handler: TrainingState) -> str:
    """List the parts of the model with their parameters and sizes, then the other parts."""
    module = handler.module
    rows = [(name, child) for name, child in module.named_children()]
    lines = [f"NNHandler({type(module).__name__}, {handler.device}, parallel={handler.parallel})"]
    lines += [f"  {name:<20} {type(m).__name__:<20} {_size(m)}" for name, m in rows]
    lines.append(f"  {'all':<41} {_size(module)}")
    loss = handler.loss_fn
    parts = {
        "optimizer": ", ".join(type(one).__name__ for one in handler.optimizers.values()),
        "scheduler": ", ".join(type(one.torch).__name__ for one in handler.schedulers.values()),
        "loss": getattr(loss, "__name__", type(loss).__name__) if loss else None,
        "metrics": ", ".join(handler.metrics),
        "callbacks": ", ".join(type(callback).__name__ for callback in handler.callbacks),
        "ema": handler.ema and f"decay {handler.ema.decay}",
        "auto_saver": handler.auto_saver and handler.auto_saver.folder,
    }
    lines += [f"  {name}: {text}" for name, text in parts.items() if text]
    return "\n".join([*lines, f"  epoch {handler.epoch}, step {handler.step}"])


def _size(module: nn.Module) -> str:
    parameters = list(module.parameters())
    count = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    mib = sum(p.numel() * p.element_size() for p in parameters) / 2**20
    return f"{count:,} parameters, {trained:,} trainable, {mib:.2f} MiB"

"""Run PyTorch's tests of DCP with the classes of shardckpt in place of DCP's own."""

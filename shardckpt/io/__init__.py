"""Buffers, threads, memory and devices, which reading and writing share."""

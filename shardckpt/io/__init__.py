"""Buffers, threads, memory and devices, shared by reading and writing."""

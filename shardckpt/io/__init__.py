"""Buffers, threads and devices that reading and writing share."""

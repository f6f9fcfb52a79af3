"""Staging, writing and reading: buffers, threads, devices."""

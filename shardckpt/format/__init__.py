"""The format on disk: bytes to dataclasses and back, without any I/O. See docs/format.md."""

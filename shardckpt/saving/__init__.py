"""The stages of a save."""

"""What goes wrong with a model before it runs."""

from __future__ import annotations


class ModelLoadError(ValueError):
    """A model is missing, unreadable or of a kind this engine cannot run. The message says what was expected."""

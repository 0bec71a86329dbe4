"""For every test."""

import launch  # noqa: F401  # sets what Ray reads once, when it is first imported, so before any test module does

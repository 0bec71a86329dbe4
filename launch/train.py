"""`python -m launch.train RECIPE [OVERRIDES...]`: the train command for `ray job submit --working-dir .`.

Ray runs it with the tree it was sent, where the `sequencematch` script is not installed.
"""

from __future__ import annotations

import sys

from launch.cli import app
from launch.surroundings import use_utf8

if __name__ == "__main__":
    use_utf8()
    app(["train", *sys.argv[1:]])

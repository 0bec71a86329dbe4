"""Ray as a run meets it: connecting, what a run needs of it, and the capacity it reserves."""

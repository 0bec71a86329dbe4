"""Ray as a run meets it: connecting, which process goes to which node, room for them."""

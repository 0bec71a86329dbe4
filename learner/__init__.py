"""The learner: model, state tree, objectives, training loop, checkpoints."""

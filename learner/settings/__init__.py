"""What a recipe says of model, objective, optimizer and stages; no torch is imported, as the command line reads it."""

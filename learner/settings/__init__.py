"""What a recipe says of model, objective, optimizer and stages. Without torch: the command line reads it at once."""

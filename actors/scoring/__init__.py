"""Rewards and features of finished rollouts: what a recipe can name, and their way into the rows."""

"""Rewards and features of finished rollouts. The settings name the scorers of a recipe; a scorer maps prompts and texts
to numbers. The results become columns of the rows before they reach the buffer.
"""

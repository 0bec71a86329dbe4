"""From the replay buffer to the state trees of a rank. Rank 0 draws for all ranks and divides the rows; experts come
from their stream. The rows of a rank are cut into micro-batches, and priorities go back.
"""

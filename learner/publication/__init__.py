"""Publishing the weights of the moment. The tensors are named and rounded as the engine reads them, with a probe that
the learner computes. The publisher announces a version without waiting for the actors.
"""

"""The weights on their way from the learner to the actors. A manifest has a version, a fingerprint over all tensors and
a probe; the payload is packed tensors or a low-rank update. They travel through the object store of Ray.
"""

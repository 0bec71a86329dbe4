"""The learner: trains the policy stage by stage, on trajectories that it draws from the buffer. The worker runs a
stage, the trainer takes its optimizer steps: draw, tree, values of actions, loss, update. Checkpoints are written
beside training, and weights are published to the actors on a schedule.
"""

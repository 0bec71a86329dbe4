"""The learner: trains the policy stage by stage, on trajectories that it draws from the buffer."""

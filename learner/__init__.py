"""The learner: trains the policy stage by stage, on trajectories that it draws from the buffer.

worker, trainer, stage_checkpoints, optimizer, messages   a run, a stage, a step: the front, at the top
batches/        from the replay buffer to the state trees of a rank
state_tree/     action logs as a tree of distinct texts; Q and V of all of it from one forward pass
objectives/     what training maximises, one file a family
model/          the causal language model with its backspace action, adapters, 4-bit layers
ranks/          the processes that take a step together, and what they share
metrics/        what is measured of a step, alarms, the log and the trackers
publication/    the weights of the moment, announced to the actors
checkpoints/    what a checkpoint holds, where it lies, how it is written beside training
settings/       what a recipe says of all this
"""

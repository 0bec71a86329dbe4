"""Rollout actors: vLLM engines in which the model can take tokens back.

rollout_actor   one actor: prompts in, rollouts to the buffer, weights loaded between two steps
generator       rollouts of a checkpoint, without a run
engine/         vLLM with backspace inside it
pool/           all actors of a run, and their number
scoring         rewards and features of what they wrote
settings        of actors, of how they sample, and of how rollouts are scored
"""

"""Rollout actors: vLLM engines in which the model can take tokens back.

rollout_actor   one actor: prompts in, rollouts to the buffer, weights loaded between two steps
generator       rollouts of a checkpoint, without a run
engine/         vLLM with backspace inside it: interface, scheduler, logits processor, weights, ranks
pool/           all actors of a run: which there are (controller), how many (autoscaler), their processes (ray_pool)
scoring         rewards and features of what they wrote
settings        of actors, of how they sample, and of how rollouts are scored
"""

"""Rollout actors: vLLM engines in which the model can delete its tokens.

rollout_actor   one actor: prompts in, rollouts to the buffer, weights loaded between two steps
generator       rollouts of a checkpoint, without a run
engine/         vLLM with backspace inside it: interface, scheduler, logits processor, weights, ranks
pool/           all actors of a run: their states (controller), number (autoscaler) and processes (ray_pool)
scoring         rewards and features of rollouts
settings        of actors, sampling and scoring
"""

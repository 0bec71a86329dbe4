"""vLLM with backspace inside it. The scheduler takes deleted tokens back from a request, the logits processor keeps the
policy's rules, and each action is returned with its log-probability. Published weights are loaded between two engine
steps and proven by a probe on the engine itself.
"""

"""What is measured of a step. Metrics go to metrics.jsonl and to the trackers; alarms watch for a sampler and a learner
that disagree. Distributions compare rollouts with the policy that acted.
"""

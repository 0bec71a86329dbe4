"""Evaluation of checkpoints. Groups of rollouts are generated per decoding, each checkpoint is measured on them and on
held-out targets. The numbers with their errors are shown as tables and written to evaluation.json.
"""

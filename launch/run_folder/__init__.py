"""What lies in the folder of a run, and how a command finds it. One driver at a time holds the folder. What was changed
on a resume, which checkpoints there are and which examples were used is written there.
"""

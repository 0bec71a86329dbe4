"""What is measured of a step: the log and the trackers, and alarms for a sampler and a learner that disagree."""

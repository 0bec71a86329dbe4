"""What is measured of a step: rollouts against the policy that acted, alarms, the log and the trackers."""

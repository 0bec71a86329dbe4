"""What passes between processes: trajectories, their replay store, experts and the weight format."""

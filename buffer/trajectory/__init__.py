"""A trajectory is the contract of all processes: one Arrow row per rollout. Its schema carries the token contract,
replay says which text its actions make, and validation refuses a row that breaks a rule."""

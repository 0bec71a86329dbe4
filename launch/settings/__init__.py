"""What a recipe says: the settings of all rooms as one tree, which refuses what cannot have an effect."""

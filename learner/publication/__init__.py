"""The weights of the moment as readers want them, and their announcement to the actors."""

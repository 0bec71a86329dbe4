"""What a recipe says: the settings of a run, read from YAML with dotted overrides."""

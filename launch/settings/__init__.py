"""What a recipe says. The settings of all rooms are one pydantic tree, read from YAML with dotted overrides. What
cannot have an effect is refused before anything starts, and one table says what may change on a resume.
"""

"""Objectives, one file per family. A loss is a pure function of the values of actions, and the settings state what an
objective needs. The registry maps names to classes.
"""

"""`sequencematch report`: one self-contained HTML page about a run. A gatherer reads the run folder into plain data,
matplotlib draws its plots as SVG. A template and one script for stepping through rollouts make the page.
"""

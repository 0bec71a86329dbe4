"""Objectives side by side. All of them start from the same checkpoint, with the same budget and the same seeds. The
result is one table, one page and compare.json (docs/compare.md).
"""

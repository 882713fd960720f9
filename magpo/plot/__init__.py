"""Figures and tables of a paper from results folders: `python -m magpo.plot`."""

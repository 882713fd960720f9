"""The reproduction of the rows of `magpo.published`: `python -m magpo.reproduce`."""

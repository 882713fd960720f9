"""Files that the library writes, as tests read them."""

import csv
from pathlib import Path


def table_of(file):
    """Return the rows of a CSV."""
    with Path(file).open(newline="") as stream:
        return list(csv.DictReader(stream))

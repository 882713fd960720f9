"""`python -m magpo.runs [results]`"""

from magpo.config import cli
from magpo.runs import listing

cli.command(listing.__doc__, listing.main)

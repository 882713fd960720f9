"""The command `python -m magpo.runs [results]`."""

from magpo import commands
from magpo.runs import listing

commands.run(listing.__doc__, listing.main)

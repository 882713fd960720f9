"""The command `python -m magpo.report [results]`."""

from magpo import commands
from magpo.plot import page

commands.run(page.__doc__, page.main)

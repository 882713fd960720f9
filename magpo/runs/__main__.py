"""`python -m magpo.runs [results]`"""

from magpo.runs.listing import main

main()

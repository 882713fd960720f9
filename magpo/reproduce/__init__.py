"""The rows of `magpo.published`, repeated: `python -m magpo.reproduce`."""

"""Hyperparameter search, `python -m magpo.sweep`: many trials side by side in one program."""

from importlib.util import find_spec

from magpo.files import complain

if find_spec("optuna") is None:
    complain("error: Optuna is not installed: pip install 'magpo[sweep]'")
    raise SystemExit(2)

"""Hyperparameter search, many trials side by side in one program. `python -m magpo.sweep`"""

from importlib.util import find_spec

from magpo.files import complain

if find_spec("optuna") is None:
    complain("error: Optuna is not installed: pip install 'magpo[sweep]'")
    raise SystemExit(2)

"""The location of the YAML files."""

from pathlib import Path


def configs() -> Path:
    """Return the folder `configs`: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"

"""The signature of a checkpoint that a test has changed."""

import json
from pathlib import Path

from magpo.runs import checkpoint


def sign(folder: Path) -> None:
    """Make a checkpoint's manifest agree with its files."""
    manifest = {name: checkpoint._sha256(folder / name) for name in checkpoint._files(folder)}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))

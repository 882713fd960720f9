"""The program that trains a group of trials; it takes a system's name and command line."""

import sys

from magpo import experiment, plugins
from magpo.config import compose
from magpo.files import exit_on_config_error

if __name__ == "__main__":
    name = sys.argv.pop(1)
    with exit_on_config_error():
        compose.load_imports(sys.argv[1:])
        module = plugins.system(name)
    experiment.main(module, must_fit=True)

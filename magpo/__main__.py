"""The list of commands that `python -m magpo` prints."""

from magpo.files import printing

COMMANDS = """\
python -m magpo.systems.<system> env=<suite>/<task> [key=value ...]
                                              train; --help lists all keys
python -m magpo.systems                       list the systems
python -m magpo.envs                          list the tasks
python -m magpo.runs [results]                list runs, and how to resume them
python -m magpo.evaluate run=<folder>         play a run's best policies
python -m magpo.render run=<folder>           show an episode; or env=<suite>/<task>
python -m magpo.export run=<folder>           write a policy that needs JAX alone
python -m magpo.reproduce [<suite>/<task>]    list published results, or repeat a task's
python -m magpo.sweep <system> env=<suite>/<task>
                                              search hyperparameters
python -m magpo.plot <folder> out=<folder>    draw figures and write tables of many runs
python -m magpo.report [results]              write one HTML page about runs

All take import=<file or module>, for a system or a task of your own."""

if __name__ == "__main__":
    with printing():
        print(COMMANDS)

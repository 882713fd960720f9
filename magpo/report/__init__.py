"""The console, files and services that report on a run. A logger of your own is a `Sink`."""

from magpo.report.measurements import Measurement, Run, scalars
from magpo.report.sinks import Sink

__all__ = ["Measurement", "Run", "Sink", "scalars"]

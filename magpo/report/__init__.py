"""What a run shows and writes about itself. A logger of your own is a `Sink`."""

from magpo.report.measurements import Measurement, Run, scalars
from magpo.report.sinks import Sink

__all__ = ["Measurement", "Run", "Sink", "scalars"]

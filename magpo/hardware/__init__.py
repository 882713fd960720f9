"""Where a run computes: devices, processes, memory."""

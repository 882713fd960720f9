"""The devices, processes and memory that a run uses."""

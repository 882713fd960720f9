"""Runs on disk: folders, checkpoints, how to resume them, and what they trained."""

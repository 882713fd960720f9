"""Runs on disk: their folders, checkpoints, resumption and trained policies."""

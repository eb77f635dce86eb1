"""GLUE: its tasks, files, metrics, submissions and downloads."""

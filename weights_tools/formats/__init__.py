"""The forms in which a run is handed to other programs, a module for each."""

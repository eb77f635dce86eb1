"""Reading and writing files so that nothing half-written is ever taken for whole."""

"""Reports: tables, tests and figures of the runs below a folder."""

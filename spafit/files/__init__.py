"""Reading and writing files so that an incomplete file is never taken for a complete one."""

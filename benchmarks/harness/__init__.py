"""What contenders are compared by: timing, batches, arguments, reports, and how to read them."""

"""What the machine offers: memory, versions, random number generators."""

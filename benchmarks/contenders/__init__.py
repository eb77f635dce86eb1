"""What is compared: spafit, and what people would use in its place, doing the same work."""

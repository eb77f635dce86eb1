"""One run trained by many processes, as torchrun starts them."""

"""Hidden states after the frozen layers, computed once and read from then on."""

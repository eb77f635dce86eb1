"""Probes: what can be read off each layer of a frozen model."""

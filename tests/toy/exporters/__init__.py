"""Toy exporters."""

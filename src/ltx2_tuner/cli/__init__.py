"""Argument groups and main(argv) of each script."""

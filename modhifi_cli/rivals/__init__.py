"""Pruners of other projects, run to the same budget so that they can be compared with ours on equal terms."""

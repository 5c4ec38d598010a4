"""Networks as files that other programs open: one file a format, each named by a YAML in ``configs/export/``.

A format is a frozen dataclass of its settings that is called with the network; what all of them share is in `written.py`.
"""

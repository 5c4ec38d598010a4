"""Where images come from: one file per source, each with `load`, which returns an `ImageSource`.

Sources without labels never open label files or label arrays.
"""

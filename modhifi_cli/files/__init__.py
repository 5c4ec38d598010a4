"""The files of a run: its folder, its saved network, the cache of made data, and export files."""

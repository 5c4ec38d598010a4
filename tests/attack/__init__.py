"""Attacks on the tool: strangers' folders, damage, kills, nonsense on the command line, full disks, two at once.

Every attack is a generator with a seed, so a finding can be had again; `scripts/attack.py` runs as many as are wanted.
"""

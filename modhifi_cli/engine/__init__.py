"""Pruning, one engine on two walks: what the tool does to a network, as generators of records that write and print nothing."""

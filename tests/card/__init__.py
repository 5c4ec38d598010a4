"""Whole runs on a card that is pretended (`pretend.py`): places, memory and traffic as CUDA would see them."""

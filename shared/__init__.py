"""Modules that more than one process needs; each module is one idea."""

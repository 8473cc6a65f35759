"""How fast a model runs on this machine, and how much memory it takes.

This file imports nothing: the process that measures must not load what it does not need.
"""

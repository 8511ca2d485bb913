"""Calibration: find the frequency chunks that rank tokens like a model's whole heads.

Pure functions of queries and keys, which the engine that serves the model supplies.
"""

"""Offline calibration: find the frequency chunks that rank tokens like a model's whole heads.

The server reads only the ``DominantFCs`` file that a calibration writes.
"""

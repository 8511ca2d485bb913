"""Offline calibration: which frequency chunks of a model rank tokens like its whole heads.

Meets the server only through the file that ``DominantFCs`` reads and writes.
"""

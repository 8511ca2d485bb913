"""The models that workloads run: from the package index, and shapes with random weights."""

"""A sparse-index planner for FlashInfer's decode kernels; the only package that imports FlashInfer.

``SparseIndexPlanner`` ranks the cached tokens of every (request, KV head) pair by their labels,
writes the best ones as page indices, and attends to them with FlashInfer's paged decode. It needs
neither SGLang nor anything else of this project but ``fasa_sglang.ops``; ``examples/planner.py``
shows it alone.
"""

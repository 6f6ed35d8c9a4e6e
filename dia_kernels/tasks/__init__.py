"""Small tasks beside classification: a detector and a 3-D segmentation network of other libraries, with attention.

``python -m dia_kernels demo --task detect`` and ``--task segment3d`` run them on made scenes (``scenes.py``).
"""

"""The papers' experiments, each by one command: ``python -m dia_kernels reproduce NAME --scale tiny|small|full``."""

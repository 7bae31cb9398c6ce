"""Speed and memory against peers, one module for each question; `python -m benchmarks.main`."""

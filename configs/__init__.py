"""One file for each run, installed as `kafjax.configs`, and the paper's tables in `tables`."""

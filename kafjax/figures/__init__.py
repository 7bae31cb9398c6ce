"""The paper's figures of any prepared dataset and any runs: `python -m kafjax.figures --help`."""

"""The paper's figures for any prepared dataset and runs: `kafjax figures --help`."""

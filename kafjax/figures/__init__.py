"""The paper's figures of any prepared dataset and any runs: `kafjax figures --help`."""

"""From a folder of scans, some with labels, to labels for all: survey, plan, and every stage."""

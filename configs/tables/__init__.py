"""The tables of the paper's appendix, and others like them."""

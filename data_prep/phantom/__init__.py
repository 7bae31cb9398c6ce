"""Synthetic hearts: random anatomies, drawn slice by slice and written in CHD's layout."""

"""Synthetic hearts: random anatomies, drawn slice by slice and written as CHD is laid out."""

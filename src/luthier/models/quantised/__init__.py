"""Frozen weights of linear layers in fewer bits, rebuilt when they are used."""

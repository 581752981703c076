"""Margins on cosines, and the classifiers that use them."""

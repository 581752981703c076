"""Labels that are to be trusted: which images of a landmark confirm each other.

The rule of the 1st place of Google Landmark Retrieval 2019, and votes that need no local features.
"""

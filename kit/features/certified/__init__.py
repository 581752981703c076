"""Screening in low precision that provably loses none of the best rows."""

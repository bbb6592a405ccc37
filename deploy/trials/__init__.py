"""Bundles on a real arm, one against the other: blinded, shuffled, and marked by a person."""

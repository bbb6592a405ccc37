"""Policies of other projects, in and out."""

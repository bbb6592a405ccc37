"""Policies that other programs compute, without torch: one room for each such program."""

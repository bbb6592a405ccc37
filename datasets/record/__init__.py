"""Demonstrations as they happen, written step by step."""

"""Folders of CSV files, pictures and videos."""

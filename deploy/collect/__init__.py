"""Demonstrations from robots: by the scripted expert, and by people who correct a policy."""

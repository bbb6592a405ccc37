"""Pictures as arrays hold them, their codecs, and video that is written while it is recorded."""

"""Other people's formats, each in a file: what reads it gives columns, what writes it takes a replay buffer.

contract.py     what a format is
registry.py     all of them, and which one a path holds
conversion.py   from one to another: resumable, and compared with the source at the end
"""

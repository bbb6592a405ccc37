"""What people steer with, behind one protocol."""

"""Simulated PushT and Panda behind `Arm` and `Camera`, in real time."""

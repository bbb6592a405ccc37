"""Simulators behind one protocol, scripted experts, vectorised rollouts and video."""

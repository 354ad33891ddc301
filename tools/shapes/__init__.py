"""Drawn shapes: a detection set that anyone can make, and a small detector trained on it."""

"""Neurons' activations and gradients, integrated gradients, and the largest of many scores."""

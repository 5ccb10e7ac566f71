"""Figures: learning curves, block density, ponder maps, accuracy and MACs."""

"""Choose the smallest member whose loss against the dense model is bounded with confidence."""

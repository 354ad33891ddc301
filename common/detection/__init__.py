"""What all detectors share: the contract, its types, and pieces of heads and metrics."""

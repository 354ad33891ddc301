"""Files of weights: read without running anything, downloaded, checked."""
